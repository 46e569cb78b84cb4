"""Instruction tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row, prepare
from llama2.train.labels import Labels
from llama2.train.tasks.base import Chats, Texts, packed_rows


@dataclass(frozen=True, kw_only=True)
class Sft(Texts, Chats):
    """Instruction tuning: rows of {"messages"}, {"prompt", "completion"}, {"instruction", "input", "output"},
    {"conversations"} or {"text"}. Answers alone are learnt, not prompts.

    An interrupted run goes on when the same command is given again with --resume."""

    name = "sft"
    summary = "instruction tuning on prompts and answers"
    rates = (2e-5, 2e-4)

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Labels
    ) -> tuple[list[Any], DataReport]:
        """As Task.items."""
        examples, report = prepare(rows, tokenizer, length)
        return list(packed_rows(examples, length, self.packs)), report
