"""Kahneman-Tversky optimisation: answers that are good or bad, without pairs (arXiv 2402.01306)."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.options import option
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row
from llama2.train.labels import Labels
from llama2.train.tasks.pairs import Pairs, unpaired_objective
from llama2.train.unpaired import balance, unpaired

if TYPE_CHECKING:
    from torch import Tensor

    from llama2.train.objectives import Objective


def kto_loss(
    ratios: "Tensor", desirable: "Tensor", z0: float, beta: float, desirable_weight: float, undesirable_weight: float
) -> "Tensor":
    """w_D (1 - s(beta (d - z0))) of desirable answers (A,), w_U (1 - s(beta (z0 - d))) of the others.

    d = log pi - log reference of an answer, summed over its tokens; z0 the KL divergence that it is compared with.
    """
    import torch

    margin = beta * (ratios - z0)
    return torch.where(desirable, desirable_weight * torch.sigmoid(-margin), undesirable_weight * torch.sigmoid(margin))


@dataclass(frozen=True, kw_only=True)
class Kto(Pairs):
    """Kahneman-Tversky optimisation on {"prompt", "completion", "label"}, label true for a good answer and false for a
    bad one; or on pairs, which become one of each. The reference is that of dpo."""

    name = "kto"
    summary = "answers that are good or bad, without pairs (KTO)"
    rates = (1e-6, 5e-6)
    page = "training.md#other-objectives-of-preferences"
    natural = ("desirable_weight", "undesirable_weight")

    beta: float = option(0.1, "how far the model is held to the reference")
    desirable_weight: float = option(1.0, "of answers with the label true")
    undesirable_weight: float = option(1.0, "of answers with the label false")

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Labels
    ) -> tuple[list[Any], DataReport]:
        """As Task.items. Warns where the kinds of answers weigh too differently."""
        made, report = unpaired(rows, tokenizer, length)
        if made and (said := balance(made, self.desirable_weight, self.undesirable_weight)):
            warnings.warn(said, stacklevel=4)
        return list(made), report

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = unpaired_objective(
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            function=kto_loss,
        )
        return made
