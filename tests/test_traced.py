"""torch.compile, torch.export and inference mode: the same values, no guard on data, outputs and caches as pytrees."""

import copy
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from tiny import VARIANTS, tiny_config, tiny_ids, tiny_model
from tolerance import FLOAT32

from llama2 import LlamaForSequenceClassification
from llama2.cache import DynamicCache, StaticCache
from llama2.outputs import CausalLMOutputWithPast

STATIC = [name for name in VARIANTS if name != "dynamic"]  # dynamic RoPE looks at the longest position


def padded(rows: int = 2, tokens: int = 8, left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tiny_ids(rows, tokens), torch.ones(rows, tokens, dtype=torch.long)
    mask[0, : 3 if left else 0] = 0
    mask[0, tokens if left else 5 :] = 0
    return ids, mask


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


SHORT = {"num_hidden_layers": 1}  # a tracer runs every layer anew, seconds each
TRACED = [
    *(pytest.param("sdpa", VARIANTS[name] | (SHORT if VARIANTS[name] else {}), id=f"sdpa-{name}") for name in STATIC),
    *(pytest.param("eager", VARIANTS[name] | SHORT, id=f"eager-{name}",
                   marks=() if name in ("gqa", "yarn") else pytest.mark.slow) for name in STATIC),
]  # fmt: skip


@pytest.mark.parametrize(("attention", "changes"), TRACED)
def test_compiled_as_one_graph(attention: str, changes: dict[str, Any]) -> None:
    model = tiny_model(torch.float32, **changes)
    model.set_attn_implementation(attention)
    ids, mask = padded()
    run = torch.compile(model.forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        for given in (mask, torch.ones_like(mask), None):
            found, wanted = run(ids, attention_mask=given), model(ids, attention_mask=given)
            assert isinstance(found, CausalLMOutputWithPast) and isinstance(found.past_key_values, DynamicCache)
            assert (found.logits - wanted.logits).abs().max() < FLOAT32 * wanted.logits.abs().max()


def test_compiled_steps_over_a_cache() -> None:
    model = tiny_model(torch.float32, **SHORT)
    ids, mask = padded(2, 12)
    run = torch.compile(model.forward, fullgraph=True, backend="eager")
    cache = DynamicCache()
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        start = 0
        for new in (6, 1, 1, 1, 3):
            end = start + new
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
            out = run(ids[:, start:end], attention_mask=mask[:, :end], position_ids=places, past_key_values=cache)
            assert out.past_key_values is cache and cache.get_seq_length() == end
            apart = (out.logits - wanted[:, start:end]) * mask[:, start:end, None]
            assert apart.abs().max() < FLOAT32 * wanted.abs().max()
            start = end
        assert len(cache.to_legacy_cache()) == 1 and cache[0][0].shape[2] == 12


def test_compiled_training_step() -> None:
    model = tiny_model(torch.float32, **SHORT).train()
    twin = copy.deepcopy(model)
    ids, mask = padded(left=False)
    torch.compile(model.forward, fullgraph=True, backend="aot_eager")(
        ids, attention_mask=mask, labels=ids
    ).loss.backward()
    twin(ids, attention_mask=mask, labels=ids).loss.backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() < FLOAT32 * theirs.grad.norm()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("strict", "use_cache"),
    [
        (False, True),
        (True, False),
        *(pytest.param(*both, marks=pytest.mark.slow) for both in ((False,) * 2, (True,) * 2)),
    ],
)
def test_exported(strict: bool, use_cache: bool, tmp_path: Path) -> None:
    model = tiny_model(torch.float32, **SHORT)
    ids, mask = padded()
    batch, tokens = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("tokens", min=2, max=64)
    sizes = {0: batch, 1: tokens}
    with torch.no_grad():
        program = torch.export.export(
            model,
            (),
            {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache},
            dynamic_shapes={"input_ids": sizes, "attention_mask": sizes, "use_cache": None},
            strict=strict,
        )
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for shape, left in (((2, 8), True), ((3, 11), False), ((1, 5), True)):
            ids, mask = padded(*shape, left=left)
            found = loaded(input_ids=ids, attention_mask=mask, use_cache=use_cache)
            wanted = model(ids, attention_mask=mask)
            assert isinstance(found, CausalLMOutputWithPast)
            assert (found.logits - wanted.logits).abs().max() < FLOAT32 * wanted.logits.abs().max()
            assert ("past_key_values" in found) == use_cache
            if use_cache:
                assert found.past_key_values.get_seq_length() == shape[1]
    assert (
        model(ids).logits - tiny_model(torch.float32, **SHORT)(ids).logits
    ).abs().max() == 0  # tracing left nothing behind


def test_exported_with_a_cache_as_input() -> None:
    model = tiny_model(torch.float32)
    ids = tiny_ids(2, 9)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        given = {"input_ids": ids[:, 6:], "past_key_values": cache}
        program = torch.export.export(model, (), copy.deepcopy(given), strict=False)
        found = program.module()(**copy.deepcopy(given))
        assert (found.logits - model(ids).logits[:, 6:]).abs().max() < 1e-4
        assert found.past_key_values.get_seq_length() == 9


def test_exported_classifier() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=3)).eval()
    ids, mask = padded(left=False)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids, "attention_mask": mask}, strict=False)
        found = program.module()(input_ids=ids, attention_mask=mask).logits
        assert (found - model(ids, attention_mask=mask).logits).abs().max() < 1e-5


