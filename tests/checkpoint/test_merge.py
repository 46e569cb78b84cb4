"""merge-adapter: merged = attached, in memory that does not grow, and nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint.adapter_files import tensors_for, write_adapter
from tiny import tiny_ids, tiny_model
from tolerance import FLOAT32

import llama2.checkpoint as checkpoint
from llama2 import AutoModelForCausalLM, BitsAndBytesConfig, CheckpointError, cpu
from llama2.checkpoint import convert as engine
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.merge import MergedCheckpoint, merge_into
from llama2.checkpoint.packing_note import write_packing
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.errors import MismatchError
from llama2.quantize.job import quantize
from llama2.runners.native import NativeModel

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")
PARTS = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model(torch.float32, intermediate_size=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    config = checkpoint.open(base).config
    return write_adapter(tmp_path / "adapter", tensors_for(config, PARTS), target_modules=list(PARTS))


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model(tiny_ids()).logits
    return found


def test_merged_weights_are_the_sum(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out", ConversionSettings(adapter=str(adapter)))
    before, after = checkpoint.open(base), checkpoint.open(tmp_path / "out")
    modules = read_adapter(adapter, before.config).modules
    assert set(before.tensors) == set(after.tensors)
    for name in before.tensors:
        low = modules.get(name.removesuffix(".weight"))
        if low is None:
            assert torch.equal(after.read(name), before.read(name))
        else:
            want = before.read(name).double() + low.scale * low.b.double() @ low.a.double()
            torch.testing.assert_close(after.read(name).double(), want, rtol=0, atol=1e-6)
            assert (after.read(name) - before.read(name)).abs().max() > 0.1


@pytest.mark.skipif(not cpu.available(), reason="the native module is not built")
@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_merged_equals_attached(base: Path, adapter: Path, tmp_path: Path, to: str) -> None:
    target = tmp_path / ("x.gguf" if to == "gguf" else "out")
    convert(base, target, ConversionSettings(to=to, adapter=str(adapter)))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    attached = NativeModel.from_module(model)
    attached.load_adapter(adapter)
    run, pages = cpu.CpuRunner(attached.weights, "exact"), cpu.PagedCache(attached.weights, 64, "float32")
    ids = tiny_ids()[0]
    places = torch.arange(len(ids))
    got = torch.from_numpy(run.step(ids, places, pages.view([(pages.sequence(), len(ids))]), places, ["default"]))
    want, plain = logits(target)[0], logits(base)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=FLOAT32 * float(want.abs().max()))
    assert (want - plain).abs().max() > 0.1
    merge_into(model, read_adapter(adapter, model.config))
    with torch.no_grad():
        torch.testing.assert_close(model(tiny_ids()).logits[0], want, rtol=0, atol=1e-4)


def test_blocks_of_rows_equal_the_whole(base: Path, adapter: Path) -> None:
    source = checkpoint.open(base)
    seen = MergedCheckpoint(source, read_adapter(adapter, source.config))
    for name, (shape, _) in seen.tensors.items():
        if len(shape) == 2:
            rows = torch.cat([seen.read_rows(name, i, min(i + 24, shape[0])) for i in range(0, shape[0], 24)])
            torch.testing.assert_close(rows, seen.read(name), rtol=0, atol=1e-6)


def test_a_quantised_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    quantised = tmp_path / "q.gguf"
    convert(base, quantised, ConversionSettings(to="gguf", dtype="q8_0"))
    convert(quantised, tmp_path / "kept.gguf", ConversionSettings(to="gguf", adapter=str(adapter)))
    kinds = {name: stored.type for name, stored in checkpoint.open(tmp_path / "kept.gguf").tensors.items()}
    assert (
        kinds["model.layers.0.mlp.up_proj.weight"] == "BF16" and kinds["model.layers.0.mlp.gate_proj.weight"] == "Q8_0"
    )
    convert(quantised, tmp_path / "out", ConversionSettings(adapter=str(adapter), dtype="float32"))
    convert(base, tmp_path / "want", ConversionSettings(adapter=str(adapter)))
    got, want = checkpoint.open(tmp_path / "out"), checkpoint.open(tmp_path / "want")
    name = "model.layers.0.mlp.up_proj.weight"
    assert got.tensors[name].type == "F32"
    assert 0 < (got.read(name) - want.read(name)).abs().max() < 0.01
    again = tmp_path / "again.gguf"
    convert(quantised, again, ConversionSettings(to="gguf", dtype="q8_0", adapter=str(adapter)))
    before, after = checkpoint.open(quantised), checkpoint.open(again)
    assert (after.read(name) - want.read(name)).abs().max() < 0.05
    untouched = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(after.raw(untouched).rows, before.raw(untouched).rows)


def test_the_folder_of_an_adapter_is_its_model_with_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    """As from_pretrained takes it, convert and quantize do."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    convert(base, tmp_path / "want", ConversionSettings(adapter=str(adapter)))
    convert(adapter, tmp_path / "out", ConversionSettings())
    got, want = (checkpoint.open(tmp_path / name) for name in ("out", "want"))
    assert all(torch.equal(got.read(name), want.read(name)) for name in want.tensors)
    quantize(adapter, tmp_path / "q.gguf", "gguf:q8_0", eval_tokens=0, calibrate=False)
    name = "model.layers.0.mlp.up_proj.weight"
    assert (checkpoint.open(tmp_path / "q.gguf").read(name) - want.read(name)).abs().max() < 0.05


