"""Every kind of folder and file that the library reads, made small, and what reads each: for attacks on the readers."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from bytewise import write_tokenizer
from checkpoint.adapter_files import tensors_for, write_adapter
from checkpoint.gguf_package import write_blocks
from checkpoint.packers import FORMATS as PACKED
from checkpoint.packers import write as write_packed
from checkpoint.test_legacy import ggml, llama2c
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model

import llama2.checkpoint as checkpoint
from llama2 import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GPTQConfig,
    LoraConfig,
    Trainer,
    TrainingArguments,
    cpu,
    lora,
)
from llama2.checkpoint.adapter_header import facts
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.convert_adapter import convert_adapter
from llama2.checkpoint.imatrix import from_importance, read_imatrix, write_imatrix
from llama2.checkpoint.peft import load_adapter
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.checkpoint.peft_files import read_config
from llama2.cli import inspect
from llama2.errors import Llama2Error
from llama2.files import JOURNAL
from llama2.quantization.codebook_blocks import CODED
from llama2.runners.native import NativeModel
from llama2.text_file import read_object
from llama2.tokenizer import LlamaTokenizer
from llama2.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceModel
from llama2.train import checkpoints, old_shards, readers, shards
from llama2.train.dataset_adapter import objective_for
from llama2.train.distributed import Ranks

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256,
}  # fmt: skip
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
ROWS: list[Any] = [{"input_ids": [1 + i, 2, 3, 4]} for i in range(4)]


# -- reading -----------------------------------------------------------------------------------------------------


class Attempts:
    """What readers raised: the library's own errors are right, anything else is a fault."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.faults: list[BaseException] = []

    @contextmanager
    def attempt(self) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except Llama2Error as error:
            self.refused.append(str(error))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            self.faults.append(error)


def read_model(folder: Path, tries: Attempts) -> None:
    with tries.attempt():
        source = checkpoint.open(folder)
        for name in source.tensors:
            source.read(name)
        assert source.generation_settings is None or source.auto_dtype
    with tries.attempt():
        AutoConfig.from_pretrained(folder).to_json_string()
    with tries.attempt():
        inspect.main_type(inspect.read(str(folder)))
    with tries.attempt():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    if folder.is_dir() and (folder / "generation_config.json").exists():
        with tries.attempt():
            GenerationConfig.from_pretrained(folder).validate()


def read_tokenizer(folder: Path, tries: Attempts) -> None:
    with tries.attempt():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.decode(tokenizer.encode("Hello wörld </s> 12"))
        if tokenizer.chat_template is not None:
            tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    if (folder / "tokenizer.model").exists():
        with tries.attempt():
            slow = LlamaTokenizer.from_pretrained(folder)
            slow.decode(slow.encode("Hello wörld </s> 12"))


def read_gguf(file: Path, tries: Attempts) -> None:
    with tries.attempt():
        model = NativeModel.from_gguf(file, threads=1)
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    read_tokenizer(file, tries)
    read_model(file, tries)


def read_split(folder: Path, tries: Attempts) -> None:
    """All parts of a split file, from the first of those that are there."""
    read_gguf(min(folder.glob("*.gguf")), tries)


def read_adapter_folder(folder: Path, tries: Attempts) -> None:
    with tries.attempt():
        read_adapter(folder, tiny_config(**SIZES))
    with tries.attempt():
        load_adapter(tiny_model(torch.float32, **SIZES), folder)
    with tries.attempt():
        read_config(folder)
    with tries.attempt():
        inspect.read(str(folder))


def read_gguf_adapter(folder: Path, tries: Attempts) -> None:
    config = tiny_config(**SIZES)
    with tries.attempt():
        read_adapter(folder, config)
    with tries.attempt():
        load_adapter(tiny_model(torch.float32, **SIZES), folder / "a.gguf")
    with tries.attempt():
        facts(folder / "a.gguf")
    with tries.attempt():
        convert_adapter(folder / "a.gguf", folder / "made", config, "who/tiny")


