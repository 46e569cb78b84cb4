"""One call of generate(), checked and laid out: settings, ids, masks and positions for its whole length.

The buffers are made once. A decoding step then only takes views of them.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llama2 import cpu
from llama2.cache import KVCache
from llama2.errors import ContextLengthError, InputError
from llama2.generation.config import DEFAULTS, GenerationConfig
from llama2.generation.filters import Prompt, build_processors
from llama2.generation.guidance import PrefixConstrainedLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from llama2.generation.outputs import Record
from llama2.generation.past_key_values import cache_to_run, given_cache
from llama2.generation.processors import LogitsProcessorList
from llama2.generation.sampler import Sampler
from llama2.generation.seeded import row_seeds
from llama2.generation.stopping import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from llama2.protocols import CausalLM, TokenizerLike
from llama2.rope_types import context_limit
from llama2.runners.native import NATIVE_CACHES, NativeCache, NativeModel, NativeRunner
from llama2.runners.padded import PaddedRunner, make_runner
from llama2.runners.prepared import PreparedRunner


@dataclass
class Request:
    """A checked call. Columns of `ids` and of the context differ by `offset` where the prompt came as embeddings."""

    config: GenerationConfig
    runner: PaddedRunner
    cache: Any  # what the runner fills
    given: object  # the caller's cache
    ids: Tensor  # (rows, max_length): prompt, then room filled with the pad id
    width: int  # columns of `ids` that the prompt fills
    offset: int  # context column = column of ids + offset
    positions: Tensor  # (rows | 1, context columns)
    mask: Tensor | None  # (rows, context columns), True = real; None where all are
    embeds: Tensor | None
    cached: int  # context columns that the cache holds already
    eos: Tensor  # (n,), possibly empty
    pad: int
    prompts: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    sampler: Sampler
    record: Record = field(default_factory=Record)
    limit_openmp: AbstractContextManager[None] = field(default_factory=nullcontext)  # around torch's work between steps

    @property
    def max_length(self) -> int:
        """Columns of `ids`."""
        return self.ids.shape[1]

    def hand_back(self) -> object:
        """The cache as callers get it: their own object, or a new one. None for none."""
        if not isinstance(self.cache, NativeCache) or self.cache is self.given:
            return self.cache
        if isinstance(self.given, KVCache):
            self.given.stand_for(self.cache)
            return self.given
        return KVCache.over(self.cache)

    def feed(self, tokens: Tensor, start: int, keep: int = 1) -> Tensor:
        """Logits (rows, keep, V) after `tokens`, which take the context columns from `start` on."""
        end = start + tokens.shape[1]
        mask = None if self.mask is None else self.mask[:, :end]
        if isinstance(self.runner, PreparedRunner):
            self.runner.ids = self.ids[:, : end - self.offset]
        return self.runner.step(tokens, self.positions[:, start:end], mask, self.cache, keep)

    def prefill(self) -> Tensor:
        """Logits (rows, V) behind the prompt, which is run in chunks where `prefill_chunk_size` says so."""
        tokens = self.ids[:, : self.width] if self.embeds is None else self.embeds
        start, end = self.cached, tokens.shape[1]
        chunk = self.config.prefill_chunk_size
        if chunk is not None and self.cache is not None:
            while end - start > chunk:
                self.feed(tokens[:, start : start + chunk], start)
                start += chunk
        return self.feed(tokens[:, start:], start)[:, -1]

    def advance(self, length: int) -> Tensor:
        """Logits (rows, V) behind the first `length` columns of ids, of which all but the last are in the cache."""
        if self.cache is None:
            return self._from_the_start(length)
        return self.feed(self.ids[:, length - 1 : length], length - 1 + self.offset)[:, -1]

    def _from_the_start(self, length: int) -> Tensor:
        if self.embeds is None:
            return self.feed(self.ids[:, :length], 0)[:, -1]
        raise InputError("use_cache=False needs input_ids; with inputs_embeds leave use_cache at True")


@dataclass
class GenerateArguments:
    """The arguments of generate() that are not settings."""

    inputs: Tensor | None = None
    logits_processor: Sequence[Any] = ()
    stopping_criteria: Sequence[Any] = ()
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    negative_prompt_ids: Tensor | None = None
    negative_prompt_attention_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    past_key_values: object = None
    tokenizer: TokenizerLike | None = None
    assistant_tokenizer: TokenizerLike | None = None
    seed: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    runner: str | PaddedRunner = "auto"
    precision: str = "fast"  # of the activations in the native engine
    extra: dict[str, Any] = field(default_factory=dict)  # arguments of the forward of a model's own class


def _prompt(model: CausalLM, call: GenerateArguments, config: GenerationConfig) -> Tensor:
    """ids (B, P) on the model's device, checked; P may be 0 where the prompt is embeddings."""
    ids, embeds, device = call.inputs, call.inputs_embeds, model.device
    if ids is None and embeds is not None:
        if embeds.dim() != 3 or 0 in embeds.shape:
            raise InputError(f"inputs_embeds has shape {tuple(embeds.shape)}; it must be (batch, tokens, width)")
        return torch.empty((len(embeds), 0), dtype=torch.long, device=device)
    if ids is None:
        if config.bos_token_id is None:
            raise InputError("generate() got no inputs and there is no bos_token_id to start from; give input_ids")
        return torch.tensor([[config.bos_token_id]], device=device)
    if not isinstance(ids, Tensor):
        raise InputError(
            f"inputs is a {type(ids).__name__}; it must be a tensor of ids (batch, tokens): tokenize with "
            "return_tensors='pt' and call generate(**encoding)"
        )
    if ids.dim() != 2 or 0 in ids.shape or ids.is_floating_point():
        raise InputError(
            f"inputs has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be integer ids (batch, tokens) with "
            "at least one token, such as the BOS token"
        )
    ids = ids.to(device=device, dtype=torch.long)
    size = getattr(model.config, "vocab_size", None)
    least, most = (int(x) for x in torch.aminmax(ids))
    if least < 0 or (size is not None and most >= size):
        raise InputError(
            f"the prompt contains id {least if least < 0 else most} but ids run from 0 to {(size or 0) - 1}; is the "
            "tokenizer that of this model? After adding tokens call model.resize_token_embeddings(len(tokenizer))"
        )
    return ids


