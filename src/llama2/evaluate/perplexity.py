"""Perplexity of a text under a causal language model, over windows that may overlap, with its errors."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2.errors import InputError
from llama2.evaluate import statistics
from llama2.evaluate.statistics import Estimate
from llama2.evaluate.steps import make_steps, scored_logits
from llama2.generation.arrays import of, to_numpy


@dataclass(frozen=True)
class Perplexity:
    """`value` = exp(nll), `nll` the mean negative log-likelihood in nats of `tokens` predicted tokens.

    error, nll_error: standard errors, with the windows as the independent units; None for one window. accuracy: the
    share of tokens that were the model's first choice. bits_per_byte: None where the text's bytes were not given.
    """

    value: float
    nll: float
    tokens: int
    seconds: float
    error: float | None = None
    nll_error: float | None = None
    accuracy: float = math.nan
    accuracy_error: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_error: float | None = None


class Window(NamedTuple):
    """Tokens start to end are read; the last `scored` of them are predicted."""

    start: int
    end: int
    scored: int


class WindowScores(NamedTuple):
    """A window with the negative log-likelihood in nats (scored,) of its predicted tokens, and whether each was the
    likeliest."""

    window: Window
    nll: NDArray[np.float64]
    first: NDArray[np.bool_]


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


def perplexity(
    model: Any,
    ids: Any,
    window: int = 512,
    stride: int | None = None,
    on_window: Callable[[int, int, float], None] | None = None,
    runner: Any = "auto",
    text_bytes: int | None = None,
) -> Perplexity:
    """Perplexity of the token ids (T,) in windows of `window` tokens, each `stride` tokens after the last.

    stride=None means `window`: disjoint windows, the first token of each unscored. A smaller stride gives every
    scored token at least window - stride tokens of context, at window / stride times the work. `on_window` is told the
    position reached, the length and the perplexity so far; model is a LlamaForCausalLM or a `cpu.CpuModel`, `runner`
    that of generate(), or a `steps.MeasuredModel` of it. text_bytes: bytes of the text in UTF-8, for bits per byte: the
    bits of a token on average, times the tokens of the text by its bytes. Raises
    InputError for sizes that cannot work.
    """
    began, sums, counts, hits = time.perf_counter(), list[float](), list[int](), list[int]()
    length = _array(ids).size
    for (_, end, scored), nll, first in window_scores(model, ids, window, stride, runner):
        sums.append(float(nll.sum()))
        counts.append(scored)
        hits.append(int(first.sum()))
        if on_window is not None:
            on_window(end, length, math.exp(math.fsum(sums) / sum(counts)))
    return _folded(sums, counts, hits, length, text_bytes, time.perf_counter() - began)


def _folded(
    sums: Sequence[float],
    counts: Sequence[int],
    hits: Sequence[int],
    length: int,
    text_bytes: int | None,
    seconds: float,
) -> Perplexity:
    nll = statistics.ratio_of_sums(sums, counts)
    right = statistics.ratio_of_sums(hits, counts)
    value = math.exp(nll.value)
    bits = Estimate(math.nan)
    if text_bytes:
        bits = _scaled(nll, length / text_bytes / math.log(2))
    return Perplexity(
        value=value,
        nll=nll.value,
        tokens=sum(counts),
        seconds=seconds,
        error=_scaled(nll, value).error,
        nll_error=nll.error,
        accuracy=right.value,
        accuracy_error=right.error,
        bits_per_byte=bits.value if text_bytes else None,
        bits_per_byte_error=bits.error,
    )


def _scaled(found: Estimate, factor: float) -> Estimate:
    return Estimate(found.value * factor, None if found.error is None else found.error * factor)


def window_scores(
    model: Any, ids: Any, window: int = 512, stride: int | None = None, runner: Any = "auto"
) -> Iterator[WindowScores]:
    """Every window of the token ids (T,), scored; arguments as `perplexity`."""
    known = _array(ids)
    stride = window if stride is None else stride
    check_sizes(model.config.max_position_embeddings, len(known), window, stride)
    steps = make_steps(model, runner)
    for place in windows(len(known), window, stride):
        targets, found = known[place.end - place.scored : place.end], list[tuple[Any, Any]]()
        done = 0
        with steps.scope():
            for logits_TV in scored_logits(steps, known[place.start : place.end], place.scored):
                found.append(_scores(logits_TV, targets[done : done + len(logits_TV)]))
                done += len(logits_TV)
        yield WindowScores(place, np.concatenate([n for n, _ in found]), np.concatenate([f for _, f in found]))


def _array(ids: Any) -> NDArray[np.int64]:
    """Token ids (T,) of a list, an array or a tensor."""
    return np.asarray(to_numpy(ids) if hasattr(ids, "detach") else ids, np.int64).reshape(-1)


def _scores(logits_TV: Any, targets: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The negative log-likelihood of each target, from logits of at least float32, and whether it is the likeliest."""
    ops = of(logits_TV)
    wanted = ops.array(targets, logits_TV)[:, None]
    exact_TV = logits_TV.float() if str(logits_TV.dtype) in ("torch.bfloat16", "torch.float16") else logits_TV
    nll = -to_numpy(ops.take(ops.log_softmax(exact_TV), wanted))[:, 0]
    return nll.astype(np.float64), to_numpy(logits_TV.argmax(-1)) == targets


def check_sizes(context: int, length: int, window: int, stride: int) -> None:
    """Raises InputError for windows that cannot work. context: of the model; length: tokens of the text."""
    if not 2 <= window <= context:
        raise InputError(f"window is {window}; it must be between 2 and {context}, the context of this model")
    if not 1 <= stride <= window:
        raise InputError(f"stride is {stride}; it must be between 1 and the window, {window}")
    if length < 2:
        raise InputError(f"the text has {length} token(s); perplexity needs at least 2")
