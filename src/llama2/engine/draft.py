"""Guesses that a step checks: what followed earlier in the text, or what a smaller model would write.

A guess holds only if it is the token that would have been picked without it, so guesses change no text and no draw. The
smaller model draws with the random numbers that the request will use for the same places, which makes the two agree as
often as their distributions overlap in the order of the ids.

The smaller model keeps its keys and values in pages of the same numbers as the model's: whatever the model computes or
finds again, the smaller one has too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from llama2.cpu import CpuModel, KvDtype
from llama2.engine.plan_runners import make_plan_runner
from llama2.engine.sampler import TokenSampler
from llama2.engine.scheduler import Chunk
from llama2.engine.scheduler import ScheduledSequence as Scheduled
from llama2.errors import InputError
from llama2.generation.drafts import check_vocabularies
from llama2.protocols import CausalLM

UNKNOWN = -1  # a guess for which the plan has a place and the drafter has yet to find a token


class Drafter:
    """A smaller model with the model's vocabulary. count: guesses of a sequence in a step at most."""

    def __init__(
        self,
        model: CausalLM,
        draft: CausalLM,
        pages: int,
        count: int,
        runner: str = "auto",
        dtype: KvDtype | None = None,
    ) -> None:
        """runner, dtype: as make_plan_runner; a NativeModel runs natively whatever they say.

        Raises InputError where the vocabularies differ, and for a count that guesses nothing.
        """
        check_vocabularies("draft model", draft.config.vocab_size, model.config.vocab_size)
        if count < 1:
            raise InputError(f"guesses is {count}, so the draft model would never run; give at least 1, or no draft")
        self.runner = make_plan_runner(draft, pages, "auto" if isinstance(draft, CpuModel) else runner, dtype)
        self.count, self._context = count, int(draft.config.max_position_embeddings)
        self._missing: WeakKeyDictionary[Scheduled, int] = WeakKeyDictionary()  # last positions it has not run

    def fill(self, chunks: Sequence[Chunk], choice: Callable[[Chunk], TokenSampler]) -> list[Chunk]:
        """Runs what the chunks bring, and finds their unknown guesses; a chunk may come back with fewer."""
        texts = {c.sequence: self._known(c) for c in chunks}
        ran = [c for c in texts.values() if c.start + len(c.tokens) <= self._context]
        going = {c.sequence: c for c in chunks if _asks(c)}
        guesses: dict[Scheduled, list[int]] = {sequence: [] for sequence in going}
        while ran:
            asking = [c.sequence for c in ran if c.wanted]
            for sequence, logits in zip(asking, self.runner.step(ran, [None] * len(ran)), strict=True):
                own_guesses = guesses[sequence]
                own_guesses.append(choice(going[sequence]).guess(logits[-1], len(own_guesses)))
            ran = [self._next(texts[s], guesses[s]) for s in asking if len(guesses[s]) < going[s].drafted]
            ran = [c for c in ran if c.start < self._context]
        for chunk in chunks:
            own = guesses.get(chunk.sequence)  # of these the last has not run; of those looked up, none has
            self._missing[chunk.sequence] = chunk.drafted if own is None else min(len(own), 1)
        return [_guessed(c, guesses[c.sequence]) if c.sequence in guesses else c for c in chunks]

    def settle(self, chunk: Chunk, held: int) -> None:
        """Receives how many guesses of a chunk held: of those that did not, nothing is missing."""
        wrong = chunk.drafted - held
        self._missing[chunk.sequence] = max(self._missing.get(chunk.sequence, 0) - wrong, 0)

    def _known(self, chunk: Chunk) -> Chunk:
        """Returns the tokens of a chunk that are not guesses, after the missing positions."""
        tokens = chunk.tokens[: len(chunk.tokens) - chunk.drafted]
        start = max(chunk.start - self._missing.get(chunk.sequence, 0), 0)
        return Chunk(chunk.sequence, start, chunk.sequence.tokens[start : chunk.start] + tokens, _asks(chunk))

    def _next(self, text: Chunk, guesses: list[int]) -> Chunk:
        return Chunk(text.sequence, text.start + len(text.tokens) + len(guesses) - 1, guesses[-1:], True)


def _asks(chunk: Chunk) -> bool:
    return chunk.drafted > 0 and chunk.tokens[-1] == UNKNOWN


def _guessed(chunk: Chunk, guesses: list[int]) -> Chunk:
    known = chunk.tokens[: len(chunk.tokens) - chunk.drafted]
    return replace(chunk, tokens=known + guesses, drafted=len(guesses))