def _criterion_length(call: GenerateArguments, config: GenerationConfig, context: int) -> int | None:
    """New tokens that a MaxLengthCriteria of the caller allows, at least one; None where there is none.

    As in transformers 5 it takes the place of the one that the settings make.
    """
    lengths = [criterion.max_length for criterion in call.stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
    if not lengths:
        return None
    prompt = context if call.inputs_embeds is None or call.inputs is not None else 0  # a criterion counts ids
    new = max(min(lengths) - prompt, 1)
    for name, length in (("max_new_tokens", context + (config.max_new_tokens or 0)), ("max_length", config.max_length)):
        if config.is_set(name) and length != context + new:
            warnings.warn(
                f"a MaxLengthCriteria of {min(lengths)} is given, which counts; {name}={getattr(config, name)} has no "
                "effect",
                stacklevel=6,
            )
    return new


def _lengths(model: CausalLM, call: GenerateArguments, config: GenerationConfig, context: int) -> int:
    """How many new tokens at most, for a prompt of `context` tokens. Raises InputError where there is no room."""
    limit = context_limit(model.config)
    if limit is not None and context >= limit:
        raise ContextLengthError(
            f"the prompt has {context} tokens but the model's context is {limit} (max_position_embeddings), which "
            "must hold the answer too; shorten the prompt, or load with rope_scaling={'rope_type': 'dynamic', ...}",
            context + 1,
            limit,
        )
    if (given := _criterion_length(call, config, context)) is not None:
        new = given
    elif config.max_new_tokens is not None:
        new = config.max_new_tokens
    elif config.is_set("max_length"):
        new = config.value("max_length") - context
        if new <= 0:
            raise InputError(
                f"the prompt has {context} tokens but max_length is {config.max_length}, which counts the prompt; "
                "increase max_length or, better, set max_new_tokens"
            )
    else:
        new = DEFAULTS["max_length"] if limit is None else min(DEFAULTS["max_length"], limit - context)
        warnings.warn(
            f"no length is set: the default max_length (={context + new}) leaves {new} new tokens at most; "
            "set max_new_tokens",
            stacklevel=5,
        )
    if limit is not None and context + new > limit:
        warnings.warn(
            f"{context} prompt and {new} new tokens exceed the model's context of {limit}; what comes after it will "
            "be poor. Set max_new_tokens lower",
            stacklevel=5,
        )
    least = config.value("min_length") - context if config.min_new_tokens is None else config.min_new_tokens
    if least > new:
        warnings.warn(f"the least length asks for {least} new tokens but there are at most {new}", stacklevel=5)
    return int(new)


def _mask(call: GenerateArguments, ids: Tensor, config: GenerationConfig, context: int) -> Tensor | None:
    """Which prompt tokens are real, bool (B, context), or None where all are."""
    pad, mask = config.pad_token_id, call.attention_mask
    if mask is None:
        if pad is None or ids.shape[1] != context or not bool((ids == pad).any()):
            return None
        if pad in config.eos_token_ids:
            if bool((ids[:, 0] == pad).any()) and len(ids) > 1:
                warnings.warn(
                    "the prompts begin with the pad token, which is an end token as well, and there is no "
                    "attention_mask: they are taken as text. Pass the tokenizer's attention_mask",
                    stacklevel=5,
                )
            return None
        mask = ids != pad
    if mask.dim() != 2 or tuple(mask.shape) != (len(ids), context):
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}; it must be ({len(ids)}, {context})")
    mask = (mask != 0).to(ids.device)
    if bool(mask.all()):
        return None
    if not bool(mask[:, -1].all()):
        warnings.warn(
            "a prompt ends with padding (right-padding), and what follows continues the padding; for correct results "
            "pad on the left: tokenizer.padding_side = 'left'",
            stacklevel=5,
        )
    return mask


