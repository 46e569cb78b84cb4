"""Fields that the bodies of every dialect share: sampling, constraints on the answer, its length.

A dialect reads its own body; what means the same in several of them stands here, under one name. `Common.request` makes
the GenerationRequest, so that every bound and every rounding is applied in one place.
"""

import secrets
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llama2.serve.constraint import Constraint, json_schema
from llama2.serve.forms import ResponseFormat, StructuredOutputs, grammar, only, vllm_forms
from llama2.serve.known_fields import renamed
from llama2.serve.llamacpp_samplers import chained
from llama2.serve.numbers import (
    FIRST_FAULT,
    MAX_COUNT,
    Answers,
    Bias,
    Biases,
    Count,
    CountPenalty,
    Ids,
    KeepAlive,
    LastN,
    MaxTokens,
    Names,
    Pairs,
    Positive,
    PositiveShare,
    RepetitionPenalty,
    Seed,
    Share,
    StopIds,
    Temperature,
)  # fmt: skip
from llama2.serve.request import SEED_BITS, GenerationRequest, Sampling, placed
from llama2.serve.served_model import TextModel
from llama2.serve.validation import Body, Text, Texts

LEAST_TOP_P = 1e-6  # what a top_p of 0 means: the likeliest token


class StreamOptions(Body):
    """stream_options."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Common(Body):
    """Fields that chat, completions and the faces of other servers share; `known_fields` has their other names."""

    model: str | None = Field(None, max_length=512)
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    n: Answers | None = None
    stop: Text | Texts | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    presence_penalty: CountPenalty | None = None
    frequency_penalty: CountPenalty | None = None
    logit_bias: Biases | Annotated[list[Bias], FIRST_FAULT, Field(max_length=200_000)] | Pairs | None = None
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    min_p: Share | None = None
    typical_p: PositiveShare | None = None
    repetition_penalty: RepetitionPenalty | None = None
    repeat_last_n: LastN | None = None
    min_keep: Count | None = None
    samplers: Annotated[str, Field(max_length=256)] | Names | None = None
    top_n_sigma: Annotated[float, Field(ge=-1, le=1000)] | None = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    dynatemp_range: Temperature | None = None
    dynatemp_exponent: Annotated[float, Field(ge=0, le=100)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=1000)] | None = None
    dry_base: Annotated[float, Field(ge=0, le=1000)] | None = None
    dry_allowed_length: Count | None = None
    dry_penalty_last_n: LastN | None = None
    dry_sequence_breakers: Names | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, Field(ge=0, le=1000)] | None = None
    mirostat_eta: Annotated[float, Field(ge=0, le=100)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: str | None = Field(None, max_length=1024)
    cache_prompt: bool | None = None
    keep_alive: KeepAlive | None = None
    num_ctx: Positive | None = None
    n_keep: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    context_shift: bool | None = None
    bad_words: Annotated[list[Annotated[str, Field(max_length=512)]], FIRST_FAULT, Field(max_length=1024)] | None = None
    allowed_token_ids: Ids | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Texts | None = None
    guided_grammar: Text | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: Any = None
    grammar: Text | None = None
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, given: Any) -> Any:
        return renamed(given) if isinstance(given, dict) else given

    def sampling(self, model: TextModel) -> Sampling:
        """How to choose tokens. What is not given comes from the checkpoint's generation_config.json."""
        own = model.settings

        def value(name: str, neutral: float) -> Any:
            given = getattr(self, name)
            if given is not None:
                return given
            kept = own.value(name) if own.is_set(name) else None
            return neutral if kept is None else kept

        temperature = self.temperature
        if temperature is None:
            temperature = (
                float(value("temperature", 1.0)) if own.value("do_sample") or not own.is_set("do_sample") else 0.0
            )
        chosen = Sampling(
            temperature=temperature if temperature >= 1e-5 else None,
            top_k=max(value("top_k", 0), 0),
            top_p=max(value("top_p", 1.0), LEAST_TOP_P),
            min_p=value("min_p", 0.0),
            typical_p=value("typical_p", 1.0),
            repetition_penalty=value("repetition_penalty", 1.0),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            bias=self._bias(model.tokenizer),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_ids=tuple(self.stop_token_ids or ()),
            bad_words=tuple(forbidden(model.tokenizer, self.bad_words or ())),
            allowed_ids=None if self.allowed_token_ids is None else tuple(self.allowed_token_ids),
        )
        return chained(chosen, self)

    def _bias(self, tokenizer: Any) -> dict[int, float]:
        if isinstance(self.logit_bias, dict):
            return {int(token): value for token, value in self.logit_bias.items()}
        found: dict[int, float] = {}
        for i, entry in enumerate(self.logit_bias or ()):
            if not isinstance(entry, tuple):  # TGI's list, one bias for each id
                found |= {i: entry} if entry else {}
            elif isinstance(entry[0], int):
                found[entry[0]] = entry[1]
            else:
                found |= dict.fromkeys(tokenizer.encode_bytes(entry[0].encode("utf-8", "replace")), entry[1])
        return found

    def constraint(self) -> Constraint | None:
        """Returns the constraint on an answer. Raises Refusal, also where several forms are asked for."""
        given: dict[str, Constraint | None] = {
            "response_format": self.response_format.constraint() if self.response_format else None,
            "grammar": grammar(self.grammar) if self.grammar else None,
            # llama.cpp's, which counts where there is no grammar
            "json_schema": json_schema(self.json_schema) if self.json_schema is not None and not self.grammar else None,
        }
        given |= self.structured_outputs.constraints() if self.structured_outputs else {}
        given |= vllm_forms(
            "guided_",
            self.guided_json,
            self.guided_regex,
            self.guided_choice,
            self.guided_grammar,
            self.guided_json_object,
        )
        return only(given)

    def request(
        self,
        model: TextModel,
        owner: str,
        prompts: tuple[tuple[int, ...], ...],
        new_tokens: int | None,
        *,
        overflow: str | None = None,
        **more: Any,
    ) -> GenerationRequest:
        """The request, with what all dialects share. Raises Refusal.

        new_tokens: new tokens at most; below 0 or None what the context holds. overflow: what happens to a prompt that
        is too long, as --context-overflow; None for the policy's. more: further fields of GenerationRequest."""
        bounds = model.bounds.within(self.num_ctx)
        new_tokens = None if new_tokens is None or new_tokens < 0 else new_tokens
        keep = self.truncate_prompt_tokens
        if keep is not None:
            keep = bounds.max_input_tokens if keep < 0 else keep
            prompts = tuple(prompt[-keep:] if keep else () for prompt in prompts)
        overflow = self.overflow(model) if overflow is None else overflow
        prompts, told = placed(prompts, bounds, new_tokens, overflow)
        if new_tokens is not None and self.max_tokens is None:  # a default, which nobody asked for
            told = [warning for warning in told if not warning.startswith(str(new_tokens))]
        if "" in self.stops:
            told.append("a stop string is empty, which every text contains; it is ignored")
        return GenerationRequest(
            prompts=prompts,
            sampling=self.sampling(model),
            max_new_tokens=new_tokens,
            context=self.num_ctx,
            keep=self._kept(model, prompts) if overflow == "shift" else None,
            seed=drawn(self.seed),
            stop=tuple(stop for stop in self.stops if stop),
            keep_stop=bool(self.include_stop_str_in_output),
            adapter=model.adapter(self.model),
            salt=salt(owner, secrets.token_hex(16) if self.cache_prompt is False else self.cache_salt),
            owner=owner,
            stream=bool(self.stream),
            skip_special_tokens=self.skip_special_tokens is not False,
            warnings=(*more.pop("warnings", ()), *told),
            **more,
        )

    def overflow(self, model: TextModel) -> str:
        """Returns the action at the end of the context: --context-overflow, unless the body says."""
        policy = model.policy.context_overflow
        if self.context_shift is None:
            return policy
        if self.context_shift:
            return "shift"
        return "truncate" if policy == "shift" else policy

    def _kept(self, model: TextModel, prompts: tuple[tuple[int, ...], ...]) -> int:
        """Tokens that stay in front when the context is full: llama.cpp's n_keep, -1 for the prompt, and a BOS."""
        if self.n_keep == -1:
            return min(map(len, prompts), default=0)
        bos = model.tokenizer.bos_token_id
        return (self.n_keep or 0) + all(prompt[:1] == (bos,) for prompt in prompts)

    @property
    def stops(self) -> tuple[str, ...]:
        """Its stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


def forbidden(tokenizer: Any, words: Any) -> list[tuple[int, ...]]:
    """Token sequences of words that an answer may not hold, at the begin of a text and inside one."""
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        text = word.strip()
        for written in (text, f" {text}"):
            if text and (ids := tuple(tokenizer.encode_bytes(written.encode("utf-8", "replace")))):
                found[ids] = None
    return list(found)


def drawn(seed: int | None) -> int:
    """The seed in the engine's range, or a new one; -1 asks for that too."""
    return secrets.randbits(62) if seed is None or seed == -1 else seed & SEED_BITS


def salt(owner: str, cache_salt: str | None) -> str:
    """Whose cached prefixes a request shares: those of the same key and the same cache_salt."""
    return f"{owner}\0{cache_salt or ''}"
