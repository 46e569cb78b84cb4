"""Formats that are only read: every weight to the bit, on the engine, converted, saved and loaded again."""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint.packers import FORMATS, SIZES, write
from tiny import tiny_ids, tiny_model

from llama2 import LlamaForCausalLM, cpu
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.quantized import packed_layers
from llama2.cli.inspect import main_type, read

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer", "ignore:.*no native kernel")
IDS = tiny_ids(1, 12)
# Relative error of logits in the engine's fast mode: activations of 8 bits, or weights rounded to bfloat16.
FAST = 0.1


def plain(weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The model of these weights in float32, its other tensors those of the packed folder."""
    model = tiny_model(torch.float32, **SIZES).eval()
    for path, weight in weights.items():
        model.get_submodule(path).weight.data = weight.float().clone()
    return model


def torch_logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_every_weight_and_every_path(kind: str, tmp_path: Path) -> None:
    weights = write(kind, tmp_path / "packed")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    layers = packed_layers(model)
    linears = {path for path in weights if path != "model.embed_tokens"}
    assert set(layers) == linears
    for path in linears:
        assert torch.equal(layers[path].dequantize(), weights[path].float()), path
    want = torch_logits(plain(weights))
    torch.testing.assert_close(torch_logits(model), want, rtol=1e-4, atol=1e-5)

    convert(tmp_path / "packed", tmp_path / "floats", ConversionSettings(dtype="float32"))
    floats = LlamaForCausalLM.from_pretrained(tmp_path / "floats")
    assert not packed_layers(floats)
    for path, weight in weights.items():
        assert torch.equal(floats.get_submodule(path).weight, weight.float()), path
    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(torch_logits(again), torch_logits(model)) and set(packed_layers(again)) == linears

    found = read(str(tmp_path / "packed"))
    assert found.runs and found.countable and found.quantisation and main_type(found) != "F32", found.types
    assert found.parameters == tiny_model(torch.float32, **SIZES).num_parameters()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
def test_the_engine(kind: str, tmp_path: Path) -> None:
    weights = write(kind, tmp_path / "packed")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    want = torch_logits(plain(weights))[0, -1]
    engine = cpu.CpuWeights.from_module(model, 2)
    for precision, bound in (("exact", 1e-5 if _exact(model) else 0.01), ("fast", FAST)):
        sequence = cpu.PagedCache(engine, 64, "float32").sequence()
        got = cpu.CpuRunner(engine, precision).feed(sequence, IDS[0].numpy())
        assert (torch.from_numpy(got) - want).abs().max() <= bound * want.abs().max(), precision


def _exact(model: LlamaForCausalLM) -> bool:
    """Whether every linear has a layout that holds it; HQQ's steps in float16 round more than the engine does."""
    layers = packed_layers(model).values()
    return all(
        layer.packable() is not None and getattr(layer.form(), "arithmetic", torch.float32) == torch.float32
        for layer in layers
    )


def test_gguf_of_a_packed_folder(tmp_path: Path) -> None:
    weights = write("awq-gemm", tmp_path / "packed")
    convert(tmp_path / "packed", tmp_path / "x.gguf", ConversionSettings("gguf", "float32"))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "x.gguf", dequantize=True, dtype=torch.float32)
    for path, weight in weights.items():
        assert torch.equal(model.get_submodule(path).weight, weight), path


def test_packers_cover_every_reader(tmp_path: Path) -> None:
    from llama2.quantization.formats import FORMATS as ROWS
    from llama2.quantization.formats import settings_in

    read_only = {row.id for row in ROWS if row.reader}
    made = set()
    for kind, (settings, _) in FORMATS.items():
        fields = {"quantization": settings} if kind.startswith("mlx") else {"quantization_config": settings}
        found = settings_in(fields)
        assert found is not None
        made.add(found.format_id)
    assert made == read_only
    shutil.rmtree(tmp_path)
