"""Against the peft package on a transformers model: its files read, its scaling, its logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VARIANTS, tiny_ids, tiny_model
from tolerance import FLOAT32

from llama2 import AutoModel, LlamaForCausalLM, cpu
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.merge import merge_into
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.runners.native import NativeModel

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved(tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Path, Path]:
    """A transformers model with a random adapter of these settings; the folders of model and adapter."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    tiny_model(torch.float32, **changes).save_pretrained(tmp_path / "model")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    return theirs, tmp_path / "model", tmp_path / "adapter"


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        {"r": 4, "target_modules": r".*mlp\.(up|down)_proj", "rank_pattern": {"up_proj": 3}},
        {"r": 4, "target_modules": ALL, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*\.1\.mlp\..*": 3}},
        {"r": 4, "target_modules": ALL, "layers_to_transform": [1], "exclude_modules": ["up_proj"]},
        {"r": 5, "target_modules": ["model.layers.0.self_attn.k_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_files_scaling_and_logits(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs, folder, adapter_folder = saved(tmp_path, {}, settings)
    ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapter = read_adapter(adapter_folder, ours.config)
    layers = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(layers) == set(adapter.modules)
    for name, low in adapter.modules.items():
        assert low.scale == pytest.approx(layers[name].scaling["default"], rel=1e-15)
        assert torch.equal(low.a, layers[name].lora_A["default"].weight)
        assert torch.equal(low.b, layers[name].lora_B["default"].weight)
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        want = theirs(ids).logits[0]
    close = {"rtol": 0, "atol": FLOAT32 * float(want.abs().max())}
    if cpu.available():
        native = NativeModel.from_module(ours)
        native.load_adapter(adapter_folder)
        cache = cpu.PagedCache(native.weights, 32, "float32")
        rows, view = np.arange(12), cache.view([(cache.sequence(), 12)])
        run = cpu.CpuRunner(native.weights, "exact")
        torch.testing.assert_close(torch.from_numpy(run.step(ids[0], rows, view, rows, ["default"])), want, **close)
    merge_into(ours, adapter)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits[0], want, **close)


@pytest.mark.parametrize("variant", ["mqa", "head_dim", "biases", "tied"])
def test_other_shapes(tmp_path: Path, variant: str) -> None:
    theirs, folder, adapter_folder = saved(tmp_path, VARIANTS[variant], {"r": 4, "target_modules": ALL})
    ours = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    merge_into(ours, read_adapter(adapter_folder, ours.config))
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=FLOAT32 * float(want.abs().max()))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens"),
        ({"target_modules": ["lm_head", "q_proj"]}, "lm_head"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    *_, folder = saved(tmp_path, {}, {"r": 4, "target_modules": ["q_proj", "v_proj"], **settings})
    with pytest.raises(OSError, match=said):
        read_adapter(folder, tiny_model().config)


def drawn(model: Any) -> None:
    """Values of a training for everything that takes a gradient."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


LAYERS = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
OUTER = {"r": 4, "lora_alpha": 8}
BROUGHT: dict[str, dict[str, Any]] = {
    "both whole": {**LAYERS, "modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding whole": {**LAYERS, "modules_to_save": ["embed_tokens"]},
    "head whole": {**LAYERS, "modules_to_save": ["lm_head"]},
    "norms whole": {**LAYERS, "modules_to_save": ["input_layernorm", "norm"]},
    "a linear whole": {**LAYERS, "modules_to_save": ["up_proj"]},
    "LoRA on both": {**OUTER, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "LoRA on the embedding": {**OUTER, "target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on the head": {**OUTER, "target_modules": ["q_proj", "lm_head"]},
    "rows": {**LAYERS, "trainable_token_indices": [3, 7]},
    "rows of both": {**LAYERS, "trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [2]}},
    "biases of LoRA": {**LAYERS, "bias": "lora_only"},
    "all biases": {**LAYERS, "bias": "all"},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", BROUGHT)
def test_what_adapters_bring_besides_layers(tmp_path: Path, kind: str, tied: bool) -> None:
    """Logits of peft's own loading, of ours, and of what we merge."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    changes = {"tie_word_embeddings": tied, **({"attention_bias": True} if "bias" in kind else {})}
    tiny_model(torch.float32, **changes).save_pretrained(tmp_path / "model")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **BROUGHT[kind])).eval()
    drawn(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    want = theirs(tiny_ids(1, 12)).logits
    scale = want.abs().max()
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert (ours(tiny_ids(1, 12)).logits - want).abs().max() <= FLOAT32 * scale
    for name in ("out", "x.gguf"):
        options = ConversionSettings("hf" if name == "out" else "gguf", adapter=str(tmp_path / "adapter"))
        convert(tmp_path / "model", tmp_path / name, options)
        merged = LlamaForCausalLM.from_pretrained(tmp_path / name)
        assert (merged(tiny_ids(1, 12)).logits - want).abs().max() <= FLOAT32 * scale


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_resized_vocabulary_is_in_the_adapter(tmp_path: Path, tied: bool) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tiny_model(torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    base.resize_token_embeddings(104)
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **LAYERS)).eval()
    drawn(theirs)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    want = theirs(tiny_ids(1, 12)).logits
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert ours.config.vocab_size == 104 and ours.config.tie_word_embeddings == tied
    assert (ours(tiny_ids(1, 12)).logits - want).abs().max() <= FLOAT32 * want.abs().max()


def test_made_on_automodel(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    tiny_model(torch.float32).save_pretrained(tmp_path / "model")
    base = transformers.AutoModel.from_pretrained(tmp_path / "model", dtype=torch.float32)
    settings = {**LAYERS, "modules_to_save": ["embed_tokens"]}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    drawn(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    want = theirs(tiny_ids(1, 12)).last_hidden_state
    ours = AutoModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert (ours(tiny_ids(1, 12)).last_hidden_state - want).abs().max() <= FLOAT32 * want.abs().max()
