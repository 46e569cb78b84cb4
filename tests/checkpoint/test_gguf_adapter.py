"""LoRA adapters of llama.cpp: files written by hand are read, put on either kind of base, made of peft's folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.adapter_files import tensors_for, write_adapter
from checkpoint.gguf_bytes import gguf, interleave, quantize
from checkpoint.gguf_package import gguf as package
from safetensors.torch import load_file
from tiny import tiny_config, tiny_ids, tiny_model
from tolerance import FLOAT32

from llama2 import CheckpointError, InputError, LlamaForCausalLM, cpu
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.convert_adapter import convert_adapter, named_base
from llama2.checkpoint.merge import merge_into
from llama2.checkpoint.peft import load_adapter
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.errors import MismatchError
from llama2.runners.native import NativeModel

MODEL = tiny_config()
THEIRS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
          "up_proj": "ffn_up", "down_proj": "ffn_down", "lm_head": "output"}  # fmt: skip
KEYS: dict[str, Any] = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
                        "adapter.lora.alpha": 16.0}  # fmt: skip
ALL = tuple(THEIRS)[:7]
HEADS = {"attn_q": MODEL.num_attention_heads, "attn_k": MODEL.num_key_value_heads}
IDS = tiny_ids(2, 9)
pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")


def theirs(tensors: dict[str, torch.Tensor], kind: str = "F32") -> dict[str, tuple[torch.Tensor, str]]:
    """llama.cpp's names and order of rows for tensors under peft's names."""
    made = {}
    for name, tensor in tensors.items():
        *path, part, half, _ = name.removeprefix("base_model.model.").split(".")
        short = THEIRS[part]
        if half == "lora_B" and short in HEADS:
            tensor = interleave(tensor, HEADS[short])
        stem = f"blk.{path[2]}.{short}" if path else short
        made[f"{stem}.weight.lora_{half[-1].lower()}"] = (tensor, kind)
    return made


def written(path: Path, tensors: dict[str, tuple[torch.Tensor, str]], **changes: Any) -> Path:
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    path.write_bytes(gguf({key: value for key, value in (KEYS | keys).items() if value is not None}, tensors))
    return path


def delta(tensors: dict[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    stem = f"base_model.model.{module}.lora_"
    return scale * (tensors[f"{stem}B.weight"].double() @ tensors[f"{stem}A.weight"].double())


def added(adapter: Any, module: str) -> torch.Tensor:
    low = adapter.modules[module]
    return low.scale * (low.b.double() @ low.a.double())


def test_values_by_hand(tmp_path: Path) -> None:
    """q of one head of width 4: the file's rows 0 1 2 3 are the halves' 0 2 1 3; alpha 6 over rank 2 is 3."""
    config = tiny_config(hidden_size=4, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    b = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 5]])
    a = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 2]])
    file = written(
        tmp_path / "a.gguf",
        {"blk.0.attn_q.weight.lora_a": (a, "F32"), "blk.0.attn_q.weight.lora_b": (b, "F32")},
        **{"adapter.lora.alpha": 6.0},
    )
    low = read_adapter(file, config).modules["model.layers.0.self_attn.q_proj"]
    assert low.scale == 3.0 and low.b.tolist() == [[1, 0], [3, 0], [2, 0], [4, 5]] and torch.equal(low.a, a)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_every_linear_and_the_head(tmp_path: Path, kind: str) -> None:
    config = tiny_config(vocab_size=96)
    tensors = tensors_for(config, ALL, rank=32)  # Q8_0 blocks are 32 long
    draw = torch.Generator().manual_seed(9)
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(32, 64, generator=draw)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(96, 32, generator=draw)
    fits = kind != "Q8_0" or config.intermediate_size % 32 == 0
    chosen = tensors if fits else {name: tensor for name, tensor in tensors.items() if "down_proj" not in name}
    file = written(tmp_path / "a.gguf", theirs(chosen, kind))
    adapter = read_adapter(file, config)
    assert len(adapter.modules) == len(chosen) // 2
    stored = {name: _as_stored(tensor, kind) for name, tensor in chosen.items()}
    for module in adapter.modules:
        low, stem = adapter.modules[module], f"base_model.model.{module}.lora_"
        assert torch.equal(low.a.float(), stored[f"{stem}A.weight"]), module
        assert torch.equal(low.b.float(), stored[f"{stem}B.weight"]) and low.scale == 0.5, module


def _as_stored(tensor: torch.Tensor, kind: str) -> torch.Tensor:
    if kind != "Q8_0":
        return tensor if kind == "F32" else tensor.half().float()
    raw = np.frombuffer(quantize(tensor, kind), np.uint8).reshape(len(tensor), -1)
    return torch.from_numpy(package.quants.dequantize(raw, package.GGMLQuantizationType.Q8_0))


def test_an_embedding_is_looked_up(tmp_path: Path) -> None:
    """llama.cpp takes rows of A (V, r) by token and multiplies them with B (D, r)."""
    a, b = torch.randn(MODEL.vocab_size, 4), torch.randn(64, 4)
    pair = {"token_embd.weight.lora_a": (a, "F32"), "token_embd.weight.lora_b": (b, "F32")}
    adapter = read_adapter(written(tmp_path / "a.gguf", pair), MODEL)
    assert torch.equal(added(adapter, "model.embed_tokens"), 4.0 * a.double() @ b.double().T)
    assert not adapter.layered


@pytest.mark.parametrize("alpha, scale", [(None, 1.0), (0.0, 1.0), (8.0, 2.0), (-2.0, -0.5)])
def test_alpha(tmp_path: Path, alpha: float | None, scale: float) -> None:
    file = written(tmp_path / "a.gguf", theirs(tensors_for(MODEL, ("v_proj",))), **{"adapter.lora.alpha": alpha})
    assert {low.scale for low in read_adapter(file, MODEL).modules.values()} == {scale}


def test_ranks_of_their_own(tmp_path: Path) -> None:
    """convert_lora_to_gguf keeps a rank_pattern by the shapes alone."""
    tensors = tensors_for(MODEL, ("q_proj",), 4) | tensors_for(MODEL, ("v_proj",), 2)
    adapter = read_adapter(written(tmp_path / "a.gguf", theirs(tensors)), MODEL)
    assert {name[-6:]: low.scale for name, low in adapter.modules.items()} == {"q_proj": 4.0, "v_proj": 8.0}


def test_on_a_folder_and_on_a_gguf_file(tmp_path: Path) -> None:
    """The same logits as W + scale * B A: beside the weights in torch and on the engine, and merged."""
    model = tiny_model(torch.float32)
    tensors = tensors_for(MODEL, ALL)
    file = written(tmp_path / "a.gguf", theirs(tensors))
    model.save_pretrained(tmp_path / "base")
    want = tiny_model(torch.float32)
    with torch.no_grad():
        for module in read_adapter(file, MODEL).modules:
            weight = want.get_submodule(module).weight
            weight.copy_(weight.double() + delta(tensors, module, 4.0))
        wanted = want(IDS).logits
    load_adapter(model, file)
    merged = tiny_model(torch.float32)
    merge_into(merged, read_adapter(file, MODEL))
    convert(tmp_path / "base", tmp_path / "base.gguf", ConversionSettings(to="gguf"))
    convert(tmp_path / "base.gguf", tmp_path / "merged", ConversionSettings(to="hf", adapter=str(file)))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        for found in (model(IDS).logits, merged(IDS).logits, loaded(IDS).logits):
            torch.testing.assert_close(found, wanted, rtol=0, atol=FLOAT32 * float(wanted.abs().max()))
    by_method = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    by_method.load_adapter(str(file))
    with torch.no_grad():
        torch.testing.assert_close(by_method(IDS).logits, wanted, rtol=0, atol=FLOAT32 * float(wanted.abs().max()))
    if cpu.available():  # bit for bit what peft's folder does there
        folder, answers = write_adapter(tmp_path / "p", tensors, target_modules=list(ALL), lora_alpha=16), []
        for adapter in (None, file, folder):
            native = NativeModel.from_gguf(tmp_path / "base.gguf")
            if adapter is not None:
                native.load_adapter(adapter)
            told = native.generate(IDS[:1], max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
            answers.append(told.logits[0])
        assert torch.equal(answers[1], answers[2]) and not torch.equal(answers[0], answers[1])


def _renamed(name: str, to: str) -> dict[str, tuple[torch.Tensor, str]]:
    return {key.replace(name, to): value for key, value in theirs(tensors_for(MODEL, ("q_proj", "v_proj"))).items()}


@pytest.mark.parametrize(
    "tensors, changes, kind, said",
    [
        (theirs(tensors_for(tiny_config(num_hidden_layers=3), ("v_proj",))), {}, MismatchError,
         "layers.2.self_attn.v_proj.*no linear of a layer of this 2-layer model"),
        (theirs(tensors_for(tiny_config(hidden_size=96, num_attention_heads=6), ("v_proj",))), {}, MismatchError,
         r"lora_A of .*v_proj has shape \(4, 96\).*adapter of another model"),
        (_renamed("attn_v", "attn_qkv"), {}, MismatchError, "attn_qkv.weight.lora_a', which is no part of an adapter"),
        (_renamed(".lora_b", ".lora_c"), {}, MismatchError, "lora_c', which is no part"),
        (_renamed("blk.1.attn_v.weight.lora_b", "blk.0.attn_k.weight.lora_b"), {}, CheckpointError,
         "without the lora_. of its pair"),
        ({"blk.0.attn_v.weight.lora_a": (torch.zeros(3), "F32")}, {}, MismatchError, "a matrix is needed"),
        ({}, {}, CheckpointError, "holds no tensors"),
        (_renamed("", ""), {"general.type": "model"}, CheckpointError, "file of a model, not an adapter"),
        (_renamed("", ""), {"general.type": None}, CheckpointError, "file of a model, not an adapter"),
        (_renamed("", ""), {"adapter.type": "control_vector"}, CheckpointError, "'control_vector' for 'llama'"),
        (_renamed("", ""), {"general.architecture": "qwen2"}, CheckpointError, "'lora' for 'qwen2'"),
        (_renamed("", ""), {"adapter.lora.alpha": "8"}, CheckpointError, "alpha is '8'; a number"),
        (_renamed("", ""), {"adapter.lora.alpha": float("nan")}, CheckpointError, "alpha is nan"),
        (_renamed("", ""), {"adapter.alora.invocation_tokens": [1, 2]}, CheckpointError, "aLoRA"),
    ],
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, tensors: dict[str, Any], changes: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        read_adapter(written(tmp_path / "a.gguf", tensors, **changes), MODEL)


def test_norms_are_left_out_with_a_warning(tmp_path: Path) -> None:
    tensors = theirs(tensors_for(MODEL, ("v_proj",))) | {"blk.0.attn_norm.weight": (torch.ones(64), "F32")}
    with pytest.warns(UserWarning, match="attn_norm.weight is left out, as llama.cpp does"):
        assert len(read_adapter(written(tmp_path / "a.gguf", tensors), MODEL).modules) == 2


def test_the_wrong_file(tmp_path: Path) -> None:
    file = written(tmp_path / "a.gguf", theirs(tensors_for(MODEL, ("v_proj",))))
    with pytest.raises(CheckpointError, match="general.type is 'adapter', not 'model'; give the model's file with -m"):
        LlamaForCausalLM.from_pretrained(file)
    (tmp_path / "x.bin").write_bytes(b"abcdefgh")
    with pytest.raises(CheckpointError, match="neither a folder nor a GGUF file"):
        read_adapter(tmp_path / "x.bin", MODEL)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="truncated or malformed"):
        read_adapter(file, MODEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_peft_and_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """By the gguf package's own reader the rows are those of llama.cpp; back again every bit is the first folder's."""
    tensors = tensors_for(MODEL, ALL, dtype=dtype)
    folder = write_adapter(tmp_path / "peft", tensors, target_modules=list(ALL), base_model_name_or_path="who/tiny")
    convert_adapter(folder, tmp_path / "a.gguf", MODEL, "who/tiny")
    reader = package.GGUFReader(tmp_path / "a.gguf")
    said = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF")}
    assert said["general.type"] == "adapter" and said["adapter.type"] == "lora" and said["adapter.lora.alpha"] == 8.0
    assert said["general.base_model.0.repo_url"] == "https://huggingface.co/who/tiny"
    assert named_base(tmp_path / "a.gguf") == "https://huggingface.co/who/tiny"
    held, wanted = {t.name: t for t in reader.tensors}, theirs(tensors)
    assert set(held) == set(wanted)
    for name, (tensor, _) in wanted.items():
        assert held[name].data.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes(), name
        assert list(held[name].shape) == list(reversed(tensor.shape))
    convert_adapter(tmp_path / "a.gguf", tmp_path / "back", MODEL, "who/tiny")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert set(back) == set(tensors) and all(torch.equal(back[name], tensors[name]) for name in tensors)
    config = read_adapter(tmp_path / "back", MODEL).config
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 8.0, "who/tiny")
    assert set(config.target_modules) == set(ALL)  # names, not every layer's path


def test_settings_that_a_file_says_by_b(tmp_path: Path) -> None:
    """Several alphas, rsLoRA and an alpha of 0: the file has one alpha, so B takes the rest."""
    tensors = tensors_for(MODEL, ("q_proj",), 4) | tensors_for(MODEL, ("v_proj", "down_proj"), 2)
    folder = write_adapter(tmp_path / "p", tensors, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True,
                           rank_pattern={"v_proj": 2, "down_proj": 2}, alpha_pattern={"down_proj": 0})  # fmt: skip
    before = read_adapter(folder, MODEL)
    convert_adapter(folder, tmp_path / "a.gguf", MODEL)
    after = read_adapter(tmp_path / "a.gguf", MODEL)
    assert set(after.modules) == set(before.modules)
    for module in before.modules:
        torch.testing.assert_close(added(after, module), added(before, module), rtol=1e-6, atol=1e-7)
        assert (added(after, module) == 0).all() == ("down" in module)


def test_part_of_the_layers_and_an_embedding_go_both_ways(tmp_path: Path) -> None:
    tensors = tensors_for(MODEL, ("1.self_attn.q_proj",))
    stem = "base_model.model.model.embed_tokens.lora_embedding_"
    tensors |= {f"{stem}A": torch.randn(4, MODEL.vocab_size), f"{stem}B": torch.randn(64, 4)}
    folder = write_adapter(tmp_path / "p", tensors, target_modules=["1.self_attn.q_proj", "embed_tokens"])
    convert_adapter(folder, tmp_path / "a.gguf", MODEL)
    convert_adapter(tmp_path / "a.gguf", tmp_path / "back", MODEL)
    before, after = read_adapter(folder, MODEL), read_adapter(tmp_path / "back", MODEL)
    assert set(before.modules) == set(after.modules)
    assert all(torch.equal(added(before, name), added(after, name)) for name in before.modules)
    assert torch.equal(load_file(tmp_path / "back" / "adapter_model.safetensors")[f"{stem}A"], tensors[f"{stem}A"])


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    tensors = tensors_for(MODEL, ("q_proj", "v_proj"))
    whole = tensors | {"base_model.model.lm_head.weight": torch.zeros(MODEL.vocab_size, 64)}
    with pytest.raises(CheckpointError, match=r"lm_head.weight of its own, and GGUF holds nothing but A and B"):
        convert_adapter(write_adapter(tmp_path / "p", whole), tmp_path / "a.gguf", MODEL)
    folder = write_adapter(tmp_path / "q", tensors)
    with pytest.raises(InputError, match="becomes a new GGUF file"):
        convert_adapter(folder, tmp_path / "x", MODEL)
    convert_adapter(folder, tmp_path / "a.gguf", MODEL)
    with pytest.raises(InputError, match="exists and is not empty"):
        convert_adapter(folder, tmp_path / "a.gguf", MODEL)
    with pytest.raises(InputError, match="becomes a new folder for peft"):
        convert_adapter(tmp_path / "a.gguf", tmp_path / "b.gguf", MODEL)
