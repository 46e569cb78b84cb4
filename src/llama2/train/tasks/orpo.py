"""Odds ratio preference optimisation: instruction tuning and preferences in one (arXiv 2403.07691)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.options import option
from llama2.train.tasks.pairs import PairLosses, Pairs, pair_objective

if TYPE_CHECKING:
    from torch import Tensor

    from llama2.train.answers import LogProbs
    from llama2.train.objectives import Objective


def orpo_loss(chosen: "LogProbs", rejected: "LogProbs", tokens: float, beta: float) -> PairLosses:
    """-S_c / tokens - beta log s(o_c - o_r) of each pair; and beta a of both.

    o = a - log(1 - e^a) are the log-odds of a, the mean log-probability by token; S its sum. beta is the paper's
    lambda. tokens: mean targets of a chosen answer, so that the mean over pairs of the first term is the mean by token.
    """
    import torch
    import torch.nn.functional as F

    def log_odds(a: "Tensor") -> "Tensor":
        a = a.clamp(max=-torch.finfo(a.dtype).eps)  # an answer that is certain has infinite odds
        return a - torch.where(a > -0.6931, (-a.expm1()).log(), (-a.exp()).log1p())

    up, down = chosen.means, rejected.means
    return -chosen.sums / tokens - beta * F.logsigmoid(log_odds(up) - log_odds(down)), beta * up, beta * down


@dataclass(frozen=True, kw_only=True)
class Orpo(Pairs):
    """Odds ratio preference optimisation on {"prompt", "chosen", "rejected"}, from a base model: the chosen answer is
    learnt, and its odds against the rejected one's. No reference, and no instruction tuning before."""

    name = "orpo"
    summary = "instruction tuning and preferences in one (ORPO)"
    rates = (8e-6, 8e-5)
    page = "training.md#other-objectives-of-preferences"

    beta: float = option(0.1, "weight of the odds ratio (the paper's lambda)")

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = pair_objective(self.name, orpo_loss, items, beta=self.beta)
        return made
