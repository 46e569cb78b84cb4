"""GGUF's codebook types in whole files: the engine, from_pretrained, convert, info; IQ4 as it is written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint.gguf_package import write_blocks
from tiny import tiny_ids

from llama2 import LlamaForCausalLM, cpu
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.quantized import packed_layers
from llama2.cli.inspect import read
from llama2.quantization.codebook_blocks import CODED
from llama2.quantization.codebook_encode import IQ4
from llama2.quantization.ggml import TYPES, block_type, dequantize
from llama2.quantization.ggml_encode import quantize

gguf = pytest.importorskip("gguf")
IDS = tiny_ids(1, 12)
pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer", "ignore:.*unpacked to")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linears take the types in turn."""
    return write_blocks(tmp_path_factory.mktemp("blocks") / "x.gguf", tuple(CODED))


def plain(file: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(file, dequantize=True, dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found[0, -1]


@pytest.mark.parametrize("name", CODED)
def test_bits_are_those_of_the_gguf_package(name: str) -> None:
    block, kind = block_type(name), gguf.GGMLQuantizationType[name]
    raw = np.random.default_rng(0).integers(0, 256, (300, block.bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, kind)
    for found in (dequantize(torch.from_numpy(raw), name), block.decode(torch.from_numpy(raw))):
        np.testing.assert_array_equal(found.numpy(), want)


@pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
def test_the_engine_without_torch_and_a_torch_model(file: Path) -> None:
    want = plain(file)
    model = LlamaForCausalLM.from_pretrained(file)
    kinds = {layer.kind for layer in packed_layers(model).values()}
    assert kinds == set(CODED)
    for weights in (cpu.CpuWeights.from_gguf(GgufFile(file), 2), cpu.CpuWeights.from_module(model, 2)):
        for precision, bound in (("exact", 1e-5), ("fast", 0.05)):
            sequence = cpu.PagedCache(weights, 64, "float32").sequence()
            got = cpu.CpuRunner(weights, precision).feed(sequence, IDS[0].numpy())
            assert (torch.from_numpy(got) - want).abs().max() <= bound * want.abs().max(), precision
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits[0, -1], want, rtol=1e-5, atol=1e-6)


def test_packed_beside_the_file(file: Path, tmp_path: Path) -> None:
    if not cpu.available():
        pytest.skip("the native engine is not built")
    copy = tmp_path / "x.gguf"
    copy.write_bytes(file.read_bytes())
    cpu.write_packed(GgufFile(copy))
    packed = cpu.find_packed(GgufFile(copy))
    assert packed is not None
    one, two = cpu.CpuWeights.from_gguf(GgufFile(copy), 2, packed), cpu.CpuWeights.from_gguf(GgufFile(copy), 2)
    logits = [
        cpu.CpuRunner(w, "fast").feed(cpu.PagedCache(w, 64, "float32").sequence(), IDS[0].numpy()) for w in (one, two)
    ]
    np.testing.assert_array_equal(*logits)


def test_kept_and_unpacked_by_convert(file: Path, tmp_path: Path) -> None:
    convert(file, tmp_path / "kept.gguf", ConversionSettings("gguf"))
    assert torch.equal(plain(tmp_path / "kept.gguf"), plain(file))
    convert(file, tmp_path / "hf", ConversionSettings(dtype="float32"))
    model = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits[0, -1], plain(file))
    assert set(CODED) <= set(read(str(file)).types)


@pytest.mark.parametrize("name", IQ4)
def test_iq4_is_written_better_than_q4_0(name: str) -> None:
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    x[:3] = 0

    def error(rows: torch.Tensor, kind: str) -> float:
        return (dequantize(rows, kind) - x).square().sum().item()

    rows = quantize(x, name)
    assert rows.shape == (64, TYPES[name].row_bytes(1024)) and not dequantize(rows, name)[:3].any()
    assert error(rows, name) < 0.8 * error(quantize(x, "Q4_0"), "Q4_0")
    assert error(rows, name) <= 1.01 * error(_by_package(x, name), name)
    weights = torch.ones(1024)
    weights[::2] = 100

    def weighted(rows: torch.Tensor) -> float:
        return ((dequantize(rows, name) - x).square() * weights).sum().item()

    assert weighted(quantize(x, name, weights)) < 0.97 * weighted(rows)


def _by_package(x: torch.Tensor, name: str) -> torch.Tensor:
    """The gguf package's own encoder where it has one, else ours of plain rounding by the largest weight."""
    runs = x.reshape(-1, 32)
    scale = runs.gather(1, runs.abs().argmax(1, keepdim=True)) / -127
    table = torch.tensor(CODED["IQ4_NL"][0])
    safe = torch.where(scale == 0, 1.0, scale)
    codes = (runs / safe)[..., None].sub(table).abs().argmin(-1)
    if name == "IQ4_XS":
        return quantize(x, name)
    halves = (codes[:, :16] | codes[:, 16:] << 4).to(torch.uint8)
    return torch.cat((scale.half().view(torch.uint8), halves), 1).view(len(x), -1)


def test_a_file_of_iq4(tmp_path: Path) -> None:
    from tiny import tiny_model

    model = tiny_model(
        torch.float32, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2
    )
    model.save_pretrained(tmp_path / "hf")
    for kind in IQ4:
        convert(tmp_path / "hf", tmp_path / f"{kind}.gguf", ConversionSettings("gguf", kind.lower()))
        reader = gguf.GGUFReader(tmp_path / f"{kind}.gguf")
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert types["blk.0.attn_q.weight"] == kind and types["output.weight"] == "Q6_K"
        assert reader.fields["general.file_type"].parts[-1][0] == {"IQ4_NL": 25, "IQ4_XS": 30}[kind]
        LlamaForCausalLM.from_pretrained(tmp_path / f"{kind}.gguf")
