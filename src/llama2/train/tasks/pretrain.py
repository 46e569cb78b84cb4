"""Continued pretraining, or training from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama2.errors import InputError
from llama2.options import option
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, Row, kind_of, pieces, prepare
from llama2.train.labels import Labels
from llama2.train.tasks.base import Texts, packed_rows


@dataclass(frozen=True, kw_only=True)
class Pretrain(Texts):
    """Continued pretraining, or training from nothing, on {"text"} rows or a .txt file: every token is learnt."""

    name = "pretrain"
    summary = "plain text, continued or from nothing"
    rates = (5e-5, 2e-4)
    packed = True

    fresh: bool = option(False, "new random weights of the model's configuration")

    def items(
        self, rows: Sequence[Row], tokenizer: TokenizerLike, length: int, learnt: Labels
    ) -> tuple[list[Any], DataReport]:
        """As Task.items. Long texts are cut in pieces, so that nothing is lost."""
        if kinds := {kind_of(row) for row in rows if row.get("text") is None}:
            raise InputError(f"pretraining takes rows with a text, not {', '.join(sorted(kinds))}; use sft for those")
        examples, report = prepare(rows, tokenizer, None)
        return list(packed_rows(pieces(examples, length), length, self.packs)), report