def read_run(folder: Path, tries: Attempts) -> None:
    """Goes on from the folder's checkpoint, whose manifest is made to fit what was planted."""
    place = folder / "checkpoint-1"
    with tries.attempt():
        checkpoints.newest(folder)
    with tries.attempt(), suppress(ValueError, TypeError, KeyError, OSError, AttributeError):  # where that is planted
        manifest = read_object(place / checkpoints.MANIFEST, checkpoints.MANIFEST)
        for file in place.rglob("*"):
            if file.is_file() and file.name != checkpoints.MANIFEST:
                entry = {"bytes": file.stat().st_size, "sha256": checkpoints._sha256(file)}
                manifest["files"][str(file.relative_to(place))] = entry
        (place / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    with tries.attempt():
        run(folder, "outside" in folder.name, resume_from_checkpoint=True).train()


def read_rows(file: Path, tries: Attempts) -> None:
    with tries.attempt():
        rows = readers.read(file)
        objective_for(tiny_model(torch.float32, **SIZES), rows, AutoTokenizer.from_pretrained(file.parent))


def read_tables(folder: Path, tries: Attempts) -> None:
    for source in (folder / "rows.parquet", folder / "saved"):
        with tries.attempt():
            assert all(len(row) < 100 for row in readers.read(source))


def read_cuts(folder: Path, tries: Attempts) -> None:
    """The texts that make a pattern try again and again."""
    read_tokenizer(folder, tries)
    for text in ("a" * 3000 + "\n!", " " * 3000 + "x1", "a1 " * 1000, "\n" * 2000 + "é" * 2000):
        with tries.attempt():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            tokenizer.encode(text)


def read_state(folder: Path, tries: Attempts) -> None:
    for read, place in ((shards.read, "new"), (old_shards.read, "old")):
        with tries.attempt():
            for tensor in read(folder / place).values():
                tensor.whole()


def read_sums(file: Path, tries: Attempts) -> None:
    with tries.attempt():
        read_imatrix(file).importance()


# -- making ------------------------------------------------------------------------------------------------------


def model(folder: Path, sizes: Mapping[str, Any] = MappingProxyType({}), **given: Any) -> Any:
    made = tiny_model(torch.float32, **{**SIZES, **sizes})
    made.generation_config = GenerationConfig(max_new_tokens=4, do_sample=False)
    made.save_pretrained(folder, **given)
    write_tokenizer(folder)
    return made


def sharded(folder: Path) -> None:
    model(folder, max_shard_size="30KB")


def bin_folder(folder: Path) -> None:
    model(folder, safe_serialization=False)


def meta(folder: Path) -> None:
    model(folder.parent / "plain")
    spm(folder.parent / "plain")
    (folder.parent / "plain" / "tokenizer.json").unlink()
    convert(folder.parent / "plain", folder, ConversionSettings(to="meta", shards=1))


def packed_folder(folder: Path, config: Any) -> None:
    model(folder.parent / "plain")
    AutoModelForCausalLM.from_pretrained(folder.parent / "plain", quantization_config=config).save_pretrained(folder)


def gguf(folder: Path) -> None:
    model(folder.parent / "plain")
    folder.mkdir()
    convert(folder.parent / "plain", folder / "model.gguf", ConversionSettings(to="gguf", dtype="q8_0"))
    cpu.packed_file.write(checkpoint.gguf.GgufFile(folder / "model.gguf"))


def gguf_blocks(folder: Path, dtype: str, **more: Any) -> None:
    """A file of one type, of a model whose widths its blocks divide; more: settings of the conversion."""
    model(folder.parent / "plain", {"hidden_size": 256, "intermediate_size": 256})
    folder.mkdir()
    convert(folder.parent / "plain", folder / "model.gguf", ConversionSettings(to="gguf", dtype=dtype, **more))


def adapter(folder: Path, **changes: Any) -> None:
    model(folder.parent / "plain")
    tensors = tensors_for(tiny_config(**SIZES), ("q_proj", "v_proj"))
    write_adapter(folder, tensors, base_model_name_or_path=str(folder.parent / "plain"), **changes)


def pickled_adapter(folder: Path) -> None:
    adapter(folder, target_modules=r".*\.(q|v)_proj", rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 8})
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def gguf_adapter(folder: Path) -> None:
    """An adapter as llama.cpp reads it, alone in its folder."""
    adapter(folder.parent / "peft")
    folder.mkdir()
    convert_adapter(folder.parent / "peft", folder / "a.gguf", tiny_config(**SIZES), "who/tiny")


