"""One call, one step of the model: tokens of several sequences in, logits out."""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama2.compiled import instruction_sets, native
from llama2.cpu.cache import CachedSequence, CacheView, PagedCache
from llama2.cpu.weights import CpuWeights
from llama2.errors import InputError

PRECISIONS = ("fast", "exact")
CHUNK = 512  # tokens of one native call: enough for full speed, little enough for scratch memory

Ints = NDArray[np.int32]


def check_precision(precision: str) -> None:
    """Raises InputError for what is no precision of activations, also where torch will run the model."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")


class CpuRunner:
    """Runs `weights` on their thread pool.

    precision: "fast" rounds the activations (8 bits per 32 against packed weights, bfloat16 against bfloat16);
    "exact" keeps them float32. isa: "auto" or one of `instruction_sets()`.
    """

    def __init__(self, weights: CpuWeights, precision: str = "fast", isa: str = "auto") -> None:
        check_precision(precision)
        if isa != "auto" and isa not in instruction_sets():
            raise InputError(f"instruction set {isa!r} is not here; this machine and build have {instruction_sets()}")
        self.weights, self.precision = weights, precision
        self._runner: Any = native().Runner(weights.pool, isa, precision == "exact")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self._runner.isa)

    def step(
        self,
        tokens: Any,
        positions: Any,
        view: CacheView[PagedCache],
        rows: Any = None,
        adapters: SequenceOf[str | None] | None = None,
    ) -> NDArray[np.float32]:
        """Logits float32 (rows, vocabulary) for a packed batch; keys and values are appended to the cache.

        tokens, positions: int (T,), the new tokens of view's sequences one after the other and their RoPE positions.
        rows: the tokens to give logits for (ascending where T is over CHUNK); None: the last one of every sequence.
        adapters: for every sequence the name of one of `weights.adapters`, or None: that of the module, where it has
        one; None: so for all.
        An interrupt (Ctrl-C) ends the call within one layer and leaves the sequences as they were. Arrays are copied
        before they are checked. Raises InputError where a sequence is in a step of another thread.
        """
        ids = _ints(tokens, "tokens")
        places = _ints(positions, "positions")
        logit_rows = view.last if rows is None else _ints(rows, "rows")
        chosen = self._chosen(adapters, view)
        logits = np.empty((len(logit_rows), self.weights.config.vocab_size), np.float32)
        with view.held():
            try:
                for first, last, sequences, arrays in _pieces(ids, places, view, logit_rows):
                    self._runner.step(
                        self.weights.model,
                        view.cache.handle,
                        *arrays,
                        self.weights.frequencies(int(places.max()) + 1)
                        if self.weights.rope_by_length
                        else self.weights.inv_freq,
                        self.weights.rope_scale,
                        logits[first:last],
                        chosen if chosen is None else chosen[sequences],
                    )
            except ValueError as error:  # refused before anything was computed: say it with the remedy
                self._explain(ids, places, view, logit_rows)
                raise InputError(f"{error}") from error
            view.commit()
        return logits

    def feed(
        self, sequence: CachedSequence, tokens: SequenceOf[int], adapter: str | None = None
    ) -> NDArray[np.float32]:
        """Appends tokens to one sequence; logits float32 (vocabulary,) after the last of them."""
        view = sequence.cache.view([(sequence, len(tokens))])
        positions = np.arange(sequence.length, sequence.length + len(tokens), dtype=np.int32)
        chosen = None if adapter is None else [adapter]
        logits: NDArray[np.float32] = self.step(tokens, positions, view, adapters=chosen)[0]
        return logits

    def _chosen(self, names: SequenceOf[str | None] | None, view: CacheView[PagedCache]) -> list[Any] | None:
        own = self.weights.own
        if names is None:
            return None if own is None else [own] * len(view.past)
        if isinstance(names, str) or len(names) != len(view.past):
            raise InputError(
                f"adapters names one adapter, or None, for each of the step's {len(view.past)} sequences; got {names!r}"
            )
        adapters = [own if name is None else self.weights.adapter(name) for name in names]
        return adapters if any(a is not None for a in adapters) else None

    def _explain(self, ids: Ints, places: Ints, view: CacheView[PagedCache], logit_rows: Ints) -> None:
        """Raises InputError with the remedy for the usual mistakes."""
        total, vocabulary = int(view.starts[-1]), self.weights.config.vocab_size
        if len(ids) != total or len(places) != total:
            raise InputError(
                f"the view has room for {total} tokens; {len(ids)} tokens and {len(places)} positions are given"
            )
        if ids.min() < 0 or ids.max() >= vocabulary:
            bad = int(ids.min() if ids.min() < 0 else ids.max())
            raise InputError(
                f"token id {bad} is outside the vocabulary of {vocabulary}; encode with this model's tokenizer"
            )
        if places.min() < 0:
            raise InputError(f"position {int(places.min())} is negative; positions start at 0")


def _ints(values: Any, name: str) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InputError(f"{name} is a one-dimensional list of integers, got shape {array.shape} of {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int32)


def _pieces(
    ids: Ints, places: Ints, view: CacheView[PagedCache], logit_rows: Ints
) -> Iterator[tuple[int, int, slice, tuple[Ints, ...]]]:
    """The step in calls of at most CHUNK tokens: first and last logits row, sequences, arrays of the native call."""
    total = int(view.starts[-1])
    if total <= CHUNK or len(ids) != total or len(places) != total:  # the native call refuses a wrong length
        yield 0, len(logit_rows), slice(None), (ids, places, view.starts, view.past, view.tables, logit_rows)
        return
    if len(logit_rows) and (logit_rows[0] < 0 or logit_rows[-1] >= total or np.any(np.diff(logit_rows) <= 0)):
        raise InputError(f"rows are ascending indices of the step's {total} tokens, got {logit_rows.tolist()[:8]}")
    for first in range(0, total, CHUNK):
        last = min(first + CHUNK, total)
        begin = int(np.searchsorted(view.starts, first, side="right")) - 1
        end = int(np.searchsorted(view.starts, last, side="left"))
        starts = np.clip(view.starts[begin : end + 1], first, last).astype(np.int32)
        past = (view.past[begin:end] + (starts[:-1] - view.starts[begin:end])).astype(np.int32)
        low, high = (int(i) for i in np.searchsorted(logit_rows, (first, last)))
        rows = np.ascontiguousarray(logit_rows[low:high] - first, dtype=np.int32)
        arrays = (ids[first:last], places[first:last], starts - first, past, view.tables[begin:end], rows)
        yield low, high, slice(begin, end), arrays
