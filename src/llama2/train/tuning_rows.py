"""Rows as TRL's trainers take them: which tokens are targets, and what is cut where."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel
from llama2.protocols import TokenizerLike
from llama2.train.arguments import TrainingArguments
from llama2.train.data import IGNORED, DataReport, EncodedPair, Example, kind_of, pieces, prepare, prepare_pairs
from llama2.train.encoding import EVAL_ROWS, TRAINED, Encoder
from llama2.train.objectives import Objective, packed_rows
from llama2.train.ranking import Ranked, reward_pairs
from llama2.train.readers import taken

CHATS = ("messages", "conversations", "conversation")
COMPLETIONS = ("completion", "response")
_MASKS = ("completion_mask", "assistant_masks")


def dft_loss(outputs: Mapping[str, Tensor], labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Dynamic fine-tuning (arXiv 2508.05629): each target's cross entropy times its own probability, a constant of the
    backward pass; the mean over the targets of the step."""
    logits, wanted = outputs["logits"][..., :-1, :], labels[..., 1:]
    there = wanted != IGNORED
    logs = F.log_softmax(logits[there].float(), -1).gather(-1, wanted[there][:, None]).squeeze(-1)
    count = there.sum() if num_items_in_batch is None else num_items_in_batch
    return -(logs * logs.detach().exp()).sum() / count


class RowEncoder(Encoder):
    """Reads the rows of a set and tells what is left out."""

    args: Any  # an SFTConfig, DPOConfig or RewardConfig
    tokenizer: TokenizerLike  # these trainers have one always

    def items(self, dataset: Iterable[Any], name: str) -> list[Any]:
        """As Encoder.items."""
        if isinstance(dataset, Mapping):
            raise InputError(f"{name} is a dict of sets; choose one of {', '.join(map(str, dataset))}")
        rows = taken(dataset, self._most() if name == TRAINED else EVAL_ROWS, name)
        if not rows:
            raise InputError(f"{name} has no rows; give rows to {'train' if name == TRAINED else 'measure'} on")
        if not isinstance(rows[0], Mapping):
            raise InputError(f"a row of {name} is a {type(rows[0]).__name__}; it must be a dict")
        made, report = self.made(rows, name)
        if not made:
            raise InputError(f"no row of {name} can be used. {report.text()}")
        if remarks := report.remarks():
            warnings.warn(f"{name}, of {report.rows:,} rows: {'; '.join(remarks)}", stacklevel=7)
        return made

    def made(self, rows: list[Any], name: str) -> tuple[list[Any], DataReport]:
        """The items, and what was found in the rows."""
        raise NotImplementedError


