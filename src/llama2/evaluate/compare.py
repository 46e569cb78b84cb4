"""How far a model is from another one on a text: the statistics of llama.cpp's `--kl-divergence`, with their errors.

The text is cut in chunks of `context` tokens, the first of each replaced by BOS where the tokenizer adds one; tokens of
the second half of each chunk are compared, so that all have at least context / 2 tokens before them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2.errors import InputError
from llama2.evaluate import statistics
from llama2.evaluate.kl_file import SPAN, BaseHeader, BaseWriter
from llama2.evaluate.report import Row
from llama2.evaluate.statistics import Estimate
from llama2.evaluate.steps import MeasuredModel, scored_logits
from llama2.generation.arrays import to_numpy

ROWS_AT_ONCE = 64  # of a vocabulary, in float32: some MB
RESAMPLES = 400  # of the windows, for the error of a percentile

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class Compared(NamedTuple):
    """Of each compared token (n,): KL divergence in nats, negative log-likelihoods of both, whether each had it first,
    whether both had the same first choice."""

    kl: Doubles
    base_nll: Doubles
    nll: Doubles
    base_right: NDArray[np.bool_]
    right: NDArray[np.bool_]
    same: NDArray[np.bool_]


def chunks(ids: Sequence[int], context: int, vocabulary: int, most: int | None = None) -> BaseHeader:
    """The chunks of a text's token ids. Raises InputError for a text shorter than two of them, as llama.cpp does."""
    if context < 4:
        raise InputError(f"the window is {context} tokens; give at least 4, of which the second half is compared")
    if most is not None and most < 1:
        raise InputError(f"{most} chunks hold nothing; give at least 1")
    if len(ids) < 2 * context:
        raise InputError(f"the text has {len(ids)} tokens; a window of {context} needs at least {2 * context} of them")
    count = len(ids) // context if most is None else min(len(ids) // context, most)
    return BaseHeader(context, vocabulary, np.array(ids[: count * context], np.int32).reshape(count, context))


def chunk_logits(steps: MeasuredModel, header: BaseHeader, bos: int | None) -> Iterator[Iterator[Floats]]:
    """For each chunk its logits float32 (n, V), in pieces: those that predict its second half.

    bos: what stands in place of each chunk's first token, None for itself.
    """
    for row in header.tokens:
        tokens = np.array(row, np.int64)
        if bos is not None:
            tokens[0] = bos
        yield _pieces(steps, tokens, header.rows)


def _pieces(steps: MeasuredModel, tokens: NDArray[np.int64], scored: int) -> Iterator[Floats]:
    held: Floats | None = None  # less than a piece, which the next logits fill up
    rows = scored_logits(steps, tokens, scored)
    while True:
        with steps.scope():  # not around what the caller does between two pieces
            logits = next(rows, None)
        if logits is None:
            break
        found = to_numpy(logits).astype(np.float32, copy=False)
        found = found if held is None else np.concatenate((held, found))
        whole = len(found) // ROWS_AT_ONCE * ROWS_AT_ONCE
        yield from split(found[:whole])
        held = found[whole:] if whole < len(found) else None
    if held is not None:
        yield held


def log_probabilities(logits_TV: Floats) -> Floats:
    """Of logits (n, V); the sum of a row is taken in float64."""
    shifted = logits_TV - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def compared(base_TV: Floats, log_TV: Floats, targets: NDArray[np.int32]) -> Compared:
    """Log-probabilities (n, V) of the base and of the other model, beside the tokens (n,) that came.

    Base probabilities under exp(-16) are left out of the divergence, as llama.cpp leaves them out: its file does not
    tell them apart.
    """
    weights = np.where(base_TV > -SPAN, np.exp(base_TV), 0)
    rows = np.arange(len(targets))
    first, base_first = log_TV.argmax(-1), base_TV.argmax(-1)
    return Compared(
        (weights * (base_TV - log_TV)).sum(-1, dtype=np.float64),
        -base_TV[rows, targets].astype(np.float64),
        -log_TV[rows, targets].astype(np.float64),
        base_first == targets,
        first == targets,
        base_first == first,
    )


