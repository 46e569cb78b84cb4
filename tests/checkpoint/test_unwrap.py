"""State dicts of training programs: dicts around them, and names of the wrappers that the model was in."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_ids, tiny_model

from llama2 import LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.unwrap import plain_names
from llama2.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
PREFIXES = ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "_forward_module.", "model."]


def folder_of(path: Path) -> Any:
    model = tiny_model(torch.float32)
    model.save_pretrained(path)
    (path / "model.safetensors").unlink()
    return model


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
def test_prefixes_are_taken_off_and_told(tmp_path: Path, prefix: str, safetensors: bool) -> None:
    model = folder_of(tmp_path / "source")
    state = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
    if safetensors:
        save_file(state, tmp_path / "source/model.safetensors", {"format": "pt"})
    else:
        torch.save(state, tmp_path / "source/pytorch_model.bin")
    with pytest.warns(UserWarning, match=f"as a wrapped model does .{prefix}(model|lm_head)"):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "source")
    assert torch.equal(loaded(tiny_ids()).logits, model(tiny_ids()).logits)
    with pytest.warns(UserWarning, match="as a wrapped model does"):
        convert(tmp_path / "source", tmp_path / "x.gguf", ConversionSettings("gguf"))
    assert torch.equal(
        LlamaForCausalLM.from_pretrained(tmp_path / "x.gguf")(tiny_ids()).logits, loaded(tiny_ids()).logits
    )


@pytest.mark.parametrize("keys", [("model",), ("state_dict",), ("module",), ("model_state_dict",), ("state", "model")])
def test_dicts_around_the_weights(tmp_path: Path, keys: tuple[str, ...]) -> None:
    model = folder_of(tmp_path)
    content: Any = model.state_dict()
    for key in reversed(keys):
        content = {"step": 5, key: content, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(content, tmp_path / "pytorch_model.bin")
    if keys == ("state", "model"):  # an outer name that nothing uses
        with pytest.raises(CheckpointError, match="not a dict of tensors"):
            LlamaForCausalLM.from_pretrained(tmp_path)
        return
    with pytest.warns(UserWarning, match=f"holds the weights in {keys[0]}"):
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tiny_ids()).logits, model(tiny_ids()).logits)


def test_metas_files_too(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", ConversionSettings("meta"))
    file = tmp_path / "meta/consolidated.00.pth"
    state = torch.load(file)
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, file)
    with pytest.warns(UserWarning) as told:
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "meta")
    assert {"holds the weights in model", "as a wrapped model does"} <= {
        part for part in ("holds the weights in model", "as a wrapped model does")
        for warning in told if part in str(warning.message)
    }  # fmt: skip
    assert torch.equal(loaded(tiny_ids()).logits, model(tiny_ids()).logits)


def test_what_is_no_wrapper_stays() -> None:
    assert plain_names(["model.norm.weight", "lm_head.weight"]) == {
        "model.norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
    assert list(plain_names(["model._orig_mod.norm.weight"])) == ["model.norm.weight"]
    assert list(plain_names(["module.a", "b"])) == ["module.a", "b"]