class TextEncoder(RowEncoder):
    """Of SFTTrainer."""

    formatting_func: Callable[..., Any] | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TokenizerLike,
        collator: Callable[..., Any] | None,
        args: TrainingArguments,
        objective: Objective | None,
    ) -> None:
        super().__init__(model, tokenizer, collator, args, None if collator is not None else objective)

    def made(self, rows: list[Any], name: str) -> tuple[list[Any], DataReport]:
        """As RowEncoder.made."""
        args = self.args
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            return Encoder.items(self, rows, name), DataReport(rows=len(rows))
        examples, report = self._examples(rows)
        examples = self._cut(examples, report)
        packs = args.packing if name == TRAINED or args.eval_packing is None else args.eval_packing
        if self.collator is not None:
            if packs:
                raise InputError("packing and a data_collator exclude each other; leave one of them out")
            features = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
                        for ids, labels in examples]  # fmt: skip
            return Encoder.items(self, features, name), report
        return list(packed_rows(examples, args.max_length, packs)), report

    def _examples(self, rows: list[Any]) -> tuple[list[Example], DataReport]:
        if "input_ids" in rows[0]:
            return [_masked(number, row) for number, row in enumerate(rows)], DataReport(rows=len(rows))
        args, field = self.args, self.args.dataset_text_field
        if self.formatting_func is not None:
            if args.completion_only_loss:
                raise InputError("formatting_func makes one text of a row, so completion_only_loss has no meaning")
            rows = [{"text": self._formatted(row)} for row in rows]
        elif field != "text" and field in rows[0]:
            rows = [{"text": row[field]} for row in rows]
        examples, report = prepare(rows, self.tokenizer, None)
        kind = kind_of(rows[0]) if examples else ""
        if args.assistant_only_loss and examples and kind not in CHATS:
            raise InputError(f"assistant_only_loss is for chats (messages), and the rows are of {kind}; leave it out")
        if args.completion_only_loss and examples and kind not in COMPLETIONS:
            raise InputError(
                f"completion_only_loss is for rows of prompt and completion, and these are of {kind}; leave it out"
            )
        every = kind in CHATS and not args.assistant_only_loss
        every = every or (kind in COMPLETIONS and args.completion_only_loss is False)
        return [Example(ids, list(ids)) for ids, _ in examples] if every else examples, report

    def _formatted(self, row: Mapping[str, Any]) -> str:
        """A row's text; of a function that takes a batch of rows, with lists as columns, the one that it returns."""
        assert self.formatting_func is not None
        found = self.formatting_func(row)
        if not isinstance(found, str):
            found = self.formatting_func({name: [value] for name, value in row.items()})
            found = found[0] if isinstance(found, list) and len(found) == 1 else found
        if not isinstance(found, str):
            raise InputError(
                f"formatting_func returned a {type(found).__name__}; it must return the text of a row, or the list of "
                "the texts of a batch"
            )
        return found

    def _cut(self, examples: list[Example], report: DataReport) -> list[Example]:
        """Examples within max_length tokens, and those with a target left."""
        most, args = self.args.max_length, self.args
        report.max_length = most
        if args.packing and args.packing_strategy != "bfd" and most is not None:
            if args.packing_strategy == "wrapped":
                warnings.warn(
                    "packing_strategy 'wrapped' lets no row see another here: it is 'bfd_split'", stacklevel=9
                )
            return pieces(examples, most)
        kept = []
        for number, (ids, labels) in enumerate(examples):
            if most is not None and len(ids) > most:
                report.truncated.append(number)
                part = slice(most) if args.truncation_mode == "keep_start" else slice(-most, None)
                ids, labels = ids[part], labels[part]
            if all(label == IGNORED for label in labels[1:]):
                report.problems[number] = "no target is left within the longest length"
                continue
            kept.append(Example(ids, labels))
        return kept


def _masked(number: int, row: Mapping[str, Any]) -> Example:
    """A row of ids: its labels, or all ids, or those that a mask of TRL's says are learnt."""
    ids = [int(i) for i in row["input_ids"]]
    labels = list(ids) if row.get("labels") is None else [int(i) for i in row["labels"]]
    for name in _MASKS:
        if row.get(name) is not None:
            labels = [label if on else IGNORED for label, on in zip(labels, row[name], strict=True)]
    if len(ids) != len(labels):
        raise InputError(f"row {number} has {len(ids)} input_ids and {len(labels)} labels; give as many")
    return Example(ids, labels)


class PairEncoder(RowEncoder):
    """Of DPOTrainer."""

    def made(self, rows: list[Any], name: str) -> tuple[list[EncodedPair], DataReport]:
        """As RowEncoder.made."""
        args = self.args
        pairs, report = prepare_pairs(rows, self.tokenizer, None)
        report.max_length = args.max_length
        made = []
        for number, pair in enumerate(pairs):
            cuts = [self._cut(number, answer, report) for answer in pair]
            if any(all(label == IGNORED for label in cut.labels[1:]) for cut in cuts):
                report.problems[number] = "no target is left within the longest length"
                continue
            made.append(EncodedPair(*cuts))
        return made, report

    def _cut(self, number: int, answer: Example, report: DataReport) -> Example:
        args = self.args
        start = next((i for i, label in enumerate(answer.labels) if label != IGNORED), len(answer.labels))
        prompt, ids = answer.input_ids[:start], answer.input_ids[start:]
        if args.max_prompt_length is not None:
            prompt = prompt[-args.max_prompt_length :]
        labels = answer.labels[start:]
        if args.max_completion_length is not None:
            ids, labels = ids[: args.max_completion_length], labels[: args.max_completion_length]
        found = Example([*prompt, *ids], [*[IGNORED] * len(prompt), *labels])
        most = args.max_length
        if most is not None and len(found.input_ids) > most:
            report.truncated.append(number)
            part = slice(most) if args.truncation_mode == "keep_start" else slice(-most, None)
            found = Example(found.input_ids[part], found.labels[part])
        return found


class RewardEncoder(RowEncoder):
    """Of RewardTrainer."""

    def made(self, rows: list[Any], name: str) -> tuple[list[Ranked], DataReport]:
        """As RowEncoder.made."""
        return reward_pairs(rows, self.tokenizer, self.args.max_length)
