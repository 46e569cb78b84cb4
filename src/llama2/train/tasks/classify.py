"""Labels of texts, or a number for each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.errors import InputError
from llama2.lazy import door
from llama2.options import option
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row
from llama2.train.labels import Labels, ProblemType, prepare_labelled
from llama2.train.tasks.base import ScoreHead, Task

if TYPE_CHECKING:
    from llama2.train.objectives import Objective

classification = door("train.objectives", "Classification", "Labels of whole texts.")


@dataclass(frozen=True, kw_only=True)
class Classify(Task):
    """A classifier on {"text", "label"}: a name or number per row; several in a list; or measurements (regression)."""

    name = "classify"
    summary = "labels of texts, or a number"
    rates = (2e-5, 2e-4)
    use = "classify"

    text_column: str | None = option(None, "the column of the text (default: text)", metavar="NAME")
    label_column: str | None = option(None, "the column of the label (default: label)", metavar="NAME")
    labels: tuple[str, ...] = option((), "their names in order, with commas (default: those of the rows)",
                                     metavar="A,B,C", commas=True)  # fmt: skip
    problem_type: ProblemType | None = option(
        None, "default: multi for lists, regression for numbers with fractions, else single", metavar="TYPE"
    )
    threshold: float = option(0.5, "probability from which a text has a label, of several")

    def check(self) -> None:
        """As Task.check."""
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold is {self.threshold}; it must lie between 0 and 1")

    def own_columns(self) -> dict[str, str | None]:
        """As Task.own_columns."""
        return {"text": self.text_column, "label": self.label_column}

    def learnt_of(self, rows: Sequence[Row]) -> Labels:
        """As Task.learnt_of: the labels."""
        return Labels.of(rows, self.problem_type, self.labels)

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Labels
    ) -> tuple[list[Any], DataReport]:
        """As Task.items."""
        labelled, report = prepare_labelled(rows, tokenizer, length, learnt)
        return list(labelled), report

    def head(self, learnt: Labels) -> ScoreHead:
        """As Task.head."""
        return ScoreHead(learnt.names or ("LABEL_0",), learnt.kind)

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = classification(self.threshold)
        return made