def test_an_adapter_of_packed_weights_is_merged_into_such(base: Path, adapter: Path, tmp_path: Path) -> None:
    """QLoRA: what was measured is the packed base with the adapter; what merging gives is that."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    convert(base, tmp_path / "plain", ConversionSettings(adapter=str(adapter), dtype="float32"))
    write_packing(adapter, nf4.to_dict())
    want = AutoModelForCausalLM.from_pretrained(adapter, dtype="float32")
    want = want(tiny_ids()).logits
    AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4).save_pretrained(tmp_path / "packed")
    for name, source, settings in (
        ("folder", adapter, {}),
        ("both", base, {"adapter": str(adapter)}),
        ("packed", tmp_path / "packed", {"adapter": str(adapter)}),
    ):
        convert(source, tmp_path / f"{name}-out", ConversionSettings(dtype="float32", **settings))
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-out")(tiny_ids()).logits
        assert (found - want).abs().max() < 1e-3 * want.abs().max(), name
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(tiny_ids()).logits
    assert (plain - want).abs().max() > 0.01 * want.abs().max()


def test_a_float_gguf_base_keeps_its_type(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "half.gguf", ConversionSettings(to="gguf", dtype="float16"))
    convert(tmp_path / "half.gguf", tmp_path / "out.gguf", ConversionSettings(to="gguf", adapter=str(adapter)))
    source, found = checkpoint.open(tmp_path / "half.gguf"), checkpoint.open(tmp_path / "out.gguf")
    want = MergedCheckpoint(source, read_adapter(adapter, source.config))
    for name, (_, kind) in source.tensors.items():
        assert found.tensors[name].type == kind
        torch.testing.assert_close(found.read(name), want.read(name), rtol=0, atol=2e-3)


def test_pooling_comes_after_merging(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "out", ConversionSettings(adapter=str(adapter), kv_heads=1))
    source = checkpoint.open(base)
    seen = MergedCheckpoint(source, read_adapter(adapter, source.config))
    name = "model.layers.1.self_attn.k_proj.weight"
    want = seen.read(name).unflatten(0, (2, -1)).mean(0)
    torch.testing.assert_close(checkpoint.open(tmp_path / "out").read(name), want, rtol=0, atol=1e-6)


def test_a_wrong_adapter_writes_nothing(base: Path, tmp_path: Path) -> None:
    other = checkpoint.open(base).config
    other.num_hidden_layers = 3
    wrong = write_adapter(tmp_path / "wrong", tensors_for(other, ("q_proj",)), target_modules=["q_proj"])
    with pytest.raises(MismatchError, match="layers.2"):
        convert(base, tmp_path / "out", ConversionSettings(adapter=str(wrong)))
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing_to_be_taken_for_whole(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SYNC_BYTES", 1 << 14)
    steps: list[str] = []

    def stop(done: int, total: int, name: str) -> None:
        steps.append(name)
        if len(steps) == 9:
            raise KeyboardInterrupt

    options, target = ConversionSettings(adapter=str(adapter)), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(base, target, options, stop)
    assert not [file for file in target.iterdir() if not file.name.startswith(".")]
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    with pytest.raises(CheckpointError, match="another source or with other options"):
        convert(base, target, options)
    with pytest.raises(CheckpointError, match="another source or with other options"):
        convert(base, target, ConversionSettings())


def test_an_interrupted_merge_goes_on(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "SYNC_BYTES", 1 << 14)
    calls: list[str] = []

    def stop(done: int, total: int, name: str) -> None:
        calls.append(name)
        if len(calls) == 9:
            raise KeyboardInterrupt

    options = ConversionSettings(adapter=str(adapter))
    with pytest.raises(KeyboardInterrupt):
        convert(base, tmp_path / "out", options, stop)
    assert convert(base, tmp_path / "out", options).resumed_bytes > 0
    convert(base, tmp_path / "want", options)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "want" / name).read_bytes()
