"""generate(): continue prompts, with the arguments and results of `transformers`.

A call is checked and laid out once (`request`), then runs through one of three loops: greedy and sampling here, beams
in `beam`, drafts in `speculative`. The loop here is a generator of events, one per token, which `generate`, streamers
and the command line all consume."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.generation.beam import beam_search
from llama2.generation.call_settings import CALL_ARGUMENTS, settings
from llama2.generation.config import GenerationConfig
from llama2.generation.fast_sampling import Shortlist, split
from llama2.generation.processors import LogitsProcessorList
from llama2.generation.request import (
    GenerateArguments,
    Request,
    prepare,
)
from llama2.generation.seeded import invalid_logits
from llama2.generation.speculative import PromptLookup, drafting_model, speculate
from llama2.generation.streamers import BaseStreamer
from llama2.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from llama2.rope import promoted
from llama2.runners.padded import PaddedRunner

GenerateOutput = Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput


@dataclass
class Step:
    """One event: the new token of each row (rows,), pad where a row was done, and whether all rows are now done."""

    tokens: Tensor
    last: bool


@torch.no_grad()
def decode(request: Request) -> Iterator[Step]:
    """Runs greedy search or sampling, one event a token; `request.ids` fills up as it goes.

    Raises InputError where a row has no token to pick. A step waits for the device once, for its tokens; who is done is
    then settled in Python, which behind a small model is ten times cheaper than tensors of one element.
    """
    ids, pad, ends = request.ids, request.pad, frozenset(request.eos.tolist())
    alive = [True] * len(ids)
    length = request.width
    pick = _picker(request)
    logits_BV = request.prefill()
    while True:
        with request.limit_openmp:
            tokens_B, tokens = pick(logits_BV, ids[:, :length], alive)
        if not all(alive):
            tokens = [token if on else pad for token, on in zip(tokens, alive, strict=True)]
            tokens_B = torch.tensor(tokens, device=ids.device)
        ids[:, length] = tokens_B
        length += 1
        alive = [on and token not in ends for on, token in zip(alive, tokens, strict=True)]
        if request.criteria:
            kept = None if request.record.scores is None else tuple(request.record.scores)
            done = request.criteria(ids[:, :length], kept).tolist()
            alive = [on and not stop for on, stop in zip(alive, done, strict=True)]
        last = not any(alive) or length == request.max_length
        yield Step(tokens_B, last)
        if last:
            return
        logits_BV = request.advance(length)


def _picker(request: Request) -> Callable[[Tensor, Tensor, list[bool]], tuple[Tensor, list[int]]]:
    """Returns the function that picks a token per row, as a tensor and as ints, from logits (B, V) behind ids (B,
    S)."""
    whole: tuple[LogitsProcessorList, LogitsProcessorList, Shortlist | None]
    whole = request.processors, LogitsProcessorList(), None
    before, filters, shortlist = (
        whole if request.record.scores is not None else split(request.processors, request.sampler)
    )

    def pick(logits_BV: Tensor, ids_BS: Tensor, alive: list[bool]) -> tuple[Tensor, list[int]]:
        raw_BV = logits_BV if logits_BV.dtype == torch.float32 else logits_BV.to(promoted(logits_BV.dtype))
        scores_BV = before(ids_BS, raw_BV)
        tokens = None if shortlist is None else shortlist(scores_BV)
        if tokens is not None:
            tokens_B = torch.tensor(tokens)
        else:
            scores_BV = filters(ids_BS, scores_BV)
            tokens_B, peak_B = request.sampler(scores_BV)
            tokens = tokens_B.tolist()
            bad = [on and not math.isfinite(peak) for on, peak in zip(alive, peak_B.tolist(), strict=True)]
            if any(bad):
                rows, step = [i for i, is_bad in enumerate(bad) if is_bad], ids_BS.shape[1] - request.width + 1
                raise invalid_logits(raw_BV, scores_BV, rows, step)
        request.record.add(request.runner, raw_BV, scores_BV)
        return tokens_B, tokens

    return pick


def stream(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Any] | None = None,
    **kwargs: Any,
) -> Iterator[Step]:
    """The events of greedy search or sampling as they happen, for the arguments of `generate`."""
    config = settings(model, generation_config, kwargs)
    if config.value("num_beams") > 1:
        raise InputError("beam search has no token until its end; stream with num_beams=1")
    return _handing_back(prepare(model, _call(inputs, kwargs, logits_processor=logits_processor or ()), config))


def _handing_back(request: Request) -> Iterator[Step]:
    try:
        yield from decode(request)
    finally:
        request.hand_back()


def _call(inputs: Tensor | None, kwargs: dict[str, Any], **more: Any) -> GenerateArguments:
    input_ids = kwargs.pop("input_ids", None)
    if input_ids is not None and inputs is not None:
        raise InputError("inputs and input_ids are the same argument and both are given; give one")
    extra = {name: kwargs.pop(name) for name in list(kwargs) if name not in CALL_ARGUMENTS}
    return GenerateArguments(inputs=inputs if input_ids is None else input_ids, extra=extra, **more, **kwargs)


@torch.no_grad()
def generate(
    model: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    logits_processor: Sequence[Any] | None = None,
    stopping_criteria: Sequence[Any] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
    synced_gpus: bool | None = None,
    assistant_model: Any = None,
    streamer: BaseStreamer | None = None,
    negative_prompt_ids: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> GenerateOutput:
    """Continues each row of `inputs` (B, P): ids (B * num_return_sequences, L), prompt included, L <= P + new tokens.

    Keywords are fields of GenerationConfig, which win over `generation_config`, and: attention_mask (B, P) with the
    padding on the left, position_ids, inputs_embeds (B, P, D; the result then holds new tokens only), past_key_values,
    tokenizer (for stop_strings), seed (an int or one per row: a row's draws are then the same alone and in any batch),
    generator, runner ("auto", "native", "torch", or "plain": torch without CUDA graphs), precision ("fast", or "exact":
    activations stay float32 in the native engine). Without any length setting 20 new tokens come. With
    return_dict_in_generate an object with scores, logits and caches comes back. Raises InputError for what cannot work:
    unknown keywords, a prompt that fills the context (max_position_embeddings, unless RoPE is dynamic), padding on the
    right.
    """
    try:
        config = settings(model, generation_config, kwargs)
        if synced_gpus:
            raise InputError("synced_gpus=True is not implemented; generate on one process, or gather the model first")
        call = _call(
            inputs,
            kwargs,
            logits_processor=logits_processor or (),
            stopping_criteria=stopping_criteria or (),
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
        )
        request = prepare(model, call, config)
        if streamer is not None:
            _check_streamer(streamer, request)
            streamer.put(request.ids[:, : request.width].cpu())
        try:
            return _run(model, request, call, assistant_model, streamer)
        finally:
            request.hand_back()
    finally:
        # Also after an error: whoever iterates over the streamer in another thread would wait for ever.
        if streamer is not None:
            streamer.end()


def _check_streamer(streamer: BaseStreamer, request: Request) -> None:
    if request.config.value("num_beams") > 1:
        raise InputError("a streamer cannot follow beam search, whose text is known at its end; set num_beams=1")
    if len(request.ids) > 1:
        raise InputError(
            f"a streamer follows one row but the batch has {len(request.ids)}; stream one prompt at a time"
        )


def _run(
    model: Any, request: Request, call: GenerateArguments, assistant_model: Any, streamer: BaseStreamer | None
) -> GenerateOutput:
    config = request.config
    lookup = config.prompt_lookup_num_tokens
    if config.value("num_beams") > 1:
        if assistant_model is not None or lookup is not None:
            raise InputError("assisted decoding and prompt lookup need num_beams=1")
        return beam_search(request)
    if assistant_model is not None and lookup is not None:
        raise InputError("assistant_model and prompt_lookup_num_tokens are both given; choose one source of drafts")
    put = None if streamer is None else streamer.put
    if assistant_model is not None:
        length = speculate(request, drafting_model(model, assistant_model, request, call), put)
    elif lookup is not None:
        length = speculate(request, PromptLookup(lookup, config.max_matching_ngram_size or 2), put)
    else:
        length = request.width
        for step in decode(request):
            length += 1
            if put is not None:
                put(step.tokens.cpu())
    sequences = request.ids[:, :length]
    if not config.value("return_dict_in_generate"):
        return sequences.clone() if length < request.max_length else sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences.clone(), past_key_values=request.hand_back(), **request.record.fields()
    )


def compute_transition_scores(
    model: Any,
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """The score of each generated token (rows, new tokens), 0 behind the end of a beam.

    `scores` and, for beams, `beam_indices` are those of the output. normalize_logits makes log-probabilities of them.
    """
    stacked_TBV = torch.stack(tuple(scores))
    if normalize_logits:
        stacked_TBV = stacked_TBV.log_softmax(-1)
    if beam_indices is None:
        rows_BT = torch.arange(stacked_TBV.shape[1], device=stacked_TBV.device)[:, None].expand(-1, len(stacked_TBV))
    else:
        rows_BT = beam_indices[:, : int((beam_indices >= 0).sum(-1).max())].to(stacked_TBV.device)
    steps = rows_BT.shape[1]
    tokens_BT = sequences[:, sequences.shape[1] - steps :].to(stacked_TBV.device)
    picked = stacked_TBV[torch.arange(steps, device=stacked_TBV.device)[None], rows_BT.clamp(min=0).long(), tokens_BT]
    return picked.masked_fill(rows_BT < 0, 0.0)


__all__ = ["GenerateOutput", "PaddedRunner", "Step", "compute_transition_scores", "decode", "generate", "stream"]
