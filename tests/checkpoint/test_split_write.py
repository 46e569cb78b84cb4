"""GGUF written in parts: each is a file that the gguf package reads, together they are the model."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert, verify
from llama2.errors import CheckpointError

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")


def test_parts(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    model.save_pretrained(tmp_path / "hf")
    made = convert(tmp_path / "hf", tmp_path / "x.gguf", ConversionSettings("gguf", "float32", split_size=40_000))
    parts = sorted(tmp_path.glob("*.gguf"))
    count = len(parts)
    assert count > 2 and made.path == parts[0] == tmp_path / f"x-00001-of-{count:05d}.gguf"
    names: list[str] = []
    for i, part in enumerate(parts):
        reader = gguf.GGUFReader(part)
        keys = {key: field.parts[-1][0] for key, field in reader.fields.items() if key.startswith("split.")}
        kinds = {key: reader.fields[key].types[-1].name for key in keys}
        total = len(model.state_dict())
        assert keys == {"split.no": i, "split.count": count, "split.tensors.count": total}
        assert kinds == {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}
        assert ("llama.block_count" in reader.fields) == (i == 0)
        names += [tensor.name for tensor in reader.tensors]
        assert sum(tensor.n_bytes for tensor in reader.tensors) <= 40_000 or len(reader.tensors) == 1
    assert len(set(names)) == len(names) == len(model.state_dict())
    ids = tiny_ids(1, 8)
    with torch.inference_mode():
        want = model.eval()(ids).logits
        for name in (parts[0], parts[-1], tmp_path / "x.gguf"):
            assert torch.equal(LlamaForCausalLM.from_pretrained(name)(ids).logits, want)
    assert len(verify(parts[0])) == count
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(tmp_path / "hf", tmp_path / "x.gguf", ConversionSettings("gguf", "float32", split_size=40_000))
