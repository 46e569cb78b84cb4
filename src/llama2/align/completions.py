"""Answers and their rewards: OUT/completions.jsonl, a line per answer of an iteration.

{"step", "row", "k", "prompt", "completion", "ended", "reward", "rewards": {source: value}, "advantage"}; step is the
last one before the answers were drawn, advantage the mean over the answer's tokens.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from llama2.align.policy import Item
from llama2.align.prompts import PromptRow
from llama2.align.rollout import Rollout
from llama2.files import appending, replacing
from llama2.train.samples import lines_until

FILE = "completions.jsonl"


class Completions:
    """The file in a folder. Lines of iterations that a resumed run takes again are dropped at its first line."""

    def __init__(self, folder: Path) -> None:
        self._file, self._begun = folder / FILE, False

    def add(self, step: int, prompts: Sequence[PromptRow], answers: Sequence[Rollout], items: Sequence[Item]) -> None:
        """Adds the answers of an iteration; prompts: of each answer."""
        if not self._begun:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            kept = lines_until(self._file, step - 1)
            with replacing(self._file) as file:
                file.write("".join(kept).encode())
            self._begun = True
        with appending(self._file) as file:
            for prompt, answer, item in zip(prompts, answers, items, strict=True):
                line = {
                    "step": step, "row": answer.row, "k": answer.k, "prompt": prompt.content, "completion": answer.text,
                    "ended": answer.ended, "reward": _number(answer.score),
                    "rewards": {name: _number(value) for name, value in answer.parts.items()},
                    "advantage": float(item.advantages.mean()),
                }  # fmt: skip
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
