"""From the scores of answers to the advantages of their tokens, as pure functions of tensors.

N answers, T tokens of the longest, P prompts with G answers each. What lies behind an answer's end is 0 everywhere.
Formulas: Llama 2 (arXiv 2307.09288, section 3.2.3), GAE (arXiv 1506.02438), GRPO (arXiv 2402.03300), RLOO
(arXiv 2402.14740), Dr. GRPO (arXiv 2503.20783).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from llama2.errors import InputError

GATE = 0.15  # probability of being safe below which safety alone counts
Scale = Literal["group", "batch", "none"]
_EPSILON = 1e-4  # beside a standard deviation, as TRL


def gated(helpful_N: Tensor, safe_N: Tensor, tagged_N: Tensor, threshold: float = GATE) -> Tensor:
    """The safety reward where the prompt is tagged or the safety reward is below logit(threshold), else helpfulness.

    Rewards are logits, as reward models give them: the paper's scores before the sigmoid. Raises InputError for a
    threshold outside (0, 1).
    """
    if not 0 < threshold < 1:
        raise InputError(f"the safety threshold is {threshold}; it is a probability: it must lie between 0 and 1")
    return torch.where(tagged_N | (safe_N < math.log(threshold / (1 - threshold))), safe_N, helpful_N)


def whitened(values: Tensor, mask: Tensor | None = None, centre: bool = True) -> Tensor:
    """Values with mean 0 and (population) variance 1 over the valid ones; `centre` False leaves the mean where it was.

    Equal values become 0, or stay. NaN stands for a missing one: it stays, and does not count.
    """
    valid = ~values.isnan() if mask is None else mask & ~values.isnan()
    count = valid.sum().clamp(min=1)
    mean = torch.where(valid, values, 0).sum() / count
    variance = torch.where(valid, values - mean, 0).square().sum() / count
    made = (values - mean) * (variance + 1e-8).rsqrt()
    made = made if centre else made + mean
    return made if mask is None else torch.where(mask, made, 0)


def within(lengths_N: Tensor, longest: int) -> Tensor:
    """True (N, longest) where an answer has a token."""
    return torch.arange(longest, device=lengths_N.device) < lengths_N[:, None]


def token_rewards(scores_N: Tensor, kl_NT: Tensor, lengths_N: Tensor, beta: float) -> Tensor:
    """-beta times the log-ratio to the reference at each token, and the score at the last one."""
    found = torch.where(within(lengths_N, kl_NT.shape[1]), -beta * kl_NT, 0)
    rows = torch.arange(len(found), device=found.device)
    return found.index_put((rows, lengths_N - 1), scores_N, accumulate=True)


def gae(
    rewards_NT: Tensor, values_NT: Tensor, lengths_N: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (N, T) by generalised advantage estimation. The value behind the last token is 0."""
    longest = values_NT.shape[1]
    mask = within(lengths_N, longest)
    values = torch.where(mask, values_NT, 0)
    found, last = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    for t in range(longest - 1, -1, -1):
        ahead = values[:, t + 1] if t + 1 < longest else torch.zeros_like(last)
        last = rewards_NT[:, t] + gamma * ahead - values[:, t] + gamma * lam * last
        last = torch.where(mask[:, t], last, 0)
        found[:, t] = last
    return found, found + values


def group_advantages(scores_PG: Tensor, scale: Scale = "group") -> Tensor:
    """(r - mean of the group) / (standard deviation + 1e-4): of the group, of all scores, or 1 with "none".

    NaN stands for an answer without a score: it is left out of the statistics and has advantage 0. Raises InputError
    for groups of one answer.
    """
    if scale not in get_args(Scale):
        raise InputError(f"scale_rewards is {scale!r}; it must be one of {', '.join(get_args(Scale))}")
    _check_group(scores_PG)
    valid = ~scores_PG.isnan()
    counts = valid.sum(1, keepdim=True)
    held = torch.where(valid, scores_PG, 0)
    mean = held.sum(1, keepdim=True) / counts.clamp(min=1)
    away = torch.where(valid, scores_PG - mean, 0)
    if scale == "none":
        return away
    if scale == "batch":
        total = valid.sum()
        far = torch.where(valid, scores_PG - held.sum() / total.clamp(min=1), 0)
        return away / ((far.square().sum() / (total - 1).clamp(min=1)).sqrt() + _EPSILON)
    return away / ((away.square().sum(1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt() + _EPSILON)


def leave_one_out(scores_PG: Tensor) -> Tensor:
    """r - the mean of the other answers' scores (RLOO); NaN as in `group_advantages`."""
    _check_group(scores_PG)
    valid = ~scores_PG.isnan()
    counts, held = valid.sum(1, keepdim=True), torch.where(valid, scores_PG, 0)
    others = (held.sum(1, keepdim=True) - held) / (counts - 1).clamp(min=1)
    return torch.where(valid & (counts > 1), scores_PG - others, 0)


def _check_group(scores_PG: Tensor) -> None:
    if scores_PG.shape[1] < 2:
        raise InputError("a group of one answer has nothing to compare with; sample at least 2 answers of each prompt")


def adapted(beta: float, kl: float, target: float, answers: int, horizon: int) -> float:
    """The KL coefficient for the next iteration (arXiv 1909.08593, section 2.2): it grows where the KL of an answer to
    the reference, in nats, was above the target, by at most a fifth every `horizon` answers."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * answers / horizon)
