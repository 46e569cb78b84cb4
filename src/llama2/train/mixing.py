"""Several data sets in one: each of the further ones has a share of all rows, drawn from it. No torch here.

Llama 2 mixed so for its reward models (arXiv 2307.09288, A.3.4): for helpfulness all of its own helpful pairs and as
many of other sets, for safety 90 % of safety pairs and 10 % of helpful ones.
"""

import random
from collections.abc import Sequence

from llama2.errors import InputError
from llama2.train.readers import Row


def shares_of(mix: Sequence[str]) -> list[tuple[str, float]]:
    """Of DATA=SHARE texts the data sets and their shares of all rows. Raises InputError where they make no sense."""
    found = []
    for text in mix:
        name, sign, share = text.rpartition("=")
        try:
            value = float(share)
        except ValueError:
            value = -1.0
        if not (name and sign and 0 < value < 1):
            raise InputError(f"mix is {text!r}; give DATA=SHARE, a share of all rows between 0 and 1: other.jsonl=0.1")
        found.append((name, value))
    if (whole := sum(share for _, share in found)) >= 1:
        raise InputError(f"the shares of mix are {whole:g} in all, which leaves the first data set nothing; lower them")
    return found


def mixed(
    rows: Sequence[Row], others: Sequence[tuple[str, float, Sequence[Row]]], seed: int
) -> tuple[list[Row], list[str]]:
    """All rows of the first set, and of each other (name, share, rows) as many as make its share of all, drawn without
    repetition: a row seen twice in an epoch is learnt by heart. And a line on each, with what it came to."""
    whole = len(rows) / (1 - sum(share for _, share, _ in others))
    found, counts = list(rows), []
    for number, (_, share, given) in enumerate(others):
        wanted = round(share * whole)
        count = min(wanted, len(given))
        chosen = sorted(random.Random(f"{seed}/mix/{number}").sample(range(len(given)), count))
        found += [given[i] for i in chosen]
        counts.append((wanted, count))
    lines = []
    for (name, share, given), (wanted, count) in zip(others, counts, strict=True):
        said = f"{name}: {count:,} of {len(given):,} rows, {count / len(found):.1%} of all"
        lines.append(said if count == wanted else f"{said} instead of {share:.1%}: it has no more")
    return found, lines
