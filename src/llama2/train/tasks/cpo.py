"""Contrastive preference optimisation: a loss of preferences and the likelihood of the better (arXiv 2401.08417)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.options import option
from llama2.train.tasks.pairs import PairLosses, Pairs, pair_objective

if TYPE_CHECKING:
    from llama2.train.answers import LogProbs
    from llama2.train.objectives import Objective


def cpo_loss(chosen: "LogProbs", rejected: "LogProbs", tokens: float, beta: float, alpha: float) -> PairLosses:
    """-log s(beta (S_c - S_r)) - alpha S_c / tokens of each pair, S the log-probability; and beta S of both.

    tokens: mean targets of a chosen answer, so that the mean over pairs of the second term is the mean by token.
    """
    import torch.nn.functional as F

    up, down = beta * chosen.sums, beta * rejected.sums
    return -F.logsigmoid(up - down) - alpha * chosen.sums / tokens, up, down


@dataclass(frozen=True, kw_only=True)
class Cpo(Pairs):
    """Contrastive preference optimisation on {"prompt", "chosen", "rejected"}: no reference; the likelihood of the
    chosen answer is learnt as well."""

    name = "cpo"
    summary = "preferences without a reference, and the better answer itself (CPO)"
    rates = (1e-6, 5e-6)
    page = "training.md#other-objectives-of-preferences"
    natural = ("alpha",)

    beta: float = option(0.1, "scale of the difference of log-probabilities")
    alpha: float = option(1.0, "weight of the chosen answer's negative log-likelihood")

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = pair_objective(self.name, cpo_loss, items, beta=self.beta, alpha=self.alpha)
        return made
