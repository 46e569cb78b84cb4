"""What the fuzzer found, kept small: each file is refused in one sentence that names it, the place and the value."""

import hashlib
import json
import os
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.folders import make, visit

import llama2.checkpoint as checkpoint
from llama2 import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, mapping
from llama2.checkpoint import directory
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.hf import load_bin, map_safetensors
from llama2.checkpoint.imatrix import read_imatrix
from llama2.cpu import packed_file
from llama2.errors import CheckpointError, ConfigError, InputError, Llama2Error
from llama2.text_file import inside, opened, parse_json, read_object


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


# -- config.json -------------------------------------------------------------------------------------------------

CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000; .* at most 10000"),
    (
        {"num_attention_heads": 2**40, "num_key_value_heads": 3},
        "num_attention_heads is 1099511627776; .* at most 65536",
    ),
    ({"num_labels": 10_000_000}, "config.json: num_labels is 10000000; it must be a whole number from 0 to 100000"),
    ({"num_attention_heads": {"a": 1}, "head_dim": 32}, "num_attention_heads is {'a': 1}; it must be an integer"),
    ({"rms_norm_eps": {}}, "config.json: rms_norm_eps is {}; it must be a finite number"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
    ({"architectures": True}, "config.json: architectures is True; it must be a list"),
    ({"to_dict": []}, "config.json: 'to_dict' is what LlamaConfig calls something of its own"),
    ({"self": 1}, "config.json: 'self' is what LlamaConfig"),
    ({"num_parameters": 7}, "'num_parameters' is what LlamaConfig"),
    ({"id2label": {"x": "y"}}, "id2label is {'x': 'y'}; it must be at most 100000 texts by number"),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, r"rope_type is \['linear'\]"),
    ({"rope_theta": 10**400}, "rope_theta is 10000"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "1"}}, "beta_fast is '1'; it must be a finite"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id is {'a': 1}"),
    ({"dtype": ["float32"]}, r"dtype is \['float32'\]; it must be one of"),
    ({"extra": deep(100)}, "config.json is JSON nested deeper than 64 levels"),
    ({"quantization_config": 5}, "quantization_config is 5; it must be an object"),
    ({"quantization_config": {"quant_method": ["gptq"]}}, r"quantization_config is {'quant_method': \['gptq'\]}"),
    ({"quantization_config": {"quant_method": "gptq", "bits": "4"}}, "bits is '4'; it must be a whole number"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("safetensors", tmp_path_factory.mktemp("model") / "safetensors")


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize(("changes", "said"), CONFIGS, ids=range(len(CONFIGS)))
def test_config(model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = copied(model, tmp_path / "m")
    edited(folder / "config.json", **changes)
    tries = visit("safetensors", folder)
    assert not tries.faults
    with pytest.raises((ConfigError, CheckpointError, InputError), match=said):
        raise InputError("\n".join(tries.refused))


def test_a_key_of_a_program_that_hides_nothing_is_kept() -> None:
    assert LlamaConfig(foo=[1]).foo == [1]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="'save_pretrained' is what LlamaConfig calls something of its own"):
        LlamaConfig(save_pretrained=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"validate": 1}, "'validate' is what GenerationConfig"),
        ({"self": 1}, "'self' is what GenerationConfig"),
        ({"eos_token_id": "x"}, "generation_config.json: eos_token_id is 'x'"),
        ({"stop_strings": [1]}, r"stop_strings is \[1\]"),
        ({"top_k": []}, r"top_k is \[\]"),
    ],
)
def test_generation_config(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(changes))
    with pytest.raises(InputError, match=said):
        GenerationConfig.from_pretrained(tmp_path)


# -- tokenizers --------------------------------------------------------------------------------------------------

TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"bos_token": [deep(70)]}, "tokenizer_config.json is JSON nested deeper than 64"),
    ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder is {'x'"),
    ({"added_tokens_decoder": {"1": {"content": ["a"]}}}, "added_tokens_decoder is"),
    ({"added_tokens_decoder": {"1": {"content": "a", "special": None}}}, "added_tokens_decoder is"),
    ({"additional_special_tokens": 3}, "additional_special_tokens is 3"),
    ({"chat_template": 7}, "chat_template is 7"),
    ({"padding_side": ["left"]}, r"padding_side is \['left'\]"),
    ({"eos_token": "x" * 2000}, "eos_token is 'xxx.*; it must be a token: a text of at most 1000"),
    ({"model_max_length": float("nan")}, "model_max_length is nan"),
]


@pytest.mark.parametrize(("changes", "said"), TOKENIZERS, ids=range(len(TOKENIZERS)))
def test_tokenizer_config(model: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    folder = copied(model, tmp_path / "m")
    edited(folder / "tokenizer_config.json", **changes)
    with pytest.raises(Llama2Error, match=said):
        AutoTokenizer.from_pretrained(folder)


def test_settings_name_no_other_file(model: Path, tmp_path: Path) -> None:
    """vocab_file and the like say where another program had its files; nothing is read from there."""
    folder = copied(model, tmp_path / "m")
    edited(folder / "tokenizer_config.json", vocab_file="/etc/passwd", tokenizer_file="/etc/passwd", tokenizer_object=1)
    assert AutoTokenizer.from_pretrained(folder).vocab_file is None


# -- files that are no files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
def test_what_is_no_file_is_refused_before_it_is_read(model: Path, tmp_path: Path, name: str, kind: str) -> None:
    folder = copied(model, tmp_path / "m")
    (folder / name).unlink()
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        (folder / name).symlink_to("/dev/zero" if kind == "device" else folder / name)
    tries = visit("safetensors", folder)
    assert not tries.faults and tries.refused


def test_opened(tmp_path: Path) -> None:
    for path, said in ((tmp_path, "is a folder, not a regular file"), (Path("/dev/zero"), "is a device")):
        with pytest.raises(CheckpointError, match=said):
            opened(path)
    (tmp_path / "big.json").write_bytes(b" " * 101)
    with pytest.raises(CheckpointError, match=r"big.json has more than 100 bytes"):
        read_object(tmp_path / "big.json", "big.json", most=100)
    with pytest.raises(CheckpointError, match="surrogates not allowed"):
        parse_json(b'{"a": "\\ud800"}', "x")


def test_names_stay_in_their_folder(tmp_path: Path) -> None:
    for name in ("", ".", "..", "../x", "/etc/passwd", "a/b", "a" * 300, "\0", 5, None, ["x"]):
        with pytest.raises(CheckpointError, match="must be the name of a file beside it"):
            inside(tmp_path, name, "index")
    (tmp_path / "out").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="is a link to /etc/hostname, outside its folder"):
        inside(tmp_path, "out", "index")
    snapshot, blob = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs" / "f"
    for folder in (snapshot, blob.parent):
        folder.mkdir(parents=True)
    blob.touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/f")
    assert inside(snapshot, "model.safetensors", "index").exists()


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_links_out_of_the_folder_are_not_followed(model: Path, tmp_path: Path, name: str) -> None:
    """A template that is a link to a private file would be shown, saved and uploaded with the model."""
    folder = copied(model, tmp_path / "m")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/hostname")
    load = AutoTokenizer.from_pretrained if name.endswith("jinja") else checkpoint.open
    with pytest.raises(CheckpointError, match=r"is a link to /etc/hostname, outside its folder; put the file itself"):
        load(folder)


# -- weights -----------------------------------------------------------------------------------------------------

