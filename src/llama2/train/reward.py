"""A reward model: one number for a text, larger for the preferred of two (arXiv 2307.09288, section 3.2.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.protocols import CausalLM
from llama2.rope import promoted
from llama2.train.objectives import Batch, Loss, last_of, whole_rows
from llama2.train.ranking import Ranked


class RewardLoss(NamedTuple):
    """Losses of pairs (B,), and of them the part that the safety labels add."""

    total: Tensor
    safety: Tensor


def reward_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | float = 0.0,
    center: float | None = None,
    safety: float = 0.0,
    safe: Tensor | None = None,
    weight: Tensor | float = 0.5,
) -> RewardLoss:
    """The loss of each pair (B,) of rewards:

        log(1 + exp(-(chosen - rejected - margin)))                      Bradley and Terry, with Llama 2's margin
        + center (chosen + rejected)^2                                   arXiv 2312.09244
        + safety weight (bce(chosen, safe_0) + bce(rejected, safe_1))    bce(r, s) = log(1 + e^r) - s r

    safe (2, B): 1 for a safe answer, 0 for an unsafe one, NaN where nothing is known, which adds nothing. weight: 0.5
    where every answer is labelled, else pairs / labelled answers of the data set: the mean over pairs is then that over
    labelled answers. The paper names the last term without its formula.
    """
    losses = -F.logsigmoid(chosen - rejected - margin)
    if center is not None:
        losses = losses + center * (chosen + rejected) ** 2
    if not safety or safe is None:
        return RewardLoss(losses, torch.zeros_like(losses))
    rewards, known = torch.stack((chosen, rejected)), ~safe.isnan()
    each = F.softplus(rewards) - safe.nan_to_num().to(rewards.dtype) * rewards
    extra = safety * weight * (each * known).sum(0)
    return RewardLoss(losses + extra, extra)


@dataclass
class Rewards:
    """The loss of `reward_loss`, of a classifier with one label, whose output at the last token is the reward.

    Logged as TRL does: accuracy, margin, and the mean, least and greatest reward; with safety labels their loss too.
    """

    center: float | None = None
    safety: float = 0.0

    def tokens(self, item: Ranked) -> int:
        """As Objective.tokens."""
        return len(item.pair.chosen.input_ids) + len(item.pair.rejected.input_ids)

    def collate(self, items: Sequence[Ranked]) -> Batch:
        """As Objective.collate: input_ids, position_ids, labels (2 B, T), lengths (2 B,), the chosen answers first;
        margins and weights (B,), safe (2, B)."""
        ids = [item.pair.chosen.input_ids for item in items] + [item.pair.rejected.input_ids for item in items]
        nan = float("nan")
        safe = [[nan if item.safe[i] is None else item.safe[i] for item in items] for i in (0, 1)]
        numbers = {"margins": [item.margin for item in items], "weights": [item.labelled for item in items],
                   "safe": safe}  # fmt: skip
        return {**whole_rows(ids), **{name: torch.tensor(value) for name, value in numbers.items()}}

    def rewards(self, model: Any, batch: Batch) -> Tensor:
        """Rewards (2 B,), in promote(dtype, float32)."""
        logits: Tensor = model.classify(last_of(model, batch), None)[0].squeeze(-1)
        return logits.to(promoted(logits.dtype))

    def loss(self, model: CausalLM, batch: Batch) -> Loss:
        """As Objective.loss; units are pairs."""
        rewards = self.rewards(model, batch)
        chosen, rejected = rewards.chunk(2)
        found = reward_loss(
            chosen, rejected, batch["margins"], self.center, self.safety, batch["safe"], batch["weights"]
        )
        pairs, seen = len(chosen), rewards.detach()
        logs = {
            "accuracy": float((chosen > rejected).sum()),
            "margin": float((chosen - rejected).detach().sum()),
            "mean_reward": float(seen.mean()) * pairs,
            "min_reward": float(seen.min()) * pairs,
            "max_reward": float(seen.max()) * pairs,
        }
        if self.safety:
            logs["safety_loss"] = float(found.safety.detach().sum())
        return Loss(found.total.sum(), pairs, logs)