def _positions(call: GenerateArguments, mask: Tensor | None, context: int, new: int, device: torch.device) -> Tensor:
    """Positions of prompt and new tokens (B | 1, context + new)."""
    if call.position_ids is not None:
        start = call.position_ids.to(device)
        if start.dim() != 2 or start.shape[1] != context:
            raise InputError(f"position_ids has shape {tuple(start.shape)}; it must be (batch, {context})")
    elif mask is None:
        return torch.arange(context + new, device=device)[None]
    else:
        count = mask.cumsum(1)
        start, last = (count - 1).masked_fill(~mask, 0), count[:, -1:] - 1
        return torch.cat((start, last + torch.arange(1, new + 1, device=device)), dim=1)
    return torch.cat((start, start[:, -1:] + torch.arange(1, new + 1, device=device)), dim=1)


def _runner(
    call: GenerateArguments, model: CausalLM, config: GenerationConfig, given: object, mask: Tensor | None
) -> PaddedRunner:
    """The runner of this call: torch also where the native engine cannot go on from the caller's cache."""
    attentions, hidden_states = config.value("output_attentions"), config.value("output_hidden_states")
    needs_torch = _needs_torch(call, config, mask)
    runner = make_runner(
        call.runner, model, attentions, hidden_states, needs_torch, extra=call.extra, precision=call.precision
    )
    if given is None or not isinstance(runner, NativeRunner) or runner.takes(given):
        return runner
    reason = f"past_key_values of type {type(given).__name__} that another model or device made"
    if not isinstance(call.runner, str):
        raise InputError(f"the native engine cannot run this call: {reason}")
    return make_runner(call.runner, model, needs_torch=reason, extra=call.extra, precision=call.precision)


def _needs_torch(call: GenerateArguments, config: GenerationConfig, mask: Tensor | None) -> str:
    """Returns the part of this call that the native engine cannot do, or ""."""
    if mask is not None and not bool(mask[:, -1].all()):
        return "padding on the right"
    if call.inputs_embeds is not None:
        return "inputs_embeds"
    if config.cache_implementation not in NATIVE_CACHES:
        return f"cache_implementation={config.cache_implementation!r}"
    return ""


def _criteria(call: GenerateArguments, config: GenerationConfig) -> StoppingCriteriaList:
    """Everything but the maximal length and the end ids, which the loop checks itself."""
    criteria = StoppingCriteriaList()
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.stop_strings:
        if call.tokenizer is None:
            raise InputError("stop_strings needs the tokenizer: generate(..., stop_strings=[...], tokenizer=tokenizer)")
        criteria.append(StopStringCriteria(call.tokenizer, config.stop_strings))
    for criterion in call.stopping_criteria:
        if isinstance(criterion, EosTokenCriteria) or callable(criterion):
            criteria.append(criterion)
        else:
            raise InputError(f"the stopping criterion {criterion!r} is not callable")
    return criteria


