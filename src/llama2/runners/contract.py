"""The one contract of what computes a step: a packed batch of new tokens of several sequences over pages of keys and
values goes in, logits come out. No torch here.

Implementations: `cpu.CpuRunner` (the native engine), `torch_pages.TorchPageRunner`, `engine.parallel.ToldRunner` (every
process of a model that is shared out). Clients: the engine packs its plans (`engine.plan_runners`), generate() its rows
(`runners.native`); measurements and sessions feed their texts.

generate() on a module of torch goes through `padded.PaddedRunner` instead: its rows have one length and a cache that
the caller may own, and gathering pages for each token costs time (docs/LOG.md).
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from llama2.cpu import CacheView

Pages = TypeVar("Pages", contravariant=True)
Ints = NDArray[np.int32]


class Runner(Protocol[Pages]):
    """Computes steps over pages of one kind, on a device and in dtypes of its own."""

    def step(
        self,
        tokens: Ints,
        positions: Ints,
        view: CacheView[Pages],
        rows: Ints | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """Logits (rows, V), float32 or float64; keys and values of all tokens go into their pages.

        tokens, positions: (T,), the new tokens of the view's sequences one after the other and their RoPE positions.
        rows: the tokens to give logits for, ascending; None: the last one of every sequence. adapters: for every
        sequence the name of the adapter it runs with, or None. Raises InputError for an adapter that is not there.
        """
