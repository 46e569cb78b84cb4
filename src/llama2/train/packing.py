"""Short rows into long ones, without any row seeing another. No torch here.

Best fit decreasing: rows are taken from the longest on, and each goes where it leaves the least room.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

from llama2.errors import InputError
from llama2.train.data import IGNORED


class PackedRow(NamedTuple):
    """One long row: its tokens, labels, and positions, which begin at 0 with each document; where documents begin."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    starts: list[int]


def bins(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which rows share a bin of `capacity` tokens: indices by bin, in the order of their first rows.

    Raises InputError for a row that is longer than a bin.
    """
    if lengths and max(lengths) > capacity:
        worst = max(range(len(lengths)), key=lengths.__getitem__)
        raise InputError(f"row {worst} has {lengths[worst]} tokens, a bin {capacity}; truncate it or make bins longer")
    filled: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[row], -1))
        if at == len(room):
            filled.append([row])
            free, where = capacity - lengths[row], len(filled) - 1
        else:
            free, where = room.pop(at)
            filled[where].append(row)
            free -= lengths[row]
        if free:
            insort(room, (free, where))
    return sorted((sorted(rows) for rows in filled), key=lambda rows: rows[0])


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> PackedRow:
    """Rows of (ids, labels) one behind the other; the first token of each is no target, whatever its label."""
    packed = PackedRow([], [], [], [])
    for ids, labels in rows:
        if len(ids) != len(labels) or not ids:
            raise InputError(f"a row has {len(ids)} ids and {len(labels)} labels; both must be as many, and not none")
        packed.starts.append(len(packed.input_ids))
        packed.input_ids.extend(ids)
        packed.labels.extend([IGNORED, *labels[1:]])
        packed.position_ids.extend(range(len(ids)))
    return packed
