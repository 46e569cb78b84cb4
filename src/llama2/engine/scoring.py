"""Log-probabilities of a prompt's tokens, many rows at once."""

from collections.abc import Sequence

import numpy as np

from llama2.engine.request import EngineRequest, Score, TokenEvent
from llama2.engine.scheduler import Chunk
from llama2.errors import ContextLengthError, InputError


def scores(logits_TV: np.ndarray, targets: Sequence[int], endings: Sequence[int] = ()) -> list[Score]:
    """The score of each target (T,) under its row of logits, then of each ending under the last row.

    The sum of a row is taken in float64, whatever the logits are in.
    """
    most_T = logits_TV.max(-1)
    total_T = np.exp(logits_TV - most_T[:, None]).sum(-1, dtype=np.float64)
    rows = [*range(len(targets)), *[len(targets) - 1] * len(endings)]
    chosen = logits_TV[rows, [*targets, *endings]]
    # float32 of the difference from the row's maximum is as exact as the logits themselves
    values = (chosen - most_T[rows]).astype(np.float64) - np.log(total_T[rows])
    first_T = logits_TV.argmax(-1)
    firsts = [first_T[row] == token for row, token in zip(rows, [*targets, *endings], strict=True)]
    return [Score(float(value), bool(first)) for value, first in zip(values, firsts, strict=True)]


class PromptScores:
    """The scores of one request's prompt, as its chunks are computed."""

    def __init__(self, ask: EngineRequest) -> None:
        self._ask, self._scores = ask, list[Score]()

    def add(self, chunk: Chunk, logits_TV: np.ndarray | None) -> TokenEvent | None:
        """Takes in the logits of a chunk's wanted tokens; the request's event after the last of them."""
        start = chunk.start + chunk.skipped
        if logits_TV is not None:
            targets = self._ask.prompt[start + 1 : start + 1 + len(logits_TV)]
            self._scores += scores(logits_TV, targets, self._ask.endings if chunk.sampled else ())
        return TokenEvent(scores=tuple(self._scores), finish="length") if chunk.sampled else None


def scored_limit(ask: EngineRequest, most: int) -> int:
    """Tokens of a prompt to be scored, of which `most` can be computed. Raises InputError where it cannot be."""
    held = len(ask.prompt)
    if ask.score_from is not None and not 1 <= ask.score_from < held:
        raise InputError(
            f"score_from is {ask.score_from}; it must be between 1 and {held - 1}, the prompt's last index"
        )
    if held - 1 > most:
        raise ContextLengthError(
            f"the prompt has {held} tokens to be scored, but context and cache hold {most} before the last; shorten it",
            held - 1,
            most,
        )
    return held
