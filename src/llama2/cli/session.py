"""One model answering prompts at a terminal: the cache kept between prompts, the text as it comes, the speeds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama2.cli.steps import Continuation, make_steps
from llama2.cpu import KvDtype
from llama2.errors import InputError
from llama2.generation.config import GenerationConfig
from llama2.rope_types import context_limit


@dataclass
class SpokenAnswer:
    """The text of an answer and its timing. Seconds: `first` from the call to the first token, `rest` from there to the
    last."""

    prompt_tokens: int
    prefilled: int  # prompt tokens that were run now; the others were in the cache
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0
    ended: Literal["end", "length", "context", "interrupt"] = "end"

    def speed(self) -> str:
        """One line: prompt, time to the first token, answer."""
        reused = self.prompt_tokens - self.prefilled
        prompt = f"prompt {self.prefilled} tokens" + (f" (+{reused} cached)" if reused else "")
        prompt += f", {self.prefilled / max(self.first, 1e-9):.0f} tokens/s; first token after {self.first:.2f} s"
        answer = f"answer {self.tokens} tokens"
        if self.tokens > 1:
            answer += f", {(self.tokens - 1) / max(self.rest, 1e-9):.1f} tokens/s"
        return f"{prompt}; {answer}{_ENDINGS[self.ended]}"


_ENDINGS = {
    "end": "",
    "length": "; cut at --max-new-tokens",
    "context": "; cut at the end of the context",
    "interrupt": "; interrupted",
}


class Speaker:
    """A model, its tokenizer and one cache. A prompt that begins as the last one did runs only its new part."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        runner: str = "auto",
        cache_dtype: KvDtype | None = None,
        precision: str = "fast",
    ) -> None:
        """model: CpuModel, NativeModel or LlamaForCausalLM."""
        self.model, self.tokenizer = model, tokenizer
        self._steps = make_steps(model, runner, cache_dtype, precision)
        self._held: list[int] = []  # the ids whose keys and values the cache holds
        self.forget()

    @property
    def engine(self) -> str:
        """Name of the implementation that runs the network."""
        return self._steps.engine

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer share; None where RoPE stretches without a bound."""
        return context_limit(self.model.config)

    def say(
        self,
        ids: Sequence[int],
        settings: GenerationConfig,
        write: Callable[[str], None],
        *,
        seed: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
        continues: bool = False,
        processors: Sequence[Any] = (),
    ) -> SpokenAnswer:
        """Continues the prompt, handing each piece of text to `write`, until it ends or `stopped` says so.

        continues=True: the text goes on from the prompt, so its first space counts; else it stands by itself.
        processors: logits processors of this answer alone.
        Raises InputError for an empty prompt and for one that leaves no room in the context.
        """
        ids = list(ids)
        new, limited = self._room(ids, settings)
        began = time.perf_counter()
        answer = SpokenAnswer(len(ids), len(ids) - self._reuse(ids))
        decoder = self.tokenizer.stream_decoder(skip_special_tokens=True)
        if continues:
            decoder.put(ids)
        said: list[int] = []
        pieces: list[str] = []
        try:
            continuation = Continuation(ids, settings, self.tokenizer, new, seed, processors)
            for number, token in enumerate(self._steps.tokens(continuation), 1):
                said.append(token)
                if len(said) == 1:
                    answer.first = time.perf_counter() - began
                if piece := decoder.put(said[-1]):
                    pieces.append(piece)
                    write(piece)
                if number < new and stopped():
                    answer.ended = "interrupt"
                    break
        except BaseException:
            self.forget()  # a step may have filled some layers of the cache and not the others
            raise
        if piece := decoder.finish():
            pieces.append(piece)
            write(piece)
        answer.rest = time.perf_counter() - began - answer.first
        answer.text, answer.tokens = "".join(pieces), len(said)
        if answer.ended == "end" and len(said) == new and said[-1] not in self._end_ids(settings):
            answer.ended = "context" if limited else "length"
        self._held = (ids + said)[: self._steps.length]
        return answer

    def forget(self) -> None:
        """Empties the cache."""
        # Without a bound on the context the native cache still needs one; its pages cost memory only once written.
        self._steps.forget(self.context or 16 * self.model.config.max_position_embeddings)
        self._held = []

    def _reuse(self, ids: list[int]) -> int:
        """Crops the cache to the beginning that it shares with `ids`, at most all but the last; its length."""
        most = min(len(self._held), len(ids) - 1)
        shared = next((i for i in range(most) if self._held[i] != ids[i]), most)
        self._steps.crop(shared)
        return shared

    def _room(self, ids: list[int], settings: GenerationConfig) -> tuple[int, bool]:
        """How many new tokens at most, and whether it is the context that says so."""
        if not ids:
            raise InputError("the prompt is empty and this tokenizer adds no token of its own; give some text")
        wanted = settings.max_new_tokens
        assert wanted is not None
        if self.context is None:
            return wanted, False
        left = self.context - len(ids)
        if left < 1:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but prompt and answer share the model's context of {self.context}; "
                f"shorten the prompt to at most {self.context - 1} tokens"
            )
        return min(wanted, left), left < wanted

    def _end_ids(self, settings: GenerationConfig) -> list[int]:
        own = self.model.generation_config.eos_token_ids
        return settings.eos_token_ids if settings.is_set("eos_token_id") else own
