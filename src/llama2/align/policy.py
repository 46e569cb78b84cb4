"""The objective of PPO, GRPO and RLOO: sampled answers with advantages, and the clipped loss of their tokens.

B answers, N their tokens one behind the other, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from llama2.align.critic import Critic
from llama2.align.losses import Estimator, Level, Surrogate, cispo, kl, ratios, surrogate, value_loss
from llama2.errors import InputError
from llama2.train.data import IGNORED
from llama2.train.losses import targets, token_log_probs
from llama2.train.objectives import Batch, Loss, head_of, hidden_of, padded, places
from llama2.train.reference import without_dropout

Reduction = Literal["token", "answer", "constant"]


class Item(NamedTuple):
    """An answer to learn from. Tensors (T,) of its tokens, None where they are not used: log-probabilities of the
    policy that is improved (old), of the reference and of the sampler, values and returns. counts: 0 to leave its
    tokens out of the loss."""

    prompt_ids: list[int]
    ids: list[int]
    advantages: Tensor
    counts: float = 1.0
    old: Tensor | None = None
    reference: Tensor | None = None
    sampled: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


_TENSORS = ("advantages", "old", "reference", "sampled", "values", "returns")


@dataclass
class PolicyGradient:
    """The clipped objective. reduction: the mean over tokens ("token": PPO, DAPO), over answers of the mean of their
    tokens ("answer": GRPO), or the sum over tokens by answers times `longest` ("constant": Dr. GRPO). level: what a
    ratio is of, see `losses.ratios`; `cispo` takes epsilon_high as the largest ratio. beta: of a KL loss to the
    reference. cap: sampled tokens are weighed by pi_old / sampler, at most this; None leaves that out. vf_coef and
    value_clip: of the critic. sampling: what the answers are sampled with, in words, so that a run that is resumed is
    the same. temperature: of all log-probabilities.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    cispo: bool = False
    reduction: Reduction = "token"
    level: Level = "token"
    beta: float = 0.0
    estimator: Estimator = "k3_ratio"
    cap: float | None = None
    vf_coef: float = 0.1
    value_clip: float | None = None
    temperature: float = 1.0
    longest: int = 256
    sampling: str = ""
    method: str = "policy gradient"
    _critic: Critic | None = field(default=None, repr=False, compare=False)
    _policy_rests: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, known in (("reduction", Reduction), ("level", Level), ("estimator", Estimator)):
            if getattr(self, name) not in get_args(known):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(get_args(known))}")
        for name in ("epsilon", "beta", "vf_coef"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.cispo and self.epsilon_high is None:
            raise InputError("cispo needs epsilon_high, the largest ratio; give it")

    def lead(self, critic: Critic | None, rests: bool = False) -> None:
        """The critic whose values are trained too. rests: the critic alone is trained for now."""
        self._critic, self._policy_rests = critic, rests

    def tokens(self, item: Item) -> int:
        """As Objective.tokens."""
        return len(item.prompt_ids) + len(item.ids)

    def collate(self, items: Sequence[Item]) -> Batch:
        """As Objective.collate: input_ids, labels, position_ids (B, T), lengths (B,), and flat over the answers'
        tokens (N,): what `Item` holds, owner (which answer), counts."""
        rows = [[*item.prompt_ids, *item.ids] for item in items]
        lengths = torch.tensor([len(item.ids) for item in items])
        found: Batch = {
            "input_ids": padded(rows, 0),
            "labels": padded([[*[IGNORED] * len(item.prompt_ids), *item.ids] for item in items], IGNORED),
            "position_ids": places([range(len(row)) for row in rows]),
            "lengths": torch.tensor([len(row) for row in rows]),
            "attention_mask": None,
            "owner": torch.repeat_interleave(torch.arange(len(items)), lengths),
            "counts": torch.repeat_interleave(torch.tensor([item.counts for item in items]), lengths),
        }
        for name in _TENSORS:
            held = [getattr(item, name) for item in items]
            if all(value is not None for value in held):
                found[name] = torch.cat(held)
        return found

    # -- what the model says -------------------------------------------------------------------------------------

    def log_probs(self, model: Any, batch: Batch, values: bool = False) -> tuple[Tensor, Tensor | None]:
        """log p (N,) of the answers' tokens at the temperature, and with `values` the critic's (N,)."""
        without_dropout(model)
        rows, wanted = targets(*hidden_of(model, batch))
        scaled = rows if self.temperature == 1 else rows / self.temperature
        found = token_log_probs(scaled, head_of(model, rows.dtype), wanted)
        critic = self._critic
        return found, critic(model, batch, rows) if values and critic is not None else None

    # -- the loss ------------------------------------------------------------------------------------------------

    def loss(self, model: Any, batch: Batch) -> Loss:
        """As Objective.loss; units are tokens, or answers."""
        logs_N, values_N = self.log_probs(model, batch, values=True)
        wide = logs_N.dtype
        advantages, counts, owner = (batch[name] for name in ("advantages", "counts", "owner"))
        answers = len(batch["lengths"])
        advantages, counts = advantages.to(wide), counts.to(wide)
        old = batch["old"].to(wide) if "old" in batch else logs_N.detach()
        ratio = ratios(logs_N, old, owner, answers, self.level)
        if self.cispo:
            assert self.epsilon_high is not None
            found = cispo(ratio, advantages, logs_N, self.epsilon_high)
        else:
            found = surrogate(ratio, advantages, self.epsilon, self.epsilon_high, self.delta)
        loss = found.loss
        if self.cap is not None and "sampled" in batch:
            loss = loss * (old - batch["sampled"].to(wide)).exp().clamp(max=self.cap).detach()
        if self.beta:
            loss = loss + self.beta * kl(logs_N, batch["reference"].to(wide), self.estimator, ratio)
        if self._policy_rests:
            loss = loss * 0.0
        logs = self._told(batch, logs_N.detach(), old, found, counts)
        if values_N is not None:
            values_N = values_N.to(wide)
            old_values, returns = batch["values"].to(wide), batch["returns"].to(wide)
            of_value, clipped = value_loss(values_N, old_values, returns, self.value_clip)
            loss = loss + self.vf_coef * of_value
            logs |= {"value_loss": (of_value.detach() * counts), "value_clip_fraction": clipped * counts}
        return self._reduced(loss, logs, counts, owner, answers)

    def _told(self, batch: Batch, now: Tensor, old: Tensor, found: Surrogate, counts: Tensor) -> dict[str, Tensor]:
        """Returns the logged measures of each token."""
        away = now - old
        logs = {
            "entropy": -now * counts,  # its expectation over tokens that the policy has drawn
            "clip_fraction": found.clipped * counts,
            "approx_kl": away.square() / 2 * counts,
            "ratio": found.ratio.detach() * counts,
        }
        if self.beta:
            logs["kl"] = kl(now, batch["reference"].to(now.dtype), "k3") * counts
        if "sampled" in batch:
            logs["sampling_ratio"] = (old - batch["sampled"].to(now.dtype)).exp() * counts
        return logs

    def _reduced(self, loss: Tensor, logs: dict[str, Tensor], counts: Tensor, owner: Tensor, answers: int) -> Loss:
        if self.reduction == "token":
            share, units = counts, int(counts.sum())
        else:
            each = counts.new_zeros(answers).index_add(0, owner, counts).clamp(min=1)
            share, units = counts / each[owner], answers
        weights = counts / self.longest if self.reduction == "constant" else share
        # Of what is logged the mean over tokens, or over answers of their tokens' mean.
        told = share if self.reduction != "token" else torch.ones_like(share)
        return Loss((loss * weights).sum(), units, {name: float((value * told).sum()) for name, value in logs.items()})
