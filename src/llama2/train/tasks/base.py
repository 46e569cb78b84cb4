"""The interface of a task: all that `llama2 finetune` knows of one kind of training. No torch here.

A task is a class: its fields are its settings, which are flags of the command line and fields of the Recipe; its class
attributes are what the command line says and trains with unless told otherwise; its methods make items of rows, the
objective, and the report. A new one is a file in this folder and its name in `tasks.TASKS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from llama2.lazy import door
from llama2.options import option
from llama2.protocols import CausalLM, TokenizerLike
from llama2.train.data import DataReport, Row

if TYPE_CHECKING:
    from llama2.train.objectives import Objective

packed_rows = door("train.objectives", "packed_rows", "Examples as rows of at most `length` tokens.")


@dataclass(frozen=True)
class ScoreHead:
    """The classifier that takes the place of the language-model head: what its labels are called, and their kind."""

    names: tuple[str, ...]
    problem_type: str | None = None


@dataclass
class Outcome:
    """Measures of a task after training: values for finetune.json, lines for people, files by name."""

    values: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


class Task:
    """One kind of training. Its docstring is the description that --help prints."""

    name: ClassVar[str]
    summary: ClassVar[str]  # a line of `llama2 finetune --help`
    rates: ClassVar[tuple[float, float]]  # peak learning rates: of all weights, and of an adapter
    page: ClassVar[str] = "training.md"  # of docs/
    use: ClassVar[str] = "chat"  # the command that uses the result
    # Flags with another default than the command line's own, and fields of TrainingArguments without a flag.
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    least_warmup: ClassVar[int] = 0  # steps, where the share of all is less; at most half of all
    pads_apart: ClassVar[bool] = False  # whether padding must be told from the end: transformers looks for it

    # Settings that only some tasks have, as the rest have them.
    fresh: bool = False
    chat_template: str | None = None

    def check(self) -> None:
        """Raises InputError for settings outside their bounds."""

    def own_columns(self) -> dict[str, str | None]:
        """Column here -> column in the rows, as far as settings of the task name one."""
        return {}

    def learnt_of(self, rows: Sequence[Row]) -> Any:
        """Returns what items and head need of all rows together: labels. None for most tasks."""
        return None

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Any
    ) -> tuple[list[Any], DataReport]:
        """The usable rows as items of the objective, of at most `length` tokens each, and the report on all rows."""
        raise NotImplementedError

    def head(self, learnt: Any) -> ScoreHead | None:
        """The classifier's head, or None for a language model."""
        return None

    def objective(self, items: Sequence[Any]) -> "Objective":
        """Returns the training objective of the items."""
        raise NotImplementedError

    def report(self, model: CausalLM, held_out: Sequence[Any], trained_on: Sequence[Any]) -> Outcome:
        """Evaluates the trained model on items, besides its loss; empty where the loss suffices."""
        return Outcome()


@dataclass(frozen=True, kw_only=True)
class Chats(Task):
    """chats."""

    chat_template: str | None = option(None, "of messages: llama2, or a file (default: the model's)", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class Texts(Task):
    """rows."""

    packed: ClassVar[bool] = False  # where nothing is said

    packing: bool | None = option(None, "several rows in one of --max-length, none seeing another (default: pretrain)")
    text_column: str | None = option(None, "the column of the text (default: text)", metavar="NAME")

    @property
    def packs(self) -> bool:
        """Whether rows are packed."""
        return self.packed if self.packing is None else self.packing

    def own_columns(self) -> dict[str, str | None]:
        """As Task.own_columns."""
        return {"text": self.text_column}

    def objective(self, items: Sequence[Any]) -> "Objective":
        """As Task.objective."""
        made: Objective = next_token()
        return made


next_token = door("train.objectives", "NextToken", "Continuing text.")
