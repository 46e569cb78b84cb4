"""When a row is done: length, time, end ids, stop strings, and whatever the caller adds.

A criterion is called after each step with ids (B, S), the new token included, and the scores kept so far (None unless
asked for); it returns a bool per row (B,), or one bool for all. Any true one ends the row.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.generation.config import as_list


class StoppingCriteria:
    """Base of every criterion: ids (B, S) -> bool (B,), True = this row is done."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores)")


Criterion = Callable[..., Any]


def _all_rows(input_ids: Tensor, done: bool) -> Tensor:
    return torch.full((len(input_ids),), done, dtype=torch.bool, device=input_ids.device)


class MaxLengthCriteria(StoppingCriteria):
    """Done at `max_length` ids, prompt counted."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length, self.max_position_embeddings = max_length, max_position_embeddings

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        return _all_rows(input_ids, input_ids.shape[1] >= self.max_length)


class MaxTimeCriteria(StoppingCriteria):
    """Done `max_time` seconds after `initial_timestamp` (a time.time() value; default: construction)."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        if not max_time > 0:
            raise InputError(f"max_time is {max_time!r}; it must be a positive number of seconds")
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        return _all_rows(input_ids, time.time() - self.initial_timestamp > self.max_time)


class EosTokenCriteria(StoppingCriteria):
    """Done when the last id is one of the end ids."""

    def __init__(self, eos_token_id: Any) -> None:
        self.eos_token_id = torch.tensor(as_list(eos_token_id), dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        self.eos_token_id = self.eos_token_id.to(input_ids.device)
        return torch.isin(input_ids[:, -1], self.eos_token_id)


class DecodingTokenizer(Protocol):
    """The part of a tokenizer that stop strings use."""

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


class StopStringCriteria(StoppingCriteria):
    """Done when a stop string ends inside the last token, wherever its beginning lies.

    The end of the text is decoded behind a fixed word, so that a space at its start is not lost.
    """

    _PREFIX = "abcdef"

    def __init__(self, tokenizer: DecodingTokenizer, stop_strings: str | Sequence[str]) -> None:
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not strings or not all(isinstance(s, str) and s for s in strings):
            raise InputError(f"stop_strings is {stop_strings!r}; give a non-empty string or a list of them")
        self.tokenizer, self.stop_strings = tokenizer, tuple(strings)
        # A token may be a single byte: this many of them reach back to the start of the longest string.
        self.window = max(len(s.encode()) for s in strings) + 1
        ids = tokenizer(self._PREFIX, add_special_tokens=False)["input_ids"]
        self.prefix = as_list(ids)
        self._before = len(self._text([]))

    def _text(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            self.prefix + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

    def matches(self, ids: list[int]) -> bool:
        """Whether a stop string ends inside the last of `ids`."""
        tail = ids[-self.window :]
        text = self._text(tail)[self._before :]
        # A character whose last byte has just come in is new, although some bytes of it were there before.
        old = len(self._text(tail[:-1])[self._before :].rstrip("\ufffd"))
        return any(text.find(s, max(0, old - len(s) + 1)) >= 0 for s in self.stop_strings)

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        rows = input_ids[:, -self.window :].tolist()
        return torch.tensor([self.matches(row) for row in rows], dtype=torch.bool, device=input_ids.device)


class StoppingCriteriaList(list[Any]):
    """Criteria together: a row is done when any of them says so."""

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        done = _all_rows(input_ids, False)
        for criterion in self:
            done |= self._rows(criterion, criterion(input_ids, scores, **kwargs), input_ids)
        return done

    @staticmethod
    def _rows(criterion: Criterion, answer: Any, input_ids: Tensor) -> Tensor:
        if isinstance(answer, bool):
            return _all_rows(input_ids, answer)
        if isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.shape in ((len(input_ids),), ()):
            return answer.to(input_ids.device)
        raise InputError(
            f"the stopping criterion {getattr(criterion, '__name__', type(criterion).__name__)} returned "
            f"{answer!r}; it must return a bool or a bool tensor of shape ({len(input_ids)},)"
        )

    @property
    def max_length(self) -> int | None:
        """The bound of the first MaxLengthCriteria, if there is one."""
        return next((c.max_length for c in self if isinstance(c, MaxLengthCriteria)), None)