def _guidance(
    model: CausalLM, call: GenerateArguments, config: GenerationConfig
) -> UnbatchedClassifierFreeGuidanceLogitsProcessor | None:
    scale = config.guidance_scale
    if scale is None or scale == 1:
        if call.negative_prompt_ids is not None:
            raise InputError("negative_prompt_ids has no effect without guidance_scale; set it above 1")
        return None
    if isinstance(model, NativeModel):
        raise InputError("guidance_scale needs a torch model; load the file with AutoModelForCausalLM")
    if config.value("num_beams") > 1:
        raise InputError("guidance_scale does not work with num_beams above 1; set num_beams=1")
    ids, mask = (
        None if x is None else x.to(model.device)
        for x in (call.negative_prompt_ids, call.negative_prompt_attention_mask)
    )
    return UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, model, ids, mask, config.value("use_cache"))


def _limit_openmp(call: GenerateArguments, runner: PaddedRunner, busy: bool) -> AbstractContextManager[None]:
    """torch without threads where the engine has its own, unless there is nothing to do or it is the caller's code."""
    theirs = call.logits_processor or call.stopping_criteria or call.prefix_allowed_tokens_fn
    return cpu.OneOpenMpThread() if isinstance(runner, NativeRunner) and busy and not theirs else nullcontext()


def prepare(model: CausalLM, call: GenerateArguments, config: GenerationConfig) -> Request:
    """Checks a call against the model and lays out its buffers. Raises InputError."""
    prompt = _prompt(model, call, config)
    context = prompt.shape[1] if call.inputs_embeds is None else call.inputs_embeds.shape[1]
    new = _lengths(model, call, config, context)
    mask = _mask(call, prompt, config, context)
    positions = _positions(call, mask, context, new, prompt.device)
    beams = config.value("num_beams")
    copies = beams if beams > 1 else config.value("num_return_sequences")
    rows, width = len(prompt) * copies, prompt.shape[1]
    pad = config.pad_token_id if config.pad_token_id not in (None, -1) else next(iter(config.eos_token_ids), 0)
    ids = torch.full((rows, width + new), pad, dtype=torch.long, device=prompt.device)
    ids[:, :width] = prompt.repeat_interleave(copies, dim=0)
    full_mask = None
    if mask is not None:
        full_mask = torch.nn.functional.pad(mask, (0, new), value=True).repeat_interleave(copies, dim=0)
    attentions, hidden_states = config.value("output_attentions"), config.value("output_hidden_states")
    if config.prefill_chunk_size is not None and (attentions or hidden_states):
        raise InputError(
            "prefill_chunk_size splits the prompt; output_attentions and output_hidden_states need it whole"
        )
    given = given_cache(call.past_key_values, config, rows, context)
    runner = _runner(call, model, config, given, mask)
    cache = cache_to_run(given, runner, config, rows, context + new, context, full_mask)
    # With embeddings only there are no prompt ids for a penalty or a length to count.
    config.update(min_length=max(config.value("min_length") - (context - width), 0))
    known = mask if mask is not None and mask.shape[1] == width else None
    seeds = row_seeds(call.seed, len(prompt), 1 if beams > 1 else copies)
    if seeds is not None and call.generator is not None:
        raise InputError("seed and generator both given; seed draws each row by itself, generator the whole batch")
    allowed = call.prefix_allowed_tokens_fn
    processors = build_processors(
        config,
        Prompt(prompt, known),
        width + new,
        call.logits_processor,
        None if allowed is None else PrefixConstrainedLogitsProcessor(allowed, copies),
        _guidance(model, call, config),
    )
    return Request(
        config=config,
        runner=runner,
        cache=cache,
        given=given,
        ids=ids,
        width=width,
        offset=context - width,
        positions=positions if len(positions) == 1 else positions.repeat_interleave(copies, dim=0),
        mask=full_mask,
        embeds=None if call.inputs_embeds is None else call.inputs_embeds.repeat_interleave(copies, dim=0),
        cached=cache.get_seq_length() if cache is not None else 0,
        eos=torch.tensor(config.eos_token_ids, dtype=torch.long, device=prompt.device),
        pad=int(pad),
        prompts=len(prompt),
        processors=processors,
        criteria=_criteria(call, config),
        sampler=Sampler(config.value("do_sample"), call.generator, seeds),
        record=Record.of(config),
        limit_openmp=_limit_openmp(call, runner, bool(processors) or beams > 1 or config.value("do_sample")),
    )