def spm(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁Helowrd", "▁H", "el", "lo", "▁w"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - 259)]
    scores = [-float(i) for i in range(len(pieces))]
    (folder / "tokenizer.model").write_bytes(SentencePieceModel(tuple(pieces), tuple(scores), tuple(kinds)).to_bytes())
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "add_bos_token": True,
                "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}}, "model_max_length": 4096,
                "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "</s>"}))
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": len(pieces)}))


def templates(folder: Path) -> None:
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages | length }}")


def run(folder: Path, outside: bool = False, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    network = tiny_model(torch.float32, **SIZES)
    lora.add_adapter(network, LoraConfig(r=2))
    args = TrainingArguments(output_dir=str(folder), max_steps=1, save_steps=1, per_device_train_batch_size=4,
                             **settings)  # fmt: skip
    given: dict[str, Any] = {}
    if outside:
        weights = [p for p in network.parameters() if p.requires_grad]
        given["optimizers"] = (torch.optim.Adam(weights, lr=1e-3), None)
    return Trainer(model=network, args=args, train_dataset=ROWS, **given)


def journal(folder: Path) -> None:
    """A folder whose last save was interrupted behind its journal; it names a folder below, and removes a file."""
    model(folder)
    stage = ".0123456789abcdef.save"
    (folder / stage / "below").mkdir(parents=True)
    for name in ("config.json", "below/notes.txt"):
        (folder / stage / name).write_bytes((folder / "config.json").read_bytes())
    content = {"stage": stage, "files": ["below/notes.txt", "config.json"], "remove": ["generation_config.json"]}
    (folder / JOURNAL).write_text(json.dumps(content))


def state(folder: Path) -> None:
    """What ranks write of a run's state, now and before; not what the model's own parts are."""
    torch.manual_seed(0)
    content = {"weights.a": torch.rand(5, 4), "optimizer.exp_avg.a": torch.rand(5, 4).bfloat16(),
               "optimizer.step.a": torch.tensor(3.0)}  # fmt: skip
    shards.write(folder / "new", content, Ranks())
    import torch.distributed.checkpoint as dcp

    dcp.save(content, storage_writer=dcp.FileSystemWriter(folder / "old"), no_dist=True)


def rows(folder: Path) -> None:
    write_tokenizer(folder)
    chat = {"messages": [*MESSAGES, {"role": "assistant", "content": "yes"}]}
    (folder / "rows.jsonl").write_text("\n".join([json.dumps(chat)] * 3))
    (folder / "rows.json").write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2))
    (folder / "rows.tsv").write_text("prompt\tcompletion\na\tb\n")
    (folder / "rows.txt").write_text("one\n\ntwo é\n")
    (folder / "rows.csv").write_text('instruction,output\n"a, b",c\nd,e\n')


