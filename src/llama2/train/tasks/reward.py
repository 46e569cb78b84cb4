"""A reward model from ranked pairs, as Llama 2's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from llama2.errors import InputError
from llama2.lazy import door
from llama2.options import option
from llama2.protocols import CausalLM, TokenizerLike
from llama2.train.data import DataReport, Row
from llama2.train.labels import Labels
from llama2.train.ranking import Margins, check_margins, reward_pairs
from llama2.train.tasks.base import Chats, Outcome, ScoreHead

if TYPE_CHECKING:
    from llama2.train.objectives import Objective

rewards = door("train.reward", "Rewards", "The loss of pairs of rewards.")
reward_report = door("train.calibration", "reward_report", "Accuracy by rating, and calibration.")


@dataclass(frozen=True, kw_only=True)
class Reward(Chats):
    """A reward model on {"prompt", "chosen", "rejected"}: one number for an answer, larger for the preferred one. MODEL
    is a chat model, whose head gives way to one output. A row may have a rating (significantly_better, better,
    slightly_better, negligibly_better) or a numeric margin, and chosen_safe and rejected_safe (true or false).

    One epoch at Llama 2's rates: more over-fits. `llama2 score OUT rows.jsonl` uses the result."""

    name = "reward"
    summary = "a reward model: of two answers the better, as a number for each"
    rates = (1e-5, 1e-4)
    page = "training.md#reward-models"
    use = "score"
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"epochs": 1.0, "weight_decay": 0.1, "schedule": "cosine_with_min_lr"}
    )
    arguments: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"adam_beta2": 0.95, "adam_epsilon": 1e-5, "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    )
    least_warmup = 5
    pads_apart = True

    margins: Margins = option("small", "what a rating is worth: small is 1, 2/3, 1/3 and 0, large 3, 2, 1 and 0")
    safety_weight: float = option(1.0, "of the loss of safety labels, where rows have any")
    center: float = option(0.0, "of (chosen + rejected)^2, which keeps rewards around 0; 0.01 is usual")

    def check(self) -> None:
        """As Task.check."""
        check_margins(self.margins)
        for name in ("safety_weight", "center"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or a positive number")

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Labels
    ) -> tuple[list[Any], DataReport]:
        """As Task.items."""
        ranked, report = reward_pairs(rows, tokenizer, length, self.margins)
        return list(ranked), report

    def head(self, learnt: Labels) -> ScoreHead:
        """As Task.head: one output, given as it is (a regression's)."""
        return ScoreHead(("LABEL_0",), "regression")

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = rewards(self.center or None, self.safety_weight)
        return made

    def report(self, model: CausalLM, held_out: Sequence[Any], trained_on: Sequence[Any]) -> Outcome:
        """As Task.report."""
        found: Outcome = reward_report(model, held_out, trained_on)
        return found
