"""Losses against their formulas, and their gradients against autograd in float64."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import InputError
from llama2.train import losses
from llama2.train.losses import IGNORED, dpo_loss, head_loss, targets, token_log_probs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 97 * 4)  # four rows a chunk


def made(rows: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 8).double(), torch.randn(97, 8).double()
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, 97, (rows,))


def test_head_loss_and_its_gradients() -> None:
    hidden, weight, target = made()
    ours = head_loss(hidden, weight, target)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    assert torch.allclose(ours, theirs, atol=1e-12)
    found = torch.autograd.grad(ours * 0.3, (hidden, weight))
    wanted = torch.autograd.grad(theirs * 0.3, (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, target = made()
    loss = head_loss(hidden, weight.detach(), target)
    assert [t.shape for t in loss.grad_fn.saved_tensors if t is not None] == [hidden.shape]
    loss.backward()
    assert hidden.grad is not None and weight.grad is None


def test_token_log_probs_and_their_gradients() -> None:
    hidden, weight, target = made()
    ours = token_log_probs(hidden, weight, target)
    theirs = (hidden @ weight.T).log_softmax(-1).gather(1, target[:, None]).squeeze(1)
    assert torch.allclose(ours, theirs, atol=1e-12)
    mix = torch.randn(len(target)).double()
    found = torch.autograd.grad(ours @ mix, (hidden, weight))
    wanted = torch.autograd.grad(theirs @ mix, (hidden, weight))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_the_loss_of_the_model() -> None:
    model, ids = tiny_model(), tiny_ids(2)
    labels = ids.clone()
    labels[0, :7] = IGNORED
    hidden, target = targets(model.model(ids).last_hidden_state, labels)
    assert len(target) == (11 - 6) + 11
    ours = head_loss(hidden, model.lm_head.weight, target) / len(target)
    theirs = model(ids, labels=labels).loss
    assert torch.allclose(ours, theirs, atol=1e-12)
    found, wanted = (torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_no_targets_no_loss() -> None:
    hidden, weight, target = made(0)
    assert head_loss(hidden, weight, target).item() == 0
    assert token_log_probs(hidden, weight, target).shape == (0,)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


FORMULAS: dict[tuple[str, float], Any] = {
    ("sigmoid", 0.0): lambda d, b: -np.log(sigmoid(b * d)),
    ("sigmoid", 0.2): lambda d, b: -0.8 * np.log(sigmoid(b * d)) - 0.2 * np.log(sigmoid(-b * d)),
    ("robust", 0.2): lambda d, b: (-0.8 * np.log(sigmoid(b * d)) + 0.2 * np.log(sigmoid(-b * d))) / 0.6,
    ("hinge", 0.0): lambda d, b: np.maximum(0, 1 - b * d),
    ("ipo", 0.0): lambda d, b: (d - 1 / (2 * b)) ** 2,
}


@pytest.mark.parametrize(("kind", "smoothing"), FORMULAS)
def test_dpo_losses(kind: Any, smoothing: float) -> None:
    rng = np.random.default_rng(3)
    c, r, rc, rr = rng.normal(-20, 5, (4, 9))
    found = dpo_loss(*map(torch.tensor, (c, r, rc, rr)), beta=0.3, kind=kind, label_smoothing=smoothing)
    assert float(found.loss) == pytest.approx(FORMULAS[kind, smoothing]((c - rc) - (r - rr), 0.3).mean(), rel=1e-12)
    assert np.allclose(found.chosen_rewards, 0.3 * (c - rc)) and np.allclose(found.rejected_rewards, 0.3 * (r - rr))


def test_reference_free() -> None:
    c, r = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -1.0])
    assert float(dpo_loss(c, r).loss) == pytest.approx((math.log1p(math.exp(-0.2)) + math.log1p(math.exp(0.1))) / 2)


@pytest.mark.parametrize(
    "given",
    [
        {"kind": "other"},
        {"beta": 0.0},
        {"beta": math.nan},
        {"label_smoothing": 0.5},
        {"kind": "ipo", "label_smoothing": 0.1},
    ],
)
def test_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(next(iter(given.values())))):
        dpo_loss(torch.zeros(1), torch.zeros(1), **given)
