"""A request while the engine has it: its place in the schedule, its sampler and its text."""

from collections.abc import Callable

import numpy as np

from llama2.engine.request import EngineRequest, Finish, TokenEvent
from llama2.engine.sampler import SampledToken, TokenSampler
from llama2.engine.scheduler import Chunk
from llama2.engine.scheduler import ScheduledSequence as Scheduled
from llama2.engine.scoring import PromptScores
from llama2.engine.stop_text import StopText
from llama2.protocols import TextDecoder


class ActiveRequest:
    """A request in the engine."""

    def __init__(
        self,
        ask: EngineRequest,
        limit: int,
        decoder: TextDecoder | None,
        sink: Callable[[TokenEvent], None],
        window: int | None = None,
    ) -> None:
        """limit: tokens at which it ends, window: those that its context holds, if that is less."""
        self.ask, self.sink, self.limit = ask, sink, limit
        salt = f"{ask.tenant}\0{ask.adapter or ''}".encode()
        tokens = list(ask.prompt if ask.score_from is None else ask.prompt[:-1])
        scored = len(ask.prompt) - 1 if ask.rate_prompt or ask.score_from is not None else 0
        most = limit if window is None else min(limit, window)
        self.sequence = Scheduled(tokens, most, salt, scored, ask.owner, (ask.score_from or 1) - 1)
        self.choice = TokenSampler(ask.config, ask.prompt, limit, ask.seed, ask.logprobs, ask.processors, ask.drawn)
        self.eos = frozenset(ask.config.eos_token_ids)
        if decoder is not None and ask.continues:
            decoder.put(list(ask.prompt[-8:]))  # a character has four bytes at most, and one token more tells the start
        self.text = (
            None if decoder is None else StopText(decoder, ask.stop, ask.keep_stop, ask.config.min_new_tokens or 0)
        )
        self.guesses = 0  # of the drafter in the next step; 0 for as many as it may make
        self.ended, self.rated = False, 0  # rated: tokens of the prompt that have been told
        self.scoring = None if ask.score_from is None else PromptScores(ask)
        self.began = 0.0  # when it first ran

    def take(self, picked: SampledToken) -> bool:
        """Tells one token; whether it was the last."""
        text = "" if self.text is None else self.text.put(picked.token)
        finish: Finish | None = None
        if picked.token in self.eos:
            finish = "eos"
        elif self.text is not None and self.text.stopped:
            finish = "stop"
        elif self.choice.length == self.limit:
            finish = "length"
        if finish is not None and self.text is not None:
            text += self.text.finish()
            if self.text.stopped and finish == "length":  # bytes that were held back as half a character completed it
                finish = "stop"
        stop = self.text.stop if finish == "stop" and self.text is not None else None
        self.tell(TokenEvent(picked.token, text, picked.logprob, picked.top, finish, stop=stop))
        return finish is not None

    def rate(self, chunk: Chunk, logits_TV: np.ndarray) -> None:
        """Tells the log-probabilities of the prompt tokens that follow the tokens of a chunk."""
        rows = range(max(self.rated, chunk.start), min(chunk.start + len(chunk.tokens), self.sequence.scored))
        if not rows:
            return
        own_TV = logits_TV[rows.start - chunk.start : rows.stop - chunk.start]
        self.rated = rows.stop
        self.tell(
            TokenEvent(prompt=tuple(self.choice.rate(self.ask.prompt[i + 1], row) for i, row in zip(rows, own_TV)))
        )

    def tell(self, event: TokenEvent) -> None:
        if not self.ended:
            self.ended = event.finish is not None
            self.sink(event)
