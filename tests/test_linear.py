"""Reordered bfloat16 weights give the linear's own result and are never used stale."""

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import linear

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 products in oneDNN"
)


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Records every product with a reordered weight."""
    calls: list[Any] = []
    original = linear._multiply
    monkeypatch.setattr(linear, "_multiply", lambda *a: calls.append(a[1]) or original(*a))
    return calls


def test_same_logits_and_no_stale_copy(packed_calls: list[Any]) -> None:
    model, ids = tiny_model(torch.bfloat16, attention_bias=True), tiny_ids()
    plain = model(ids).logits.detach()
    assert not packed_calls
    assert model.prepack() == 15
    with torch.no_grad():
        packed = model(ids).logits
        assert len(packed_calls) == 9  # q k v as one, gate and up as one
        assert plain.abs().max() > 0.5
        assert (plain.float() - packed.float()).abs().max() <= 0.02 * plain.float().abs().max()
        model.lm_head.weight.mul_(0.5)  # in place: same parameter, new version
        assert (model(ids).logits.float() - packed.float() / 2).abs().max() <= 0.02 * plain.float().abs().max()
        assert len(packed_calls) == 9 + 8
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        assert not model(ids).logits.any()
        assert model.prepack() == 15
        assert not model(ids).logits.any()


def test_leaves_training_and_gradients_alone(packed_calls: list[Any]) -> None:
    model = tiny_model(torch.bfloat16)
    model.prepack()
    model(tiny_ids(), labels=tiny_ids()).loss.backward()
    assert not packed_calls
    assert model.lm_head.weight.grad is not None
    assert model.train().prepack() == 0
    assert tiny_model(torch.float32).prepack() == 0


def test_a_packed_model_copies_and_pickles() -> None:
    model = tiny_model(torch.bfloat16)
    model.prepack()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tiny_ids()).logits, model(tiny_ids()).logits)
