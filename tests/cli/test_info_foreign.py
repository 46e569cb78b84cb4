"""info of files that are not run here: named, and no size is made up."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conftest import Run
from safetensors.torch import save_file
from tiny import tiny_model

from llama2 import LlamaForCausalLM
from llama2.checkpoint.foreign import described
from llama2.errors import CheckpointError

GGML = struct.pack("<7I", 32000, 4096, 256, 32, 32, 128, 2)


def llama2c(vocab: int, version: int) -> bytes:
    """A model of width 8: 2 layers, 4 heads over 2, feed-forward 24, a context of 16; version 0 with its data."""
    sizes = [8, 24, 2, 4, 2, vocab, 16]
    if version:
        return struct.pack("<4s8iB", b"24ka", version, *sizes[:5], abs(vocab), 16, vocab > 0).ljust(256, b"\0")
    # embedding, twice two norms, q k v o, three of the feed-forward, the last norm, two rotary tables, the head
    floats = (
        abs(vocab) * 8 + 2 * 2 * 8 + 2 * (64 + 32 + 32 + 64) + 2 * 3 * 8 * 24 + 8 + 2 * 16 + (vocab < 0) * -vocab * 8
    )
    return struct.pack("<7i", *sizes) + bytes(4 * floats)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"lmgg" + GGML, ("legacy GGML (ggml)", "32 layers, width 4096, 32 heads")),
        (b"fmgg" + struct.pack("<I", 1) + GGML, ("legacy GGML (ggmf version 1)", "32,000")),
        (b"tjgg" + struct.pack("<I", 3) + GGML, ("legacy GGML (ggjt version 3)",)),
        (llama2c(-40, 0), ("llama2.c version 0", "2 layers, width 8, feed-forward 24, 4 heads (2 for", "40, separate")),
        (llama2c(40, 0), ("llama2.c version 0", "40, tied head", "16 tokens")),
        (llama2c(40, 1), ("llama2.c version 1", "40, tied head")),
        (llama2c(-40, 2), ("llama2.c version 2", "40, separate head")),
    ],
)
def test_files_of_other_programs(run: Run, tmp_path: Path, content: bytes, said: tuple[str, ...]) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(content)
    code, out, err = run("info", file)
    assert code == 0 and all(part in out for part in said), (out, err)
    shown = json.loads(run("info", file, "--json")[1])
    assert shown["format"] == said[0] and "parameters" not in shown
    code, _, err = run("generate", "-m", file, "Hi")
    assert code == 2
    if said[0] == "llama2.c version 0":  # whole
        assert LlamaForCausalLM.from_pretrained(file).config.hidden_size == 8
        return
    with pytest.raises(CheckpointError, match="truncated|announces|do not divide"):
        LlamaForCausalLM.from_pretrained(file)


def test_other_bytes_are_not_taken_for_llama2c(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(llama2c(40, 0) + b"\0\0\0\0")
    assert run("info", file)[0] == 2


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "vptq": ({"quant_method": "vptq"}, "VPTQ"),
    "aqlm": ({"quant_method": "aqlm", "nbits_per_codebook": 16}, "AQLM"),
    "exl3": ({"quant_method": "exl3", "version": "0.0.1", "bits": 4.65}, "EXL3, 4.65 bits"),
    "novel": ({"quant_method": "novel-method", "bits": 3}, "novel-method, 3 bits"),
    "nameless": ({"some": 1}, "of a method that config.json does not name"),
}


def quantised(folder: Path, file: str = "model.safetensors", **fields: Any) -> None:
    """A folder with one packed linear, and settings in config.json."""
    model = tiny_model(torch.float16)
    model.save_pretrained(folder)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "up_proj" not in name}
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(64, 14, dtype=torch.int32)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("kind", CONFIGS)
def test_any_quantisation_is_named_and_not_counted(run: Run, tmp_path: Path, kind: str) -> None:
    settings, name = CONFIGS[kind]
    file = "output-00001-of-00001.safetensors" if kind == "exl3" else "model.safetensors"
    quantised(tmp_path, file, quantization_config=settings)
    code, out, err = run("info", tmp_path)
    assert code == 0 and name in out and ": not run here" in out, (out, err)
    wanted = tiny_model().config.num_parameters
    assert f"{wanted:,} by the configuration" in out
    shown = json.loads(run("info", tmp_path, "--json")[1])
    assert shown["quantisation"].startswith(name) and shown["parameters"] == wanted


def test_mlx(run: Run, tmp_path: Path) -> None:
    quantised(tmp_path, quantization={"group_size": 64, "bits": 4})
    out = run("info", tmp_path)[1]
    assert "MLX, 4 bits, groups of 64" in out and "not run here" not in out
    with pytest.raises(CheckpointError, match=r"up_proj: 64 inputs|weight is missing"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_modelopt_says_it_in_a_file_of_its_own(run: Run, tmp_path: Path) -> None:
    quantised(tmp_path)
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "W4A8_AWQ", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    assert "modelopt, groups of 16, format W4A8_AWQ: not run here" in run("info", tmp_path)[1]


def test_what_is_run_is_named_too() -> None:
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert described({"quantization_config": gptq}) == "GPTQ, 4 bits, groups of 128"
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert described({"quantization_config": nf4}) == "bitsandbytes, NF4"
    assert described({}) is None


def test_sizes_are_not_made_up(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub repository's config.json without sizes: the defaults of the class are not this model's."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "models--who--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("a" * 40)
    folder = place / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "vocab_size": 97, "num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = run("info", "who/tiny")
    assert code == 2 and "does not say hidden_size, intermediate_size, num_attention_heads" in err, out
    (folder / "config.json").write_text(
        json.dumps({**config, "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4,
                    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}})
    )  # fmt: skip
    code, out, err = run("info", "who/tiny")
    assert code == 0 and "no weights were fetched" in out and "AWQ, 4 bits, groups of 128" in out, err


def test_an_adapter(run: Run, tmp_path: Path) -> None:
    from checkpoint.adapter_files import tensors_for, write_adapter

    model = tiny_model(torch.float32)
    model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "adapter", tensors_for(model.config, ("q_proj",)),
                  base_model_name_or_path=str(tmp_path / "base"))  # fmt: skip
    code, out, err = run("info", tmp_path / "adapter")
    assert code == 0 and f"LORA adapter of {tmp_path / 'base'}, r 4, alpha 8" in out, err
