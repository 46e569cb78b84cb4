"""Base class of tasks on pairs without a reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llama2.errors import InputError
from llama2.lazy import door
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row, prepare_pairs
from llama2.train.labels import Labels
from llama2.train.tasks.base import Chats

if TYPE_CHECKING:
    from torch import Tensor

pair_objective = door("train.answers", "PairObjective", "A loss of the log-probabilities of both answers.")
unpaired_objective = door("train.answers", "UnpairedObjective", "A loss of answers that are good or bad.")


PairLosses = tuple["Tensor", "Tensor", "Tensor"]  # losses of pairs, and the rewards of chosen and rejected (P,)


@dataclass(frozen=True, kw_only=True)
class Pairs(Chats):
    """chats."""

    positive: ClassVar[tuple[str, ...]] = ("beta",)  # settings that must be above 0
    natural: ClassVar[tuple[str, ...]] = ()  # settings that may be 0

    def check(self) -> None:
        """As Task.check."""
        for name in (*self.positive, *self.natural):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name in self.positive and value == 0):
                bound = "above 0" if name in self.positive else "0 or more"
                raise InputError(f"{name} is {value!r}; it must be {bound}")

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Labels
    ) -> tuple[list[Any], DataReport]:
        """As Task.items."""
        pairs, report = prepare_pairs(rows, tokenizer, length)
        return list(pairs), report