ENTRY: dict[str, Any] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"a": ENTRY | {"dtype": ["F32"]}}, r"dtype is \['F32'\]"),
        ({"a": ENTRY | {"shape": [0, 2**70], "data_offsets": [0, 0]}}, r"shape is \[0, 1180591620717411303424\]"),
        ({"a": ENTRY | {"shape": None}}, "shape is None"),
        ({"a": {"dtype": "F32"}}, "entry of tensor 'a' is malformed"),
        ({"a": ENTRY | {"data_offsets": [8]}}, "it needs two data_offsets"),
        ({str(i): ENTRY for i in range(101)}, "holds 101 tensors; at most 100"),
    ],
)
def test_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: dict[str, Any], said: str) -> None:
    monkeypatch.setattr(directory, "MAX_TENSORS", 100)
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match=said):
        map_safetensors(tmp_path / "model.safetensors")
    assert not visit("safetensors", tmp_path).faults


def test_a_deflated_directory(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w") as new:
        for name in old.namelist():
            more = b" " * 10_000_000 if name.endswith("data.pkl") else b""
            new.writestr(name, old.read(name) + more, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed, which torch.save never does"):
        load_bin(tmp_path / "b.bin")


def test_tensors_larger_than_their_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"one of shape \(1099511627776,\) for which 4 bytes are stored"):
        load_bin(tmp_path / "a.bin")
    one = torch.zeros(4096)
    torch.save({str(i): one for i in range(100)}, tmp_path / "b.bin")
    with pytest.raises(CheckpointError, match="holds tensors of .* bytes in all"):
        load_bin(tmp_path / "b.bin")


def test_a_dict_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    torch.save(content, tmp_path / "a.bin")
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match="not a dict of tensors"):
        warnings.simplefilter("ignore")
        load_bin(tmp_path / "a.bin")


def test_a_name_that_takes_as_much_memory_as_it_is_told(tmp_path: Path) -> None:
    """bytearray(2**40), which torch's own list lets through."""
    (tmp_path / "a.bin").write_bytes(b"\x80\x02c__builtin__\nbytearray\nq\x00J\x00\x00\x00\x7f\x85q\x01Rq\x02.")
    with pytest.raises(CheckpointError, match="it names, __builtin__.bytearray, so it was not opened"):
        load_bin(tmp_path / "a.bin")


INDEXES: list[tuple[Any, str]] = [
    ({"a": ".."}, "points to '..'; it must be the name of a file beside it"),
    ({"a": ""}, "points to ''"),
    ({"a": "x" * 1000}, "points to 'xxx"),
    ({"a": ["x"]}, "weight_map is {'a': \\['x'\\]}"),
    ({"a": "/dev/zero"}, "points to '/dev/zero'"),
]


@pytest.mark.parametrize(("names", "said"), INDEXES, ids=range(len(INDEXES)))
def test_indexes(model: Path, tmp_path: Path, names: Any, said: str) -> None:
    folder = copied(model, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=said):
        checkpoint.open(folder)
    assert not visit("sharded", folder).faults


