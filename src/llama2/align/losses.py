"""The losses of policy optimisation, as pure functions of flat tokens.

N tokens of A answers one behind the other; `owner` (N,) says which answer a token is of. Sources: PPO
(arXiv 1707.06347), GRPO (arXiv 2402.03300), DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783), GSPO
(arXiv 2507.18071), CISPO (arXiv 2506.13585).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

LARGEST = 20.0  # of a log-ratio before exp: beyond it the ratio is clipped in any case
Level = Literal["token", "sequence", "answer"]
Estimator = Literal["k1", "k2", "k3", "k3_ratio"]


class Surrogate(NamedTuple):
    """loss (N,), the ratios (N,), and where the clipped branch is the greater one (N,)."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def ratios(log_N: Tensor, old_N: Tensor, owner_N: Tensor, answers: int, level: Level = "token") -> Tensor:
    """pi / pi_old of each token; of the answer it is in: their geometric mean ("sequence", GSPO), their product
    ("answer", RLOO)."""
    away = log_N - old_N
    if level != "token":
        total = away.new_zeros(answers).index_add(0, owner_N, away)
        if level == "sequence":
            total = total / torch.bincount(owner_N, minlength=answers).clamp(min=1)
        away = total[owner_N]
    return away.clamp(-LARGEST, LARGEST).exp()


def surrogate(
    ratio_N: Tensor, advantage_N: Tensor, low: float = 0.2, high: float | None = None, most: float | None = None
) -> Surrogate:
    """max(-A ratio, -A clip(ratio, 1 - low, 1 + high)); high is low unless given. most: bound of the ratio itself
    (TRL's delta)."""
    bounded = ratio_N.clamp(1 - low, 1 + (low if high is None else high))
    plain = -advantage_N * (ratio_N if most is None else ratio_N.clamp(max=most))
    other = -advantage_N * bounded
    return Surrogate(torch.maximum(plain, other), ratio_N, other > plain)


def cispo(ratio_N: Tensor, advantage_N: Tensor, log_N: Tensor, most: float) -> Surrogate:
    """-min(ratio, most) A log pi with a constant ratio: a clipped token keeps its gradient."""
    bounded = ratio_N.detach().clamp(max=most)
    return Surrogate(-bounded * advantage_N * log_N, ratio_N, (ratio_N > most) & (advantage_N > 0))


def kl(log_N: Tensor, reference_N: Tensor, kind: Estimator, ratio_N: Tensor | None = None) -> Tensor:
    """An estimate of the KL to the reference at each token, with d = log pi - log pi_ref.

    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d. As losses k1 has no gradient on average, k2 the gradient of
    KL(pi || ref), k3 that of KL(ref || pi), and k3 times a differentiable ratio that of KL(pi || ref) again.
    """
    d = log_N - reference_N
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    found = (-d).clamp(max=LARGEST).exp() - 1 + d
    return found * ratio_N if kind == "k3_ratio" and ratio_N is not None else found


def value_loss(values_N: Tensor, old_N: Tensor, returns_N: Tensor, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """Half the squared error (N,), with `clip` the larger one of it and that of the value kept near the old one; and
    where the clipped one is the greater."""
    plain = (values_N - returns_N).square()
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    bounded = (old_N + (values_N - old_N).clamp(-clip, clip) - returns_N).square()
    return torch.maximum(plain, bounded) / 2, bounded > plain
