"""A layer as one function: values and gradients are those of torch's own graph in float64, packed rows included."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model

from llama2 import LlamaForSequenceClassification, lora
from llama2.attention import Mask, make_mask
from llama2.checkpoint.load import pack
from llama2.checkpoint.weights import GivenWeights
from llama2.compiled import available, instruction_sets, kernels, pool
from llama2.lora_config import LoraConfig
from llama2.quantization.int8 import Linear8bit
from llama2.quantization_config import BitsAndBytesConfig
from llama2.train import objectives
from llama2.train.answers import Preferences
from llama2.train.data import EncodedPair, Example
from llama2.train.fused_layer import _Plan, fused, plan_of, texts_of
from llama2.train.objectives import Classification, NextToken, hidden_of, packed_rows

needs_kernels = pytest.mark.skipif(not available(), reason="the compiled module is not built")

FLOAT32 = 3e-5  # of a gradient's norm: torch's own float32 graph of these models is up to 1.1e-5 away


def examples(count: int = 7) -> list[Example]:
    rows = [tiny_ids(1, 5 + 4 * i, seed=i)[0].tolist() for i in range(count)]
    return [Example(ids, [-100, *ids[1:]]) for ids in rows]


def adapted(model: Any, targets: Any = "all-linear") -> Any:
    lora.add_adapter(model, LoraConfig(r=3, target_modules=targets))
    with torch.no_grad():
        for i, layer in enumerate(lora.layers(model).values()):
            values = torch.randn(layer.lora_B["default"].shape, generator=torch.Generator().manual_seed(i))
            layer.lora_B["default"].copy_(values * 0.1)
    return model


def partly(model: Any) -> Any:
    """Adapters on some linears only, and a norm that is trained."""
    adapted(model, ["q_proj", "up_proj", "down_proj"])
    model.model.layers[0].input_layernorm.weight.requires_grad_(True)
    return model


def qlora(model: Any) -> Any:
    """Adapters over NF4 weights."""
    state = model.state_dict()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    pack(model, GivenWeights(state), {name: name for name in state}, config, torch.float32)
    return adapted(model)


def eight_bits(model: Any) -> Any:
    """Adapters over int8 rows."""
    for path, layer in list(model.named_modules()):
        if path.endswith("_proj"):
            model.set_submodule(path, Linear8bit.quantize(layer.weight, None, None))
    return adapted(model)


PREPARED: dict[str, Any] = {"full": lambda model: model, "lora": adapted, "some": partly, "qlora": qlora}


def gradients(model: Any, rows: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    objective = NextToken()
    loss = objective.loss(model, objective.collate(rows))
    loss.total.backward()
    return loss.total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 1}, {"head_dim": 24}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize(
    "prepare", [lambda model: model, adapted, partly, qlora, eight_bits], ids=["full", "lora", "some", "qlora", "int8"]
)
@pytest.mark.parametrize("packing", [True, False])
def test_gradients_are_those_of_float64(sizes: dict[str, Any], prepare: Callable[[Any], Any], packing: bool) -> None:
    model = prepare(tiny_model(torch.float32, **sizes)).train()
    exact = copy.deepcopy(model).double()
    rows = packed_rows(examples(), 60, packing)
    value, wanted = gradients(exact, rows)
    with fused(model):
        assert plan_of(model.model.layers[0], torch.zeros(1, 1, 64)) is not None
        loss, found = gradients(model, rows)
    assert found.keys() == wanted.keys()
    assert loss == pytest.approx(value, rel=1e-6)
    for name, grad in found.items():
        distance = (grad.double() - wanted[name]).norm() / wanted[name].norm()
        assert distance < FLOAT32, f"{name}: {distance:.1e}"


def alike() -> list[Example]:
    """Answers to two prompts and to none, and prompts that are alike in their first tokens."""
    first, second = tiny_ids(1, 14, seed=50)[0].tolist(), tiny_ids(1, 9, seed=51)[0].tolist()
    second[:3] = first[:3]
    rows = [(first, 5), (first, 9), (second, 3), (first, 1), (second, 12), (second, 4), ([], 7)]
    answers = [tiny_ids(1, n, seed=60 + i)[0].tolist() for i, (_, n) in enumerate(rows)]
    return [Example([*p, *a], [*[-100] * len(p), *a]) for (p, _), a in zip(rows, answers, strict=True)]


@needs_kernels
@pytest.mark.parametrize("sizes", [{}, {"head_dim": 24}, {"num_key_value_heads": 1}])
@pytest.mark.parametrize("prepare", [lambda model: model, adapted, qlora], ids=["full", "lora", "qlora"])
def test_what_rows_begin_with_is_computed_once(
    sizes: dict[str, Any], prepare: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers to one prompt share its tokens, in the forward pass and in the gradients; the values are the same."""
    model = prepare(tiny_model(torch.float32, **sizes)).train()
    exact, rows = copy.deepcopy(model).double(), packed_rows(alike(), 60, False)
    value, wanted = gradients(exact, rows)
    widths, layout = [], objectives.one_row_shared
    monkeypatch.setattr(
        objectives, "one_row_shared", lambda *given: widths.append(len((r := layout(*given))[0][0])) or r
    )
    with fused(model):
        loss, found = gradients(model, rows)
    every = sum(len(row.input_ids) for row in rows)
    assert widths == [-(-(every - 2 * 14 - 3 - 2 * 9) // 64) * 64]
    assert loss == pytest.approx(value, rel=1e-6) and found.keys() == wanted.keys()
    for name, grad in found.items():
        assert (grad.double() - wanted[name]).norm() < FLOAT32 * wanted[name].norm(), name


@pytest.mark.parametrize("prepare", [adapted, qlora, eight_bits], ids=["lora", "qlora", "int8"])
def test_gradients_that_torch_computes_are_those_of_float64(prepare: Callable[[Any], Any]) -> None:
    model = prepare(tiny_model(torch.float32)).train()
    value, wanted = gradients(copy.deepcopy(model).double(), packed_rows(examples(), 60, True))
    loss, found = gradients(model, packed_rows(examples(), 60, True))
    assert loss == pytest.approx(value, rel=1e-6)
    for name, grad in found.items():
        assert (grad.double() - wanted[name]).norm() < FLOAT32 * wanted[name].norm(), name


@needs_kernels
@pytest.mark.parametrize("isa", instruction_sets()[1:] if kernels() else [])
def test_gradients_on_every_instruction_set(isa: str) -> None:
    """This process runs the best one; the others are run by others."""
    words = [sys.executable, "-m", "pytest", __file__, "-k", "are_those_of_float64", "-p", "no:cacheprovider"]
    environment = {**os.environ, "LLAMA2_ISA": isa}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:]


@needs_kernels
def test_pairs_of_many_lengths_in_one_row() -> None:
    model, rows = adapted(tiny_model(torch.float32)).train(), examples(6)
    pairs, objective = [EncodedPair(*rows[i : i + 2]) for i in (0, 2, 4)], Preferences()
    batch = objective.collate(pairs)
    wanted = objective.loss(model, batch)
    with fused(model):
        hidden, labels = hidden_of(model, batch)
        found = objective.loss(model, batch)
    tokens = sum(len(row.input_ids) for row in rows)
    assert hidden.shape[:2] == labels.shape == (1, -(-tokens // 64) * 64) and batch["input_ids"].shape[0] == 6
    assert found.total.item() == pytest.approx(wanted.total.item(), rel=1e-6)
    assert found.logs == pytest.approx(wanted.logs, rel=1e-4, abs=1e-6)


@needs_kernels
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_texts_of_many_lengths_are_classified_in_one_row(problem: str) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=3, problem_type=problem, pad_token_id=0)).train()
    several = problem.startswith("multi")
    rows = [(tiny_ids(1, n, seed=n)[0].tolist(), [1.0, 0.0, 1.0] if several else n % 3) for n in (9, 1, 30, 17)]
    objective = Classification()
    batch = objective.collate(rows)
    ids = batch["input_ids"]
    given = torch.arange(ids.shape[1]) < batch["lengths"][:, None]
    wanted = model(ids, given.long(), labels=batch["wanted"], use_cache=False)
    wanted.loss.backward()
    right = {name: p.grad.clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    for run in (fused, lambda _: nullcontext()):
        model.zero_grad()
        with run(model):
            assert hidden_of(model, batch)[0].shape[:2] == ((1, 64) if run is fused else ids.shape)
            found = objective.loss(model, batch)
            (found.total / 4).backward()
        assert found.units == 4 and found.total.item() / 4 == pytest.approx(wanted.loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            assert p.grad is not None and (p.grad - right[name]).norm() < FLOAT32 * right[name].norm(), name


@needs_kernels
def test_bfloat16_is_as_near_to_float64_as_torch_is() -> None:
    model = adapted(tiny_model(torch.float32)).to(torch.bfloat16).train()
    exact, rows = copy.deepcopy(model).double(), packed_rows(examples(), 60)
    _, wanted = gradients(exact, rows)
    _, plain = gradients(model, rows)
    with fused(model):
        _, found = gradients(model, rows)

    def distance(grads: dict[str, torch.Tensor]) -> float:
        return sum(float((g.double() - wanted[n]).norm() / wanted[n].norm()) for n, g in grads.items())

    assert distance(found) < 1.1 * distance(plain)


@needs_kernels
def test_recomputing_gives_the_same_bits() -> None:
    model, rows = adapted(tiny_model(torch.float32)).train(), packed_rows(examples(), 60)
    with fused(model):
        _, kept = gradients(model, rows)
        model.gradient_checkpointing_enable()
        _, again = gradients(model, rows)
    assert all(torch.equal(again[name], grad) for name, grad in kept.items())


@needs_kernels
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_is_that_of_float64_with_the_same_values_left_out(monkeypatch: Any, packed: bool) -> None:
    model, share = tiny_model(torch.float32), 0.3
    if packed:
        qlora(model)
    else:
        adapted(model)
    for layer in lora.layers(model).values():
        layer.dropout["default"] = share
    model.train()
    exact, ids = copy.deepcopy(model).double(), tiny_ids(2, 24)
    towards = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0))

    def gradients_of(m: Any) -> tuple[float, dict[str, torch.Tensor]]:
        m.zero_grad()
        loss = (m.model(ids, use_cache=False).last_hidden_state * towards).sum()
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None}

    seeds: list[int] = []

    def left_out(x: torch.Tensor, p: float, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.empty(x.shape)
        kernels().drop(pool(), torch.ones(x.shape), seeds.pop(0), p, None, kept)
        return x * (kept > 0) / (1 - p), kept > 0

    draw = _Plan.draw

    def remembered(plan: Any) -> None:
        draw(plan)
        seeds.extend(product.seed for product in plan.products())

    with fused(model):
        monkeypatch.setattr(_Plan, "draw", remembered)
        value, found = gradients_of(model)
        monkeypatch.undo()
        assert len(set(seeds)) == len(seeds) == 7 * len(model.model.layers)
    monkeypatch.setattr(torch, "native_dropout", left_out)
    right, wanted = gradients_of(exact)
    assert value == pytest.approx(right, rel=1e-4) and not seeds
    for name, grad in found.items():
        distance = (grad.double() - wanted[name]).norm() / wanted[name].norm()
        assert distance < 1e-4, f"{name}: {distance:.1e}"


@needs_kernels
def test_recomputing_draws_what_was_left_out_again() -> None:
    model, rows = adapted(tiny_model(torch.float32)).train(), packed_rows(examples(), 60)
    for layer in lora.layers(model).values():
        layer.dropout["default"] = 0.3
    with fused(model):
        torch.manual_seed(5)
        _, kept = gradients(model, rows)
        model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        _, again = gradients(model, rows)
    assert all(torch.equal(again[name], grad) for name, grad in kept.items())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_leaves_out_its_share(dtype: torch.dtype) -> None:
    ones, found = torch.ones(1000, 333, dtype=dtype), []
    for seed in (1, 1, 2, 1 << 40):
        out = torch.empty_like(ones)
        kernels().drop(pool(), ones, seed, 0.1, None, out)
        found.append(out)
        assert (out == 0).float().mean().item() == pytest.approx(0.1, abs=0.002)
        assert set(out.unique().tolist()) == {0, torch.tensor(65536 / (65536 - 6554)).to(dtype).item()}
    assert torch.equal(found[0], found[1])
    for other in found[2:]:  # independent: both are 0 at a hundredth of the places
        assert ((found[0] == 0) & (other == 0)).float().mean().item() == pytest.approx(0.01, abs=0.001)
    by_row, by_column = (found[0] == 0).float().mean(1), (found[0] == 0).float().mean(0)
    assert by_row.std() < 0.02 and by_column.std() < 0.012  # what independent draws have: 0.0164 and 0.0095
    added = torch.full_like(ones, 2)
    kernels().drop(pool(), ones, 1, 0.1, added, added)
    assert torch.equal(added, found[0] + 2)
    with pytest.raises(ValueError, match="share"):
        kernels().drop(pool(), ones, 1, 1.0, None, added)


@needs_kernels
def test_a_text_sees_no_other() -> None:
    model, (a, b, c) = tiny_model(torch.float32).train(), examples(3)
    objective = NextToken()
    batches = [objective.collate(packed_rows([first, b], 64)) for first in (a, c)]
    with fused(model), torch.no_grad():
        one, other = (
            model.model(x["input_ids"], x["attention_mask"], x["position_ids"], use_cache=False).last_hidden_state
            for x in batches
        )
    assert torch.equal(one[0, len(a.input_ids) :], other[0, len(c.input_ids) :])


def test_what_the_kernels_do_not_know_runs_as_always() -> None:
    x = torch.zeros(1, 1, 64)
    model = tiny_model(torch.float32).train()
    assert plan_of(model.model.layers[0], x.double()) is None
    assert plan_of(tiny_model(torch.float32, attention_bias=True).model.layers[0], x) is None
    assert plan_of(tiny_model(torch.float32, hidden_act="gelu").model.layers[0], x) is None
    lora.add_adapter(model, LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    assert plan_of(model.model.layers[0], x) is None
    with lora.disabled(model):
        assert plan_of(model.model.layers[0], x) is not None


def test_ends_of_texts() -> None:
    assert texts_of(Mask(None, causal=True), 2, 5).ends.tolist() == [5, 10]  # type: ignore[union-attr]
    batch = NextToken().collate(packed_rows(examples(4), 30))
    mask = make_mask(batch["attention_mask"], 30, 0, 30, torch.device("cpu"))
    rows = packed_rows(examples(4), 30)
    tokens = batch["input_ids"].shape[1]
    wanted = []
    for i, row in enumerate(rows):
        wanted += [i * tokens + at for at in (*row.starts[1:], len(row.input_ids), tokens)]
    assert texts_of(mask, len(rows), tokens).ends.tolist() == sorted(set(wanted))  # type: ignore[union-attr]
    left = torch.tensor([[0, 1, 1], [1, 1, 1]])  # padding that sees nothing
    assert texts_of(make_mask(left, 3, 0, 3, torch.device("cpu")), 2, 3) is None
    window = torch.ones(4, 4, dtype=torch.bool).tril().triu(-1)
    assert texts_of(Mask(window[None, None], causal=False), 1, 4) is None


def test_masks_that_are_no_beginnings_of_earlier_texts() -> None:
    """The second text takes tokens from the middle of the first, of one that itself takes some, or not all alike."""
    whole = torch.ones(6, 6, dtype=torch.bool).tril()
    for own, tokens in (((4, 6), (1, 3)), ((2, 4, 6), (2, 4)), ((4, 6), None)):
        mask, begin = torch.zeros_like(whole), 0
        for end in own:
            mask[begin:end, begin:end] = whole[begin:end, begin:end]
            begin = end
        if len(own) == 3:
            mask[2:4, :1] = True  # the second takes one from the first, so the third cannot take from the second
        last = own[-2]
        mask[last:, slice(*(tokens or (0, 1)))] = True
        if tokens is None:
            mask[5, 1] = True
        assert texts_of(Mask(mask[None, None], causal=False), 1, 6) is None


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_of_logits(dtype: torch.dtype) -> None:
    for vocabulary in (7, 97, 160):
        logits = (torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
        target, factors = torch.arange(5), torch.linspace(-2, 2, 5)
        exact = logits.double().requires_grad_()
        wanted = exact.log_softmax(-1)[torch.arange(5), target]
        (wanted * factors).sum().backward()
        found = torch.empty(5)
        kernels().log_probs(pool(), logits, target, factors, found)
        assert torch.allclose(found.double(), wanted, atol=1e-5)
        assert torch.allclose(logits.double(), exact.grad, atol=1e-6 if dtype == torch.float32 else 8e-3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        kernels().log_probs(pool(), logits, target + 158, factors, found)


@needs_kernels
def test_kernels_refuse_sizes_that_do_not_fit() -> None:
    x, weight = torch.zeros(3, 32), torch.zeros(32)
    with pytest.raises(ValueError, match="one dtype and size"):
        kernels().norm(pool(), x, weight, 1e-5, torch.zeros(2, 32))
    with pytest.raises(ValueError, match="multiple of 16"):
        kernels().norm(pool(), torch.zeros(3, 24), torch.zeros(24), 1e-5, torch.zeros(3, 24))
    q, tables = torch.zeros(3, 2, 16), torch.zeros(3, 16)
    for ends in ([2], [2, 2, 3], [4], []):
        with pytest.raises(ValueError, match="text"):
            given = (q, q, q, tables, tables, torch.tensor(ends, dtype=torch.int64), 1.0, torch.zeros_like(q))
            kernels().texts(pool(), *given, torch.zeros(2, 3))
