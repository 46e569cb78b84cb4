"""Losses as pure functions. The head's logits (N, V) are never whole in memory: they exist a chunk of rows at a time.

N targets, D width of the model, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.compiled import kernels, pool
from llama2.rope import promoted
from llama2.train.data import IGNORED
from llama2.train.matmul import add_transposed, sum_of_products
from llama2.train.preference import Preference, check_preference

CHUNK_BYTES = 48 << 20  # of logits
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def targets(hidden_BTD: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states (N, D) that have a target, and the targets (N,): token t + 1 is predicted from t."""
    shifted = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    places = (shifted != IGNORED).nonzero().squeeze(1)
    return hidden_BTD.reshape(-1, hidden_BTD.shape[-1])[places], shifted[places]


def head_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The sum over targets of the cross entropy of hidden W^T, in promote(dtype, float32).

    Differentiable in hidden and weight. Their gradients are made in the same pass over the chunks, so the head's
    product runs once forward and once backward, and nothing of size V is kept.
    """
    loss: Tensor = _HeadLoss.apply(hidden_ND, weight_VD, targets_N)
    return loss


def token_log_probs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log p(target) of each row (N,), in promote(dtype, float32). For the weight's gradient logits are made again."""
    found: Tensor = _LogProbs.apply(hidden_ND, weight_VD, targets_N)
    return found


def _rows(hidden_ND: Tensor, weight_VD: Tensor) -> int:
    return max(1, CHUNK_BYTES // (hidden_ND.itemsize * weight_VD.shape[0]))


def _log_probs(logits_NV: Tensor, targets_N: Tensor, factors_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """log p(target) of each row, and with factors what factor * log p(target) has for a gradient in the logits, in
    their place; else the logits. In promote(dtype, float32)."""
    wide = promoted(logits_NV.dtype)
    if logits_NV.device.type == "cpu" and logits_NV.dtype in _KERNEL_DTYPES and kernels():
        found = torch.empty(len(targets_N))
        kernels().log_probs(pool(), logits_NV, targets_N, factors_N, found)
        return found, logits_NV
    p, at = logits_NV.to(wide).log_softmax(-1), targets_N[:, None]
    found = p.gather(1, at).squeeze(1)
    if factors_N is None:
        return found, logits_NV
    factors = factors_N[:, None].to(wide)
    return found, p.exp_().mul_(-factors).scatter_add_(1, at, factors).to(logits_NV.dtype)


def _gradients(
    hidden: Tensor, weight: Tensor, target: Tensor, factors: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """log p(target) (N,), and of factor * log p(target) the gradients in hidden and weight, as far as wanted."""
    step = _rows(hidden, weight)
    to_hidden = torch.empty_like(hidden) if wanted[0] else None
    to_weight = torch.zeros_like(weight, dtype=promoted(hidden.dtype)) if wanted[1] else None
    found = [hidden.new_zeros(0, dtype=promoted(hidden.dtype))]
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        logits = sum_of_products((hidden[part], weight.T))
        values, grad = _log_probs(logits, target[part], factors[part] if any(wanted) else None)
        found.append(values)
        if to_hidden is not None:
            sum_of_products((grad, weight), out=to_hidden[part])
        if to_weight is not None:
            add_transposed(to_weight, hidden[part].T, grad)
    return torch.cat(found), to_hidden, None if to_weight is None else to_weight.to(weight.dtype)


class _Context(Protocol):
    """The context of an autograd function, kept between its passes."""

    needs_input_grad: tuple[bool, bool]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps tensors for the backward pass."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        factors = torch.full((len(hidden),), -1.0, device=hidden.device)
        found, to_hidden, to_weight = _gradients(hidden, weight, target, factors, ctx.needs_input_grad[:2])
        ctx.save_for_backward(to_hidden, to_weight)
        return -found.sum()

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_hidden, to_weight = ctx.saved_tensors
        scaled = (None if t is None else t * grads[0].to(t.dtype) for t in (to_hidden, to_weight))
        return next(scaled), next(scaled), None


class _LogProbs(torch.autograd.Function):
    """The gradient in hidden is a row's own times what comes back for it, so it is made in the forward pass. That in
    the weight is a sum over rows, for which the logits are computed again."""

    @staticmethod
    def forward(ctx: _Context, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        ones = torch.ones(len(hidden), device=hidden.device)
        found, to_hidden, _ = _gradients(hidden, weight, target, ones, (ctx.needs_input_grad[0], False))
        ctx.save_for_backward(to_hidden, *((hidden, weight, target) if ctx.needs_input_grad[1] else ()))
        return found

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_hidden, *again = ctx.saved_tensors
        to_weight = None
        if again:
            hidden, weight, target = again
            to_weight = _gradients(hidden, weight, target, grads[0].contiguous(), (False, True))[2]
        if to_hidden is not None:
            to_hidden = (to_hidden * grads[0][:, None]).to(to_hidden.dtype)
        return to_hidden, to_weight, None


# -- preferences -------------------------------------------------------------------------------------------------


class PreferenceLoss(NamedTuple):
    """Mean loss, and what is logged: the rewards beta * (log pi - log ref) of both answers (pairs,)."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor | float = 0.0,
    reference_rejected: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    kind: Preference = "sigmoid",
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290) of summed log-probabilities (pairs,).

    With d = (chosen - reference_chosen) - (rejected - reference_rejected) and e = label_smoothing, the chance that a
    label is wrong:

        sigmoid   -(1 - e) log s(beta d) - e log s(-beta d)                       (e = 0: DPO; else cDPO)
        robust    (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)         (arXiv 2403.00409)
        hinge     max(0, 1 - beta d)                                              (SLiC, arXiv 2305.10425)
        ipo       (d - 1 / (2 beta))^2, of log-probabilities averaged by token    (arXiv 2310.12036)

    References left at 0 make it reference-free. Raises InputError for a bad kind, beta or label_smoothing.
    """
    check_preference(kind, beta, label_smoothing)
    up, down = chosen - reference_chosen, rejected - reference_rejected
    d = up - down
    if kind == "sigmoid":
        loss = -(1 - label_smoothing) * F.logsigmoid(beta * d) - label_smoothing * F.logsigmoid(-beta * d)
    elif kind == "robust":
        right, wrong = F.logsigmoid(beta * d), F.logsigmoid(-beta * d)
        loss = (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif kind == "hinge":
        loss = torch.relu(1 - beta * d)
    else:
        loss = (d - 1 / (2 * beta)) ** 2
    return PreferenceLoss(loss.mean(), (beta * up).detach(), (beta * down).detach())