# -- GGUF, its companions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2**28, 2**61])
def test_gguf_arrays_take_no_more_than_a_vocabulary(tmp_path: Path, count: int) -> None:
    """The file is sparse: 256 MB of it are no bytes on the disk, and would be 2 GB of Python objects."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 0, count)
    with (tmp_path / "a.gguf").open("wb") as file:
        file.write(head)
        file.truncate(2**28 + 1000)
    with pytest.raises(CheckpointError, match="announces"):
        GgufFile(tmp_path / "a.gguf")


def test_a_packed_file_of_the_right_hash_that_is_no_json(tmp_path: Path) -> None:
    folder = make("gguf", tmp_path / "gguf")
    file, fixed = packed_file.packed_path(GgufFile(folder / "model.gguf")), packed_file._FIXED
    for header in (b"{nonsense", b"[]", b'{"crc32": 1}', b"[" * 5000):
        head = fixed.pack(packed_file._MAGIC, packed_file._VERSION, len(header)) + header
        file.write_bytes(head + hashlib.sha256(head).digest() + bytes(100))
        with pytest.warns(UserWarning, match="the packed weights are not used"):
            assert packed_file.find(GgufFile(folder / "model.gguf")) is None


def test_imatrix(tmp_path: Path) -> None:
    for data in (b"", struct.pack("<i", 2**31 - 1), struct.pack("<ii", 1, 2**31 - 1)):
        (tmp_path / "i.dat").write_bytes(data)
        with pytest.raises(CheckpointError):
            read_imatrix(tmp_path / "i.dat")


# -- without maps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "bin", "gguf", "gptq"])
def test_weights_that_are_read_outlive_their_file(tmp_path: Path, kind: str) -> None:
    """With disable_mmap a file that is cut afterwards changes nothing; a map would end the process."""
    folder = make(kind, tmp_path / kind)
    wanted = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([[1, 2, 3]])).logits
    found = AutoModelForCausalLM.from_pretrained(folder, disable_mmap=True)
    for file in folder.iterdir():
        os.truncate(file, 0)
    assert torch.equal(found(torch.tensor([[1, 2, 3]])).logits, wanted)


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda d: os.stat_result([*real(d)[:6], 5000, *real(d)[7:]]))
    said = pytest.raises(CheckpointError, match="was cut to 100 of its 5000 bytes")
    with mapping.reading_whole(), (tmp_path / "a").open("rb") as file, said:
        mapping.mapped(file)


# -- adapters, Meta's files --------------------------------------------------------------------------------------

CHANGES: list[tuple[str, str, dict[str, Any], str]] = [
    ("adapter", "adapter_config.json", {"modules_to_save": 5}, "modules_to_save is 5"),
    ("adapter", "adapter_config.json", {"base_model_name_or_path": ["x"]}, r"base_model_name_or_path is \['x'\]"),
    ("adapter", "adapter_config.json", {"target_modules": "((a|aa)+)+$"}, "names no linear|do not name"),
    ("adapter", "adapter_config.json", {"rank_pattern": {"(.*)*x": 2**40}}, "rank_pattern is"),
    ("adapter", "adapter_config.json", {"r": 10**400}, "r is 1000"),
    ("adapter", "adapter_config.json", {"trainable_token_indices": {"a": "b"}}, "trainable_token_indices is"),
    ("run", "checkpoint-1/trainer_state.json", {"run": {}}, r"does not say how many rows a step took \(run, batch\)"),
    ("run", "checkpoint-1/trainer_state.json", {"global_step": "1"}, "global_step is '1'; it must be a whole number"),
    ("meta", "params.json", {"dim": "64"}, "params.json: dim is '64'"),
    ("meta", "params.json", {"ffn_dim_multiplier": "\u2028"}, "ffn_dim_multiplier is '"),
    ("meta", "params.json", {"n_heads": 2**40}, "n_heads is 1099511627776"),
    ("meta", "params.json", {"norm_eps": [1]}, r"norm_eps is \[1\]"),
]


@pytest.mark.parametrize(("kind", "name", "changes", "said"), CHANGES, ids=range(len(CHANGES)))
def test_other_settings(tmp_path: Path, kind: str, name: str, changes: dict[str, Any], said: str) -> None:
    folder = make(kind, tmp_path / kind)
    edited(folder / name, **changes)
    tries = visit(kind, folder)
    assert not tries.faults
    with pytest.raises(InputError, match=said):
        raise InputError("\n".join(tries.refused))


def test_an_adapter_of_itself(tmp_path: Path) -> None:
    folder = make("adapter", tmp_path / "adapter")
    edited(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    for load in (AutoConfig.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(CheckpointError, match="as its model, which is the folder of an adapter too"):
            load(folder)
    with pytest.raises(CheckpointError, match="malformed safetensors header"):
        AutoModelForCausalLM.from_pretrained(folder)
    edited(folder / "adapter_config.json", base_model_name_or_path=5)
    for load in (AutoConfig.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(CheckpointError, match="base_model_name_or_path is 5; it must be a text"):
            load(folder)
