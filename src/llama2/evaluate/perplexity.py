"""Perplexity of a text under a causal language model, over windows that may overlap."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional as F

from llama2.errors import InputError
from llama2.model import LlamaForCausalLM
from llama2.rope import promoted
from llama2.runners.contract import Runner, make_runner
from llama2.runners.native import NativeModel


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(nll), `nll` the mean negative log-likelihood in nats of `tokens` predicted tokens."""

    value: float
    nll: float
    tokens: int
    seconds: float


class Window(NamedTuple):
    """Tokens start to end are read; the last `scored` of them are predicted."""

    start: int
    end: int
    scored: int


def windows(length: int, window: int, stride: int) -> Iterator[Window]:
    """Windows that together score every token that has one before it in its window, each once."""
    done = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        scored = min(end - done, end - start - 1)
        if scored > 0:
            yield Window(start, end, scored)
        done = end
        if end == length:
            return


@torch.inference_mode()
def perplexity(
    model: LlamaForCausalLM | NativeModel,
    ids: Sequence[int] | torch.Tensor,
    window: int = 512,
    stride: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
    runner: str | Runner = "auto",
) -> Perplexity:
    """Perplexity of the token ids (T,) in windows of `window` tokens, each `stride` tokens after the last.

    stride=None means `window`: disjoint windows, the first token of each unscored. A smaller stride gives every
    scored token at least window - stride tokens of context, at window / stride times the work. `on_window` is told the
    position reached, the length and the perplexity so far; `runner` is that of generate(). Raises InputError for sizes
    that cannot work.
    """
    ids = torch.as_tensor(ids, dtype=torch.long, device=model.device).reshape(-1)
    stride = window if stride is None else stride
    _check(model, len(ids), window, stride)
    engine = make_runner(runner, model)
    places = torch.arange(window, device=model.device)[None]
    began, total, tokens = time.perf_counter(), 0.0, 0
    for start, end, scored in windows(len(ids), window, stride):
        logits = engine.step(ids[None, start:end], places[:, : end - start], None, None, keep=scored + 1)
        targets = ids[end - scored : end]
        total += float(F.cross_entropy(logits[0, :-1].to(promoted(logits.dtype)), targets, reduction="sum"))
        tokens += scored
        if on_window is not None:
            on_window(end, len(ids), math.exp(total / tokens))
    nll = total / tokens
    return Perplexity(math.exp(nll), nll, tokens, time.perf_counter() - began)


def _check(model: LlamaForCausalLM | NativeModel, length: int, window: int, stride: int) -> None:
    context = model.config.max_position_embeddings
    if not 2 <= window <= context:
        raise InputError(f"window is {window}; it must be between 2 and {context}, the context of this model")
    if not 1 <= stride <= window:
        raise InputError(f"stride is {stride}; it must be between 1 and the window, {window}")
    if length < 2:
        raise InputError(f"the text has {length} token(s); perplexity needs at least 2")