def tables(folder: Path) -> None:
    """Rows as parquet, and as a data set that save_to_disk wrote."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    found = [{"prompt": "a b", "completion": f"c {i}", "label": i % 2} for i in range(8)]
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), folder / "rows.parquet")
    datasets.disable_progress_bars()
    kinds = {"prompt": datasets.Value("string"), "completion": datasets.Value("string")}
    features = datasets.Features({**kinds, "label": datasets.ClassLabel(names=["x", "y"])})
    datasets.Dataset.from_list(found, features=features).save_to_disk(folder / "saved")


def patterns(folder: Path) -> None:
    """A byte-level tokenizer that cuts by a pattern, as Llama 3's does."""
    folder.mkdir()
    write_tokenizer(folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\s+(?!\S)| ?\p{L}+|\p{N}{1,3}|(?i:'s|'t)|[^\s\p{L}]+"},
             "behavior": "Isolated", "invert": False}  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    document["normalizer"] = {"type": "Replace", "pattern": {"Regex": r"\s+$"}, "content": " "}
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    document["added_tokens"].append({"id": 260, "content": "a" * 900 + " \n!", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(document))


def imatrix(folder: Path) -> None:
    folder.mkdir()
    sums = {"model.layers.0.self_attn.q_proj.weight": torch.rand(64), "lm_head.weight": torch.rand(64)}
    for name in ("i.dat", "i.gguf"):
        write_imatrix(folder / name, from_importance(sums, 64, 32, "words.txt"))


def codebook(folder: Path, kind: str) -> None:
    folder.mkdir()
    write_blocks(folder / "m.gguf", (kind,))


def legacy(folder: Path) -> None:
    """Files before GGUF."""
    folder.mkdir()
    ggml(folder / "old.bin", "ggjt", 1, "Q4_0")
    ggml(folder / "new.bin", "ggjt", 3, "F16")
    for version in (0, 2):
        llama2c(folder / f"c{version}.bin", version, tied=False)


def each(suffixes: tuple[str, ...], read: Callable[[Path, Attempts], None]) -> Callable[[Path, Attempts], None]:
    """Reads each file of a folder that ends so."""

    def reader(folder: Path, tries: Attempts) -> None:
        for file in sorted(folder.iterdir()):
            if file.name.endswith(suffixes):
                read(file, tries)

    return reader


def both(folder: Path, tries: Attempts) -> None:
    read_model(folder, tries)
    read_tokenizer(folder, tries)


Make = Callable[[Path], Any]
KINDS: dict[str, tuple[Make, Callable[[Path, Attempts], None]]] = {
    "safetensors": (model, both),
    "sharded": (sharded, read_model),
    "bin": (bin_folder, read_model),
    "meta": (meta, both),
    "gptq": (lambda folder: packed_folder(folder, GPTQConfig(group_size=32)), read_model),
    "nf4": (
        lambda folder: packed_folder(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        read_model,
    ),
    "gguf": (gguf, each((".gguf",), read_gguf)),
    "nf4_double": (
        lambda folder: packed_folder(
            folder,
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        ),
        read_model,
    ),
    "fp4": (
        lambda folder: packed_folder(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")),
        read_model,
    ),
    "int8": (lambda folder: packed_folder(folder, BitsAndBytesConfig(load_in_8bit=True)), read_model),
    "gguf_split": (partial(gguf_blocks, dtype="q8_0", split_size="300KB"), read_split),
    **{
        f"gguf_{dtype}": (partial(gguf_blocks, dtype=dtype), each((".gguf",), read_gguf))
        for dtype in ("q4_0", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_m", "q5_k_m", "q6_k", "float16")
    },
    "adapter": (adapter, read_adapter_folder),
    "adapter_bin": (pickled_adapter, read_adapter_folder),
    "adapter_gguf": (gguf_adapter, read_gguf_adapter),
    "spm": (spm, read_tokenizer),
    "templates": (templates, read_tokenizer),
    "run": (lambda folder: run(folder).train(), read_run),
    "run_outside": (lambda folder: run(folder, outside=True).train(), read_run),
    "rows": (
        lambda folder: (folder.mkdir(), rows(folder)),
        each((".jsonl", "rows.json", ".csv", ".tsv", ".txt"), read_rows),
    ),
    "journal": (journal, read_model),
    "state": (lambda folder: (folder.mkdir(), state(folder)), read_state),
    "tables": (tables, read_tables),
    "patterns": (patterns, read_cuts),
    "imatrix": (imatrix, each((".dat", ".gguf"), read_sums)),
    **{f"codebook_{kind}": (partial(codebook, kind=kind), each((".gguf",), read_gguf)) for kind in CODED},
    "legacy": (legacy, each((".bin",), read_model)),
    **{f"read_{kind}": (partial(write_packed, kind), read_model) for kind in PACKED},
}


def make(kind: str, folder: Path) -> Path:
    """A new folder of a kind."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KINDS[kind][0](folder)
    return folder


def visit(kind: str, folder: Path) -> Attempts:
    """Everything that reads such a folder, and what it raised."""
    tries = Attempts()
    KINDS[kind][1](folder, tries)
    return tries
