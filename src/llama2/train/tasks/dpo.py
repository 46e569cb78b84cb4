"""Direct preference optimisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.errors import InputError
from llama2.lazy import door
from llama2.options import option
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row, prepare_pairs
from llama2.train.labels import Labels
from llama2.train.preference import Preference, check_preference
from llama2.train.tasks.base import Chats

if TYPE_CHECKING:
    from llama2.train.objectives import Objective

preferences = door("train.answers", "Preferences", "Direct preference optimisation.")


@dataclass(frozen=True, kw_only=True)
class Dpo(Chats):
    """Direct preference optimisation on {"prompt", "chosen", "rejected"}: texts or lists of messages. The reference is
    the model without its adapter, or for all weights a copy of the model."""

    name = "dpo"
    summary = "preferences: of two answers the better"
    rates = (1e-6, 5e-6)

    beta: float = option(0.1, "how far the model is held to the reference")
    loss_type: Preference = option("sigmoid", "the loss")
    label_smoothing: float = option(0.0, "share of pairs that are taken to be the wrong way round")
    reference_free: bool = option(False, "without a reference")
    precompute_reference: bool = option(
        False,
        "compute what the reference gives once and keep it in OUT: for all weights no copy of the model is needed",
    )

    def check(self) -> None:
        """As Task.check."""
        check_preference(self.loss_type, self.beta, self.label_smoothing)
        if self.reference_free and self.precompute_reference:
            raise InputError("reference_free and precompute_reference exclude each other; leave one of them out")

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Labels
    ) -> tuple[list[Any], DataReport]:
        """As Task.items."""
        pairs, report = prepare_pairs(rows, tokenizer, length)
        return list(pairs), report

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = preferences(
            self.beta,
            self.loss_type,
            self.label_smoothing,
            reference_free=self.reference_free,
            precomputed=self.precompute_reference,
        )
        return made
