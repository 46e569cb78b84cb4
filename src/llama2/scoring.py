"""Scores of a reward model: one number for a text, a conversation, or each of several answers to a prompt.

    scorer = Scorer(model, tokenizer)                       # LlamaForSequenceClassification with one label
    scorer([{"prompt": "...", "answers": ["...", "..."]}])  # [[0.31, -1.2]]

Rows are encoded as `llama2 finetune reward` encodes them, their end included: a reward is read at the last token. The
trunk runs on the native engine where that computes it (`runners.native`), else in torch.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from llama2.classifiers import LlamaForSequenceClassification
from llama2.errors import ContextLengthError, InputError, Llama2Error, MismatchError
from llama2.protocols import TokenizerLike
from llama2.runners.native_trunk import NativeTrunk, native_trunk
from llama2.train.data import encode

ANSWERS = ("answers", "completions", "responses")  # the column of several answers
BATCH_TOKENS = 2048  # of a pass in torch, padding included


class Scorer:
    """A reward model with its tokenizer.

    runner: "auto" takes the native engine where it computes the model, "native" insists on it, "torch" leaves it out.
    precision: of the native engine's activations, "exact" (float32) or "fast"; a reward is compared with thresholds and
    with other rewards, so exact is the default. max_length: most tokens of an answer with its prompt, by default the
    model's context.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: TokenizerLike,
        *,
        runner: str = "auto",
        precision: str = "exact",
        max_length: int | None = None,
    ) -> None:
        """Raises InputError for what is no reward model, MismatchError for a tokenizer of another vocabulary."""
        check_reward_model(model)
        if runner not in ("auto", "native", "torch"):
            raise InputError(f"runner is {runner!r}; it must be auto, native or torch")
        self.model, self.tokenizer, self.runner, self.precision = model, tokenizer, runner, precision
        context = int(model.config.max_position_embeddings)
        self.max_length = context if max_length is None else max_length
        if not 1 <= self.max_length <= context:
            raise InputError(f"max_length is {max_length}; it must be 1 to the model's context of {context}")

    def __call__(self, rows: Sequence[Any], first: int = 0) -> list[list[float]]:
        """The rewards of each row, one per answer. first: the number of the first row, for messages.

        A row is a text, a list of messages, or a dict: {"text"}, {"messages"}, {"prompt", "answers"} with a list of
        texts or of lists of messages, or a prompt with one answer in any spelling that finetune knows. Raises
        InputError, with the row's number, for any other and for a reward that is not finite, ContextLengthError for one
        that is too long.
        """
        ids, names = list[list[int]](), list[str]()
        counts = []
        for number, row in enumerate(rows, first):
            found = self._encoded(number, row)
            counts.append(len(found))
            ids += found
            names += [f"row {number}" + (f", answer {i}" if len(found) > 1 else "") for i in range(len(found))]
        rewards = iter(self.of_ids(ids, names))
        return [list(islice(rewards, count)) for count in counts]

    def of_ids(self, rows: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> list[float]:
        """The reward of each row of token ids, as they are. names: what messages call the rows."""
        called = names or [f"row {number}" for number in range(len(rows))]
        for row, name in zip(rows, called, strict=True):
            self._check(row, name)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = [0.0] * len(rows)
        for i, reward in zip(order, self._rewards([rows[i] for i in order]), strict=True):
            found[i] = reward
        if bad := [i for i, reward in enumerate(found) if not math.isfinite(reward)]:
            raise InputError(
                f"{called[bad[0]]}: the reward is {found[bad[0]]}; its weights are damaged, or too large "
                "for its dtype: load it in float32"
            )
        return found

    def _check(self, row: Sequence[int], name: str) -> None:
        vocabulary = int(self.model.config.vocab_size)
        if not row:
            raise InputError(f"{name} has no tokens; give some text")
        if len(row) > self.max_length:
            said = f"{name} has {len(row)} tokens with its prompt, and {self.max_length} fit; shorten it"
            raise ContextLengthError(said, len(row), self.max_length)
        if max(row) >= vocabulary or min(row) < 0:
            raise MismatchError(
                f"{name}: token id {max(row)} is outside the reward model's vocabulary of {vocabulary}: the tokenizer "
                "is of another model; give texts to the reward model's own tokenizer"
            )

    # -- one row -------------------------------------------------------------------------------------------------

    def _encoded(self, number: int, row: Any) -> list[list[int]]:
        try:
            return [self._ids(one) for one in _answers(row)]
        except ContextLengthError:
            raise
        except Llama2Error as error:
            raise InputError(f"row {number}: {error}") from error

    def _ids(self, row: Mapping[str, Any]) -> list[int]:
        ids = list(encode(row, self.tokenizer).input_ids)
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:  # as training does
            ids = ids[1:]
        return ids

    # -- the model -----------------------------------------------------------------------------------------------

    def _rewards(self, rows: Sequence[Sequence[int]]) -> list[float]:
        if not rows:
            return []
        trunk = self._trunk()
        if trunk is not None:
            return [float(score) for score in trunk.scores(rows, self.model.score.weight.detach())[:, 0]]
        made: list[float] = []
        while len(made) < len(rows):
            rest = rows[len(made) :]
            count = 1
            while count < len(rest) and (count + 1) * len(rest[count]) <= BATCH_TOKENS:
                count += 1
            made += self._torch(rest[:count])
        return made

    def _trunk(self) -> NativeTrunk | None:
        if self.runner == "torch":
            return None
        found = native_trunk(self.model, self.precision)
        if isinstance(found, str):
            if self.runner == "native":
                raise InputError(f"runner is 'native', and the engine does not run this model: {found}; use 'torch'")
            return None
        return found

    @torch.inference_mode()
    def _torch(self, rows: Sequence[Sequence[int]]) -> list[float]:
        longest, device = max(map(len, rows)), self.model.device
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
        was = self.model.training
        self.model.eval()
        try:
            logits = self.model(ids, mask, use_cache=False, return_dict=True).logits
        finally:
            self.model.train(was)
        found: list[float] = logits[:, 0].double().tolist()
        return found


def score(model: Any, tokenizer: TokenizerLike, rows: Sequence[Any], **options: Any) -> list[list[float]]:
    """The rewards of rows, one per answer: `Scorer(model, tokenizer, **options)(rows)`."""
    return Scorer(model, tokenizer, **options)(rows)


def check_reward_model(model: Any) -> None:
    """Raises InputError for a model that gives no reward."""
    if not isinstance(model, LlamaForSequenceClassification):
        raise InputError(
            f"the model is a {type(model).__name__}, which gives no reward; `llama2 finetune reward` trains one "
            "(LlamaForSequenceClassification with one label)"
        )
    if model.config.num_labels != 1:
        raise InputError(
            f"the model has {model.config.num_labels} labels, and a reward model has one; `llama2 classify` uses it"
        )


def _answers(row: Any) -> list[Mapping[str, Any]]:
    """A row as rows of one answer each."""
    if isinstance(row, str):
        return [{"text": row}]
    if isinstance(row, list | tuple):
        return [{"messages": row}]
    if not isinstance(row, Mapping):
        raise InputError(f"it is a {type(row).__name__}; give a text, a list of messages, or a dict")
    if name := next((name for name in ANSWERS if row.get(name) is not None), None):
        given = row[name]
        if isinstance(given, str) or not isinstance(given, Sequence) or not given:
            raise InputError(f"{name} is no list of answers; give at least one")
        if row.get("prompt") is None:
            raise InputError(f"it has {name} and no prompt; give the prompt that they answer")
        rest = {key: value for key, value in row.items() if key != name}
        return [{**rest, "completion": one} for one in given]
    if row.get("chosen") is not None and row.get("rejected") is not None:
        raise InputError("it is a pair; give {prompt, answers: [chosen, rejected]}")
    return [row]
