"""A generation request: the one type that every dialect parses into, and the bounds that hold for all of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llama2.engine.engine import Engine, EngineRequest
from llama2.engine.request import ContextShift
from llama2.generation.config import GenerationConfig
from llama2.generation.samplers import SamplerSettings, chain
from llama2.serve.constraint import Constrained, Constraint
from llama2.serve.errors import Refusal
from llama2.serve.logits_processors import Bias, CountPenalty, Watermark

SEED_BITS = 2**63 - 1
MOST_CONTEXTS = 16  # contexts that one answer may fill, where it goes on beyond the first


@dataclass(frozen=True)
class Bounds:
    """Upper bounds of a request."""

    max_input_tokens: int
    max_total_tokens: int
    max_best_of: int = 8
    max_stop_sequences: int = 16
    max_stop_characters: int = 512  # of one stop string
    max_top_n_tokens: int = 20
    max_client_batch_size: int = 32
    max_messages: int = 2048
    max_tools: int = 512
    max_tokenize_bytes: int = 262_144  # of the texts of /tokenize and /chat_tokenize
    max_told_tokens: int = 1_000_000  # tokens of an answer that is sent at once, likeliest ones that are told included

    def within(self, context: int | None) -> "Bounds":
        """These bounds for a request that asks for a smaller context itself."""
        if context is None or context >= self.max_total_tokens:
            return self
        total = max(context, 2)
        return replace(self, max_total_tokens=total, max_input_tokens=min(self.max_input_tokens, total - 1))


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. A None temperature takes the likeliest; the others are off at their defaults.

    chain: llama.cpp's samplers, in place of temperature, top-k, top-p, min-p and typical-p, which it has too.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    watermark: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    chain: SamplerSettings | None = None

    def settings(self, eos: list[int], vocabulary: int) -> dict[str, Any]:
        """As settings of generate(), every one of them given, so that none comes from the checkpoint."""
        found: dict[str, Any] = {
            "do_sample": self.temperature is not None,
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": [*([] if self.ignore_eos else eos), *self.stop_ids],
        }
        if self.temperature is not None and self.chain is not None:
            found |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "min_p": None}
        elif self.temperature is not None:
            found |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
            found |= {"typical_p": self.typical_p, "min_p": self.min_p or None}
        if self.min_tokens:
            found["min_new_tokens"] = self.min_tokens
        if self.bad_words:
            found["bad_words_ids"] = [list(word) for word in self.bad_words]
        if self.allowed_ids is not None:
            found["suppress_tokens"] = sorted(set(range(vocabulary)) - set(self.allowed_ids))
        return found


@dataclass(frozen=True)
class GenerationRequest:
    """Prompts of ids and how each is continued `best_of` times, of which `n` are told.

    max_new_tokens: None fills the context, as does a number beyond it. context: tokens of prompt and answer at most,
    where the request asks for fewer than the server has. keep: the answer may go on beyond the context, from so many
    tokens of the beginning and the newer half of the others; None ends it there. warnings: what of the body is not
    obeyed. prompt_logprobs, logprobs, continues: see `engine.Ask`. keep_stop: the text ends behind the stop string.
    salt: requests of another salt share no cached prefix. owner: whose limits and whose share of the engine they take.
    """

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling = Sampling()
    max_new_tokens: int | None = None
    n: int = 1
    best_of: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    continues: bool = False
    constraint: Constraint | None = None
    adapter: str | None = None
    salt: str = ""
    owner: str = ""
    stream: bool = False
    skip_special_tokens: bool = True
    context: int | None = None
    keep: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def answers(self) -> int:
        """How many answers the engine makes."""
        return len(self.prompts) * self.best_of

    def new_tokens(self, prompt: int, bounds: Bounds) -> int:
        """The most new tokens behind a prompt of so many, within bounds that hold for this request."""
        room = bounds.max_total_tokens - prompt
        if self.max_new_tokens is None:
            return room
        return min(self.max_new_tokens, room if self.keep is None else MOST_CONTEXTS * bounds.max_total_tokens)

    def check(self, bounds: Bounds, vocabulary: int) -> None:
        """Raises Refusal for what the bounds forbid; the engine checks what it alone knows."""
        bounds = bounds.within(self.context)
        _most("the number of prompts", len(self.prompts), bounds.max_client_batch_size, "prompt")
        _most("n", self.n, bounds.max_best_of, "n")
        _most("best_of", self.best_of, bounds.max_best_of, "best_of")
        _most("the number of stop strings", len(self.stop), bounds.max_stop_sequences, "stop")
        _most("a stop string's length", max(map(len, self.stop), default=0), bounds.max_stop_characters, "stop")
        if "" in self.stop:
            raise Refusal("validation", "a stop string is empty, which every text contains; leave it out", "stop")
        if self.best_of < self.n:
            raise Refusal("validation", f"best_of is {self.best_of}; it must be at least n, {self.n}", "best_of")
        if self.logprobs is not None:
            _most("logprobs", self.logprobs, bounds.max_top_n_tokens, "logprobs")
        allowed = self.sampling.allowed_ids
        if allowed == ():
            raise Refusal("validation", "allowed_token_ids is empty; allow at least one token", "allowed_token_ids")
        for token in (*self.sampling.bias, *self.sampling.stop_ids, *(allowed or ())):
            if not 0 <= token < vocabulary:
                raise Refusal("validation", f"token id {token} does not exist; ids run from 0 to {vocabulary - 1}")
        for prompt in self.prompts:
            self._check_length(len(prompt), bounds)
        self._check_size(bounds)

    def _check_size(self, bounds: Bounds) -> None:
        """An answer that is sent at once is held until then, in all its parts."""
        if self.stream:
            return
        each = 1 + (self.logprobs or 0)
        told = 0
        for prompt in self.prompts:
            told += self.best_of * self.new_tokens(len(prompt), bounds) * each
            told += len(prompt) * each if self.prompt_logprobs else 0
        if told > bounds.max_told_tokens:
            raise Refusal(
                "validation",
                f"the answer may tell {told} tokens with their likeliest rivals, and {bounds.max_told_tokens} are the "
                "most that are sent at once; stream it, or ask for fewer answers, tokens or logprobs",
            )

    def _check_length(self, held: int, bounds: Bounds) -> None:
        if held < 1:
            raise Refusal(
                "validation", "the prompt is empty and this tokenizer adds no token of its own; give some text"
            )
        if held > bounds.max_input_tokens:
            raise Refusal(
                "context",
                f"the prompt has {held} tokens but at most {bounds.max_input_tokens} are taken (max_input_tokens); "
                "shorten it",
            )

    def engine_requests(
        self, engine: Engine, bounds: Bounds, constrained: Callable[[int], Constrained] | None
    ) -> list[EngineRequest]:
        """The engine's requests, `best_of` for each prompt in turn. Raises InputError. May take milliseconds.

        constrained: makes what holds an answer behind so many tokens to the constraint, where there is one.
        """
        own: GenerationConfig = engine.model.generation_config
        bounds = bounds.within(self.context)
        settings = self.sampling.settings(own.eos_token_ids, engine.model.config.vocab_size)
        found = []
        for i, prompt in enumerate(self.prompts):
            settings["max_new_tokens"] = self.new_tokens(len(prompt), bounds)
            ask = engine.ask(
                prompt,
                stop=self.stop,
                keep_stop=self.keep_stop,
                logprobs=0 if self.logprobs is None and self.best_of > self.n else self.logprobs,
                adapter=self.adapter,
                tenant=self.salt,
                skip_special_tokens=self.skip_special_tokens,
                **settings,
            )
            if self.keep is not None:
                most = bounds.max_total_tokens
                ask = replace(ask, shift=ContextShift(min(self.keep, max(most - 4, 0)), most))
            ask = replace(
                ask, owner=self.owner, continues=self.continues, rate_prompt=self.prompt_logprobs and len(prompt) > 1
            )
            for j in range(self.best_of):
                seed = (self.seed + i * self.best_of + j) & SEED_BITS
                processors = self._processors(len(prompt), constrained)
                if self.sampling.chain is not None:
                    processors += tuple(chain(self.sampling.chain, seed, engine.tokenizer.token_bytes))
                found.append(replace(ask, seed=seed, processors=processors, rate_prompt=ask.rate_prompt and j == 0))
        return found

    def _processors(self, prompt: int, held: Callable[[int], Constrained] | None) -> tuple[Any, ...]:
        sampling = self.sampling
        found: list[Any] = [Watermark()] if sampling.watermark else []
        if sampling.bias:
            found.append(Bias(sampling.bias))
        if sampling.frequency_penalty or sampling.presence_penalty:
            found.append(CountPenalty(sampling.frequency_penalty, sampling.presence_penalty, prompt))
        if held is not None:
            found.append(held(prompt))
        return tuple(found)


def _most(what: str, value: int, bound: int, param: str) -> None:
    if value > bound:
        raise Refusal("validation", f"{what} is {value}; at most {bound} is allowed here", param)


def placed(
    prompts: Iterable[tuple[int, ...]], bounds: Bounds, new_tokens: int | None, overflow: str
) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
    """Prompts that leave room for an answer, and warnings of what that took.

    new_tokens: new tokens asked for, None for what there is room for. overflow: "refuse" leaves a prompt that is too
    long to `GenerationRequest.check`, else its oldest tokens are left out; "shift": the answer needs no room beside it.
    """
    warnings: list[str] = []
    found = tuple(prompts)
    if overflow != "refuse":
        beside = None if overflow == "shift" else new_tokens
        found = tuple(fitted(prompt, bounds, beside, warnings) for prompt in found)
    room = bounds.max_total_tokens - max(map(len, found), default=0)
    if overflow == "shift" and room > 0:
        room = MOST_CONTEXTS * bounds.max_total_tokens
    if new_tokens is not None and new_tokens > room > 0:
        warnings.append(f"{new_tokens} new tokens were asked for and {room} fit behind the prompt")
    return found, warnings


def prompt_room(bounds: Bounds, new_tokens: int | None) -> int:
    """Tokens of a prompt that leave room for an answer of `new_tokens` tokens, but for half of the context at most."""
    total = bounds.max_total_tokens
    return min(bounds.max_input_tokens, total - min(total // 4 if new_tokens is None else new_tokens, total // 2))


def fitted(prompt: tuple[int, ...], bounds: Bounds, new_tokens: int | None, warnings: list[str]) -> tuple[int, ...]:
    """A prompt without its oldest tokens, as many as leave room for an answer; its first token, a BOS, stays.

    new_tokens: new tokens asked for. Adds to warnings what it did.
    """
    most = prompt_room(bounds, new_tokens)
    if len(prompt) <= (bounds.max_input_tokens if new_tokens is None else most):
        return prompt
    warnings.append(f"the prompt had {len(prompt)} tokens; its oldest {len(prompt) - most} were left out")
    return (prompt[0], *prompt[len(prompt) - most + 1 :])
