"""Converted folders in transformers 4.46, which cannot live beside 5.x: another Python runs it (make parity-446)."""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tiny import VARIANTS, tiny_ids, tiny_model

from llama2 import AutoTokenizer, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
INTERPRETER = os.environ.get("LLAMA2_TRANSFORMERS_446", "")
# How each variant comes to its folder; what Meta's format cannot say goes through GGUF, "dynamic" through neither.
# 4.46 ignores YaRN's original_max_position_embeddings, so that variant cannot be equal there.
ROUTES = {
    **dict.fromkeys(("mha", "gqa", "mqa", "tied"), "meta"),
    **dict.fromkeys(("head_dim", "biases", "linear"), "gguf"),
    **dict.fromkeys(("dynamic", "llama3"), None),
}
IDS = tiny_ids(2, 40)
TEXTS = ["Hello world,  how are\n you é 🦙", " leading", "</s> in text"]


def ask(folders: Mapping[str, Path], work: Path) -> Mapping[str, Any]:
    """What the other interpreter makes of the folders: see by_transformers.py."""
    if not INTERPRETER:
        pytest.skip("needs LLAMA2_TRANSFORMERS_446, a Python with transformers 4.46; `make parity-446` makes one")
    job = {"ids": IDS.tolist(), "folders": {name: str(path) for name, path in folders.items()}, "texts": TEXTS}
    (work / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("by_transformers.py")
    ran = subprocess.run(
        [INTERPRETER, str(script), str(work / "job.json"), str(work / "result.npz")], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = dict(numpy.load(work / "result.npz"))
    assert str(found["version"]).startswith("4.46.")
    return found


def compare(folder: Path, theirs: Any) -> None:
    """Our logits of the folder beside theirs."""
    with torch.no_grad():
        ours = LlamaForCausalLM.from_pretrained(folder)(IDS).logits
    assert ours.abs().max() > 1
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in shards for each variant, the last of a chain of conversions."""
    root, made = tmp_path_factory.mktemp("converted"), {}
    for name, route in ROUTES.items():
        tiny_model(torch.float32, **VARIANTS[name]).save_pretrained(root / f"{name}.hf")
        source = root / f"{name}.hf"
        if route is not None:
            between = root / (f"{name}.gguf" if route == "gguf" else f"{name}.meta")
            source = convert(source, between, ConversionSettings(route, shards=2 if route == "meta" else 1)).path
        made[name] = convert(source, root / name, ConversionSettings(shard_size="60KB")).path
        assert len(list(made[name].glob("*.safetensors"))) > 1
    return made


@pytest.fixture(scope="module")
def theirs(folders: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The answers for all of them, in one process."""
    return ask(folders, tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("name", ROUTES)
def test_logits(folders: Mapping[str, Path], theirs: Mapping[str, Any], name: str) -> None:
    compare(folders[name], theirs[name])


def test_meta_files_with_their_tokenizer(tmp_path: Path, tokenizer_model: Path) -> None:
    tiny_model(torch.float32, vocab_size=32000).save_pretrained(tmp_path / "hf")
    shutil.copy(tokenizer_model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", ConversionSettings("meta", shards=2))
    folder = convert(tmp_path / "meta", tmp_path / "back", ConversionSettings()).path
    found, tokenizer = ask({"x": folder}, tmp_path), AutoTokenizer.from_pretrained(folder)
    compare(folder, found["x"])
    for i, text in enumerate(TEXTS):
        assert found[f"x/{i}"].tolist() == tokenizer(text)["input_ids"], text