def test_traced_by_jit() -> None:
    """A traced forward keeps the mask as an input: an example without padding must not bake in that there is none."""
    model = tiny_model(torch.float32)
    ids, mask = padded(left=False)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sizes are taken as constants
        traced = torch.jit.trace(Logits(), (ids, torch.ones_like(mask)), check_trace=False)
        assert (traced(ids, mask) - model(ids, attention_mask=mask).logits).abs().max() < 1e-4


# -- pytrees -----------------------------------------------------------------------------------------------------


def test_outputs_and_caches_are_pytrees() -> None:
    model = tiny_model(torch.float32)
    out = model(tiny_ids(2, 5), use_cache=True, output_hidden_states=True)
    leaves, spec = pytree.tree_flatten(out)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves) and len(leaves) == 1 + 4 + 3
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(out) and again.keys() == out.keys() and again.logits is out.logits
    assert again.past_key_values.get_seq_length() == 5
    doubled = pytree.tree_map(lambda x: 2 * x, out)
    assert torch.equal(doubled.past_key_values[1][0], 2 * out.past_key_values[1][0])
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(out)[0]]
    assert "['logits']" in paths and "['past_key_values'].key_cache[0]" in paths
    static = StaticCache(model.config, 2, 8)
    model(tiny_ids(2, 5), past_key_values=static)
    copied = pytree.tree_map(torch.clone, static)
    assert isinstance(copied, StaticCache) and copied.get_seq_length() == 5 and copied.max_cache_len == 8
    generated = model.generate(tiny_ids(2, 5), max_new_tokens=3, return_dict_in_generate=True, output_scores=True)
    assert pytree.tree_map(lambda x: x, generated).keys() == generated.keys()


# -- inference mode ----------------------------------------------------------------------------------------------

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize("modes", list(product(MODES, repeat=2)), ids="-".join)
@pytest.mark.parametrize("kind", ["dynamic", "static", "static made in the mode"])
def test_a_cache_goes_on_in_another_mode(modes: tuple[str, ...], kind: str) -> None:
    model = tiny_model(torch.float32).requires_grad_(False)
    ids = tiny_ids(2, 300) % 90 + 1  # beyond the first room of a growing cache
    wanted, start = model(ids).logits, 0
    cache: Any = DynamicCache()
    with MODES[modes[0]]() if kind == "static made in the mode" else torch.no_grad():
        cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, 2, 300)
    for mode, end in zip((*modes, *modes), (6, 7, 290, 300), strict=True):
        with MODES[mode]():
            logits = model(ids[:, start:end], past_key_values=cache).logits
        assert (logits - wanted[:, start:end]).abs().max() < 5 * FLOAT32 * wanted.abs().max()
        start = end


@pytest.mark.parametrize("name", VARIANTS)
def test_training_after_inference_mode(name: str) -> None:
    """What inference mode left in tables can be used by a backward pass."""
    model = tiny_model(torch.float32, **VARIANTS[name])
    ids = tiny_ids(2, 40)
    with torch.inference_mode():
        model(ids)
        model.generate(ids[:, :5], max_new_tokens=3, runner="torch")
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_generate_in_either_mode_over_one_cache() -> None:
    model = tiny_model(torch.float32)
    for runner in ("torch", "auto"):
        ids, cache = tiny_ids(1, 6), DynamicCache()
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                ids = model.generate(ids, max_new_tokens=3, eos_token_id=None, past_key_values=cache, runner=runner)
        whole = model.generate(tiny_ids(1, 6), max_new_tokens=9, eos_token_id=None, runner="torch")
        assert ids.tolist() == whole.tolist()
