"""One coverage check on every path: what loading refuses, converting, quantising and the native engine refuse too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.gguf_bytes import gguf, llama_metadata, llama_tensors
from safetensors.torch import load_file, save_file, save_model
from tiny import VARIANTS, tiny_config, tiny_ids, tiny_model
from tolerance import BFLOAT16

import llama2.checkpoint as checkpoint
from llama2 import LlamaForCausalLM, cpu
from llama2.architecture import parameter_shapes
from llama2.checkpoint.convert import ConversionSettings, convert, verify
from llama2.checkpoint.gguf import GgufFile
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.quantize.job import quantize
from llama2.runners.native import NativeModel, NativeRunner

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")


def native_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits (1, T, V) of a GGUF file on the native engine."""
    tokens, runner = ids.shape[1], NativeRunner(NativeModel.from_gguf(path).weights, "float32")
    return runner.step(ids, torch.arange(tokens)[None], None, None, keep=tokens)


native = pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_the_modules(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    assert parameter_shapes(model.config) == shapes


# -- folders -----------------------------------------------------------------------------------------------------

LAYER = "model.layers.1.self_attn.q_proj.weight"
Change = Callable[[dict[str, torch.Tensor]], None]
FAULTS: dict[str, tuple[Change, str]] = {
    "missing": (lambda t: t.pop(LAYER), rf"missing: {LAYER} \(64, 64\)"),
    "surplus layer": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"].clone()}),
        r"not used: model.layers.2.mlp.up_proj.weight \(112, 64\)",
    ),
    "width": (lambda t: t.update({LAYER: torch.zeros(64, 32)}), rf"shape: {LAYER} is \(64, 32\) in the file"),
    "foreign": (lambda t: t.update({"model.layers.0.extra": torch.ones(3)}), r"not used: model.layers.0.extra \(3,\)"),
    "bias": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        "not used: model.layers.0.self_attn.q_proj.bias.*attention_bias=True",
    ),
    "vocabulary": (
        lambda t: t.update({"lm_head.weight": torch.zeros(98, 64)}),
        r"shape: lm_head.weight is \(98, 64\) in the file, \(97, 64\) here",
    ),
    "head": (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight.*tie_word_embeddings=True"),
}


def damaged(folder: Path, change: Change, **changes: Any) -> Path:
    tiny_model(torch.float32, **changes).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
def test_conversion_refuses_what_loading_refuses(tmp_path: Path, fault: str, to: str) -> None:
    change, message = FAULTS[fault]
    source = damaged(tmp_path / "source", change)
    with pytest.raises(MismatchError, match=message):
        LlamaForCausalLM.from_pretrained(source)
    with pytest.raises(MismatchError, match=message):
        convert(source, tmp_path / ("x.gguf" if to == "gguf" else "out"), ConversionSettings(to))
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("fault", ["missing", "surplus layer", "width"])
def test_quantising_refuses_what_loading_refuses(tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    source = damaged(tmp_path / "source", change)
    with pytest.raises(MismatchError, match=message):
        quantize(source, tmp_path / "out", "nf4", eval_tokens=0)


def test_verify_checks_coverage(tmp_path: Path) -> None:
    source = damaged(tmp_path / "source", lambda t: None)
    convert(source, tmp_path / "out", ConversionSettings())
    assert "model.safetensors" in verify(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    import hashlib

    sums = [line.split("  ") for line in (tmp_path / "out/SHA256SUMS").read_text().splitlines()]
    lines = [f"{hashlib.sha256((tmp_path / 'out' / name).read_bytes()).hexdigest()}  {name}" for _, name in sums]
    (tmp_path / "out/SHA256SUMS").write_text("\n".join(lines) + "\n")
    with pytest.raises(MismatchError, match="not used: model.layers.1"):
        verify(tmp_path / "out")


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.inv_freq",
        "model.layers.1.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.bias",
    ],
)
def test_harmless_extras_are_known_by_name(tmp_path: Path, extra: str) -> None:
    """Rotary tables, and biases of 0 in a model that has none."""
    size = 64 if extra.endswith("bias") else 8
    source = damaged(tmp_path / "source", lambda t: t.update({extra: torch.zeros(size)}))
    LlamaForCausalLM.from_pretrained(source)
    for to, target in (("hf", "out"), ("meta", "meta"), ("gguf", "x.gguf")):
        convert(source, tmp_path / target, ConversionSettings(to))
        assert set(checkpoint.open(tmp_path / target).tensors) == set(parameter_shapes(tiny_config()))


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_tied_models_in_every_spelling(tmp_path: Path, kept: str) -> None:
    """safetensors' save_model keeps one of two names that share memory: whichever comes first by name."""
    model = tiny_model(torch.float32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    if kept == "lm_head.weight":
        save_model(model, str(tmp_path / "source/model.safetensors"), {"format": "pt"})
        assert "model.embed_tokens.weight" not in load_file(tmp_path / "source/model.safetensors")
    elif kept == "both":
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    want = model(tiny_ids()).logits
    for to, target in ((None, "source"), ("hf", "out"), ("meta", "meta"), ("gguf", "x.gguf")):
        if to is not None:
            convert(tmp_path / "source", tmp_path / target, ConversionSettings(to))
            verify(tmp_path / target)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / target)
        assert torch.equal(loaded(tiny_ids()).logits, want)
    quantize(tmp_path / "source", tmp_path / "nf4", "nf4", eval_tokens=0)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "nf4").config.tie_word_embeddings
    quantize(tmp_path / "source", tmp_path / "q8.gguf", "gguf:q8_0", eval_tokens=0, calibrate=False)
    assert GgufFile(tmp_path / "q8.gguf").config.tie_word_embeddings
    if cpu.available():
        assert torch.allclose(native_logits(tmp_path / "x.gguf", tiny_ids()), want, atol=BFLOAT16)


