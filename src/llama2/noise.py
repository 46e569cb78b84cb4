"""The exponential numbers that torch.multinomial draws on a CPU, made only where they are used.

Of a vocabulary's 50,000 numbers a token's draw needs those of the few dozen tokens that the filters left.
"""

import threading
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from llama2.compiled import kernels

_DRAWING = threading.Lock()  # one thread at a time between a generator's state and the state behind its numbers


def some_of(source: torch.Generator, places: Sequence[int], total: int) -> tuple[list[float], Callable[[], None]]:
    """Those at `places`, ascending, of the next `total` Exp(1) numbers of a CPU generator, all of which then count as
    drawn, and what takes that back. Only where `is_known`."""
    with _DRAWING:
        before = source.get_state()
        after = before.clone()
        values: list[float] = kernels().exponentials(after.numpy(), total, np.array(places, np.int64))
        source.set_state(after)

    def undo() -> None:
        source.set_state(before)

    return values, undo


@cache
def is_known() -> bool:
    """Whether the compiled module draws the exponential numbers that torch does here: so without MKL's, one by one from
    its Mersenne twister. Moving that on costs a tenth of making 50,000 numbers."""
    if not kernels():
        return False
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    for count in (1, 311, 1000):  # the 624 words of a state end within and between numbers
        found, _ = some_of(ours, range(count), count)
        if torch.empty(count).exponential_(generator=theirs).tolist() != found:
            return False
    return torch.equal(ours.get_state(), theirs.get_state())


@cache
def can_end() -> bool:
    """Whether torch draws exponential numbers such that fewer of them are a beginning of more, at the same cost in the
    generator's state: so with MKL, where numbers that nobody looks at need not be drawn."""
    long, short = (torch.Generator().manual_seed(0) for _ in range(2))
    whole, part = torch.empty(5000).exponential_(generator=long), torch.empty(64).exponential_(generator=short)
    return torch.equal(whole[:64], part) and torch.equal(long.get_state(), short.get_state())