@dataclass
class Comparison:
    """The comparison so far: a window's tokens after the other."""

    windows: list[Compared] = field(default_factory=list)

    def add(self, parts: Sequence[Compared]) -> None:
        """Takes a window in, from its pieces."""
        self.windows.append(Compared(*(np.concatenate(columns) for columns in zip(*parts, strict=True))))

    def rows(self, name: str) -> list[Row]:
        """The report's rows. Errors take windows as the independent units; `details` has those that llama.cpp gives,
        which take tokens."""
        counts = [len(window.kl) for window in self.windows]
        whole = Compared(*(np.concatenate(columns) for columns in zip(*self.windows, strict=True)))

        def mean(values: list[Doubles], factor: float = 1.0) -> tuple[Estimate, dict[str, Any]]:
            found = statistics.ratio_of_sums([float(v.sum()) for v in values], counts)
            scaled = Estimate(found.value * factor, None if found.error is None else found.error * factor)
            flat = np.concatenate(values)
            error = float(flat.std() / math.sqrt(max(len(flat) - 1, 1))) * factor
            return scaled, {"token_error": error, "tokens": len(flat)}

        def row(test: str, measured: tuple[Estimate, dict[str, Any]], unit: str = "", better: str = "lower") -> Row:
            return Row(name, test, measured[0].value, measured[0].error, unit, better, details=measured[1])

        windows = self.windows
        ratio = mean([w.nll - w.base_nll for w in windows])
        times = math.exp(ratio[0].value)
        shift = [np.exp(-w.nll) - np.exp(-w.base_nll) for w in windows]
        return [
            row("mean KL divergence", mean([w.kl for w in windows]), "nats"),
            Row(name, "99th percentile of KL", *self._percentile(whole.kl, 99), "nats", "lower"),
            Row(name, "median KL", *self._percentile(whole.kl, 50), "nats", "lower"),
            Row(name, "largest KL", float(whole.kl.max()), None, "nats", "lower"),
            row("same first choice", mean([w.same.astype(float) for w in windows], 100), "%", "higher"),
            row("flipped tokens", mean([(w.right != w.base_right).astype(float) for w in windows], 100), "%"),
            _exp(row("perplexity", mean([w.nll for w in windows]))),
            _exp(row("perplexity of the base", mean([w.base_nll for w in windows]), better="")),
            Row(
                name, "perplexity ratio", times, _times(ratio[0].error, times), "", "lower",
                details={**ratio[1], "token_error": ratio[1]["token_error"] * times},
            ),
            row("mean change of probability", mean(shift, 100), "%", ""),
            Row(name, "RMS change of probability", *_root(mean([s * s for s in shift])), "%", "lower"),
        ]  # fmt: skip

    def _percentile(self, values: Doubles, percent: float) -> tuple[float, float | None]:
        """A percentile with its error, by drawing whole windows again (the bootstrap)."""
        value = float(np.percentile(values, percent))
        if len(self.windows) < 2:
            return value, None
        rng, count = np.random.default_rng(0), len(self.windows)
        draws = [
            np.percentile(np.concatenate([self.windows[i].kl for i in rng.integers(0, count, count)]), percent)
            for _ in range(RESAMPLES)
        ]
        return value, float(np.std(draws, ddof=1))


def _times(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor


def _exp(row: Row) -> Row:
    value = math.exp(float(row.value))
    details: Mapping[str, Any] = {**row.details, "token_error": row.details["token_error"] * value}
    return Row(row.model, row.test, value, _times(row.error, value), row.unit, row.better, details=details)


def _root(found: tuple[Estimate, dict[str, Any]]) -> tuple[float, float | None]:
    """The root of a mean of squares, in percent."""
    value = math.sqrt(found[0].value)
    return 100 * value, None if not value or found[0].error is None else 100 * 0.5 / value * found[0].error


def run(
    base: Iterator[Iterator[Floats]],
    base_is_log: bool,
    others: Mapping[str, Iterator[Iterator[Floats]]],
    header: BaseHeader,
    writer: BaseWriter | None = None,
) -> Iterator[dict[str, Comparison]]:
    """Compares every other model with the base, chunk after chunk; gives what there is after each.

    base, others: pieces of each chunk, of logits or, where base_is_log, of log-probabilities; all in pieces of
    ROWS_AT_ONCE rows, of which one of each model is held at a time. writer: takes the base's logits.
    """
    found = {name: Comparison() for name in others}
    for row, base_pieces, *pieces in zip(header.tokens, base, *others.values(), strict=True):
        targets, done = row[header.context - header.rows :], 0
        parts: dict[str, list[Compared]] = {name: [] for name in others}
        for base_TV, *logits in zip(base_pieces, *pieces, strict=True):
            if writer is not None:
                writer.put(base_TV)
            wanted = targets[done : done + len(base_TV)]
            log_base_TV = base_TV if base_is_log else log_probabilities(base_TV)
            for name, logits_TV in zip(others, logits, strict=True):
                parts[name].append(compared(log_base_TV, log_probabilities(logits_TV), wanted))
            done += len(base_TV)
        for name, each in parts.items():
            found[name].add(each)
        yield found


def split(chunk_TV: Floats) -> Iterator[Floats]:
    """A chunk in pieces, as `run` takes them."""
    for start in range(0, len(chunk_TV), ROWS_AT_ONCE):
        yield chunk_TV[start : start + ROWS_AT_ONCE]