def test_a_base_models_folder_keeps_its_tensors_and_needs_a_head_for_gguf(tmp_path: Path) -> None:
    model = tiny_model(torch.float32)
    model.model.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "out", ConversionSettings())
    assert "model.norm.weight" in checkpoint.open(tmp_path / "out").tensors
    with pytest.raises(InputError, match="has no lm_head.weight"):
        convert(tmp_path / "base", tmp_path / "x.gguf", ConversionSettings("gguf"))


# -- GGUF --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tensors() -> dict[str, tuple[torch.Tensor, str]]:
    model = tiny_model(torch.float32, vocab_size=40, intermediate_size=96)
    return llama_tensors(model.state_dict(), "F16")


def paths_of(path: Path) -> list[Callable[[], Any]]:
    """Every way to a GGUF file's weights."""
    ways: list[Callable[[], Any]] = [
        lambda: LlamaForCausalLM.from_pretrained(path),
        lambda: convert(path, path.with_suffix(".out"), ConversionSettings()),
    ]
    if cpu.available():
        ways += [lambda: NativeModel.from_gguf(path), lambda: cpu.CpuWeights.from_gguf(GgufFile(path))]
        ways += [lambda: cpu.write_packed(GgufFile(path))]
    return ways


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "blk.2.ffn_up.weight": t["blk.1.ffn_up.weight"]}, "not used: .*2.*"),
        (lambda t: {name: v for name, v in t.items() if name != "blk.1.attn_k.weight"}, "missing: .*1.*k"),
        (lambda t: {**t, "blk.0.ffn_up.weight": (torch.zeros(64, 64), "F16")}, r"shape: .*up.*\(64, 64\) in the file"),
        (lambda t: {**t, "blk.0.ffn_norm.weight": (torch.zeros(32), "F32")}, "shape: .*norm"),
        (lambda t: {**t, "blk.0.ffn_up.bias": (torch.zeros(95), "F32")}, "shape: .*up.*bias"),
        (
            lambda t: {name: v for name, v in t.items() if name != "token_embd.weight"},
            "missing: .*embd|missing: .*embed",
        ),
    ],
)
def test_every_way_to_a_gguf_file_checks_coverage(
    tmp_path: Path, tensors: dict[str, tuple[torch.Tensor, str]], change: Any, message: str
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(llama_metadata(**{"llama.vocab_size": 40}), change(tensors)))
    for way in paths_of(path):
        with pytest.raises(MismatchError, match=message):
            way()


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        # llama_model::load_hparams: the type is linear where only a factor is given, 0 is none, the old key is read.
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.finetuned": True, "rope.scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        # llama_context: yarn's own 0.1 ln(4) + 1 = 1.138629 times 1.5
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.5},
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.707944,
            },
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_log_multiplier": 1.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "attention_factor": 1.0},
        ),
    ],
)
def test_rope_keys_mean_what_llama_cpp_makes_of_them(tmp_path: Path, keys: dict[str, Any], scaling: Any) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(llama_metadata(**{f"llama.{key}": value for key, value in keys.items()}), {}))
    assert GgufFile(path).config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.scaling.alpha", 2.0),
        ("llama.rope.scaling.something", 1),
        ("llama.rope.dimension_sections", 4),
        ("llama.logit_scale", 0.25),
        ("llama.attention.clamp_kqv", 8.0),
        ("llama.attention.causal", False),
    ],
)
def test_settings_that_would_change_the_answers_are_refused(
    tmp_path: Path, tensors: dict[str, tuple[torch.Tensor, str]], key: str, value: Any
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(llama_metadata(**{key: value}), tensors))
    for way in paths_of(path):
        with pytest.raises(CheckpointError, match=key):
            way()


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(llama_metadata(**{"llama.novelty": 1}), {}))
    with pytest.warns(UserWarning, match="llama.novelty are not known"):
        _ = GgufFile(path).config


@native
def test_a_bias_that_a_gguf_file_leaves_out_is_zero(
    tmp_path: Path, tensors: dict[str, tuple[torch.Tensor, str]]
) -> None:
    """llama.cpp reads each bias of a Llama for itself: files of converted Qwen models have q, k and v alone."""
    biased = {**tensors, **{f"blk.{i}.attn_{p}.bias": (torch.full((n,), 0.5), "F32") for i in (0, 1)
                            for p, n in (("q", 64), ("k", 32), ("v", 32))}}  # fmt: skip
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf(llama_metadata(), biased))
    ids = tiny_ids() % 40
    torch_model = LlamaForCausalLM.from_pretrained(path)
    assert not torch_model.model.layers[0].self_attn.o_proj.bias.any()
    assert torch.allclose(native_logits(path, ids), torch_model.float()(ids).logits, atol=BFLOAT16)
