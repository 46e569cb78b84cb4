"""Simple preference optimisation: the reward is the likelihood by token (arXiv 2405.14734)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.options import option
from llama2.train.tasks.pairs import PairLosses, Pairs, pair_objective

if TYPE_CHECKING:
    from llama2.train.answers import LogProbs
    from llama2.train.objectives import Objective


def simpo_loss(chosen: "LogProbs", rejected: "LogProbs", tokens: float, beta: float, gamma: float) -> PairLosses:
    """-log s(beta (a_c - a_r) - gamma) of each pair, a the mean log-probability by token; and beta a of both."""
    import torch.nn.functional as F

    up, down = beta * chosen.means, beta * rejected.means
    return -F.logsigmoid(up - down - gamma), up, down


@dataclass(frozen=True, kw_only=True)
class Simpo(Pairs):
    """Simple preference optimisation on {"prompt", "chosen", "rejected"}: no reference; the reward of an answer is its
    mean log-probability by token, which no length inflates."""

    name = "simpo"
    summary = "preferences without a reference, by likelihood per token (SimPO)"
    rates = (1e-6, 5e-6)
    page = "training.md#other-objectives-of-preferences"
    natural = ("gamma",)

    beta: float = option(2.0, "scale of the reward (2 to 2.5 is usual)")
    gamma: float = option(1.0, "by how much the better answer should win; 0.3 to 0.6 of beta is usual")

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = pair_objective(self.name, simpo_loss, items, beta=self.beta, gamma=self.gamma)
        return made
