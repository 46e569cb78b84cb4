"""AWQ and compressed-tensors as `llama2 quantize` writes them: loaded again, and by the formats' own rules."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_ids, tiny_model

from llama2 import LlamaForCausalLM
from llama2.checkpoint.quantized import packed_layers
from llama2.errors import InputError
from llama2.quantize.job import quantize

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")


class Words:
    """A tokenizer of whole words."""

    bos_token_id = 1

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1 + hash(word) % 90 for word in text.split()]}

    def encode(self, text: str, **_: object) -> list[int]:
        return self(text)["input_ids"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny_model(torch.float32, **SIZES).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("method", ["awq", "w4a16", "fp8"])
def test_written_and_read(method: str, source: Path, tmp_path: Path) -> None:
    data = [torch.randint(1, 90, (64,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{i}" for i in row) for row in data))
    report = quantize(
        source, tmp_path / "out", method, data=tmp_path / "text.txt", tokenizer=Words(), samples=4, length=32,
        eval_tokens=0,
    )  # fmt: skip
    plain = LlamaForCausalLM.from_pretrained(source)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    layers = packed_layers(model)
    assert len(layers) == 14 and report.method == method
    for path, layer in layers.items():
        weight = plain.get_submodule(path).weight
        error = (layer.dequantize() - weight).norm() / weight.norm()
        assert 0 < error < (0.05 if method == "fp8" else 0.25), (path, error)
    ids = tiny_ids(1, 8)
    with torch.inference_mode():
        assert model(ids).logits.isfinite().all()
    _by_the_formats_own_rule(tmp_path / "out", method, layers)


def _by_the_formats_own_rule(folder: Path, method: str, layers: dict[str, torch.nn.Module]) -> None:
    """Weights computed from the file by what the formats say, not by the readers."""
    held = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    path = "model.layers.0.mlp.up_proj"
    found = layers[path].dequantize()  # type: ignore[operator]
    if method == "fp8":
        assert config["format"] == "float-quantized"
        want = held[f"{path}.weight"].float() * held[f"{path}.weight_scale"]
    elif method == "w4a16":
        group = config["config_groups"]["group_0"]["weights"]["group_size"]
        words = held[f"{path}.weight_packed"]
        q = torch.stack([(words >> 4 * i) & 15 for i in range(8)], 2).flatten(1) - 8
        want = q * held[f"{path}.weight_scale"].float().repeat_interleave(group, 1)
        assert held[f"{path}.weight_shape"].tolist() == [128, 64]
    else:
        assert config["version"] == "gemm" and config["zero_point"] is True
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        q, z = (
            torch.stack(
                [(held[f"{path}.{part}"] >> 4 * int(order.tolist().index(i))) & 15 for i in range(8)], 2
            ).flatten(1)
            for part in ("qweight", "qzeros")
        )
        group = config["group_size"]
        spread = (each.float().repeat_interleave(group, 0) for each in (z, held[f"{path}.scales"]))
        zeros, scales = spread
        want = ((q - zeros) * scales).T
    assert torch.equal(found, want)


def test_refusals(source: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"method": "awq", "bits": 8}, "awq has 4 bits"),
        ({"method": "w4a16", "act_order": True}, "groups of neighbouring columns"),
        ({"method": "awq", "calibrate": False}, "made from calibration data"),
        ({"method": "fp8", "calibrate": True}, "rounded by itself"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(source, tmp_path / "x", **options)  # type: ignore[arg-type]
