"""A reward model: one number for a text, larger for the preferred of two (arXiv 2203.02155, section 3.5)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from llama2.errors import InputError
from llama2.protocols import TokenizerLike
from llama2.train.data import DataReport, EncodedPair, Example, prepare_pairs
from llama2.train.objectives import Batch, Loss, last_of, whole_rows

_IDS = (("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids"),
        ("input_ids_chosen", "input_ids_rejected"))  # fmt: skip


class Ranked(NamedTuple):
    """Two answers, and by how much the better one should win."""

    pair: EncodedPair
    margin: float = 0.0


@dataclass
class Rewards:
    """-log s(r_chosen - r_rejected - margin) + center (r_chosen + r_rejected)^2, of a classifier with one label.

    A reward is the classifier's output at the last token. Logged as TRL does: accuracy, margin, and the mean, least and
    greatest reward.
    """

    center: float | None = None

    def tokens(self, item: Ranked) -> int:
        """As Objective.tokens."""
        return len(item.pair.chosen.input_ids) + len(item.pair.rejected.input_ids)

    def collate(self, items: Sequence[Ranked]) -> Batch:
        """As Objective.collate: input_ids, position_ids, labels (2 B, T), lengths (2 B,), margins (B,); the chosen
        answers first."""
        ids = [item.pair.chosen.input_ids for item in items] + [item.pair.rejected.input_ids for item in items]
        return {**whole_rows(ids), "margins": torch.tensor([item.margin for item in items])}

    def loss(self, model: Any, batch: Batch) -> Loss:
        """As Objective.loss; units are pairs."""
        logits, _ = model.classify(last_of(model, batch), None)
        rewards = logits.squeeze(-1).float()
        chosen, rejected = rewards.chunk(2)
        losses = -F.logsigmoid(chosen - rejected - batch["margins"])
        if self.center is not None:
            losses = losses + self.center * (chosen + rejected) ** 2
        pairs, seen = len(chosen), rewards.detach()
        logs = {
            "accuracy": float((chosen > rejected).sum()),
            "margin": float((chosen - rejected).detach().sum()),
            "mean_reward": float(seen.mean()) * pairs,
            "min_reward": float(seen.min()) * pairs,
            "max_reward": float(seen.max()) * pairs,
        }
        return Loss(losses.sum(), pairs, logs)


def reward_pairs(
    rows: Iterable[Mapping[str, Any]], tokenizer: TokenizerLike, max_length: int | None
) -> tuple[list[Ranked], DataReport]:
    """Rows of {"chosen", "rejected"}, with or without prompt and margin, as texts, chats or ids.

    Pairs with an answer beyond max_length are left out, as in TRL. Raises InputError for a margin that is no number.
    """
    report, made = DataReport(max_length=max_length), list[Ranked]()
    for number, row in enumerate(rows):
        report.rows += 1
        margin = _margin(row.get("margin"))
        names = next((names for names in _IDS if all(row.get(name) is not None for name in names)), None)
        if names is not None:
            pairs = [EncodedPair(*(Example(list(row[name]), list(row[name])) for name in names))]
        else:
            pairs, one = prepare_pairs([{k: v for k, v in row.items() if k != "margin"}], tokenizer, None)
            report.kinds += one.kinds
            report.unused.update(one.unused)
            if one.problems:
                report.problems[number] = one.problems[0]
        for pair in pairs:
            if max_length is not None and max(len(answer.input_ids) for answer in pair) > max_length:
                report.problems[number] = f"an answer is longer than {max_length} tokens (max_length)"
                continue
            made.append(Ranked(pair, margin))
            report.tokens += sum(len(answer.input_ids) for answer in pair)
    return made, report


def _margin(value: Any) -> float:
    try:
        return 0.0 if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"margin is {value!r}; it must be a number") from error
