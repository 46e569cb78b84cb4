"""The few tokens of a row of scores that sampling may draw."""

from typing import Any

from llama2.compiled import native


def shortlists(
    scores_BV: Any, temperature: float, top_k: int, top_p: float, keep: int
) -> list[tuple[list[int], list[float]] | None]:
    """For each row of scores (B, V) float32 the ids, ascending, that temperature, top-k and top-p leave, `keep` at
    least, and their probabilities in float64; None where the rounding of float32 could leave others, for scores with
    NaN or +inf, and for more than a few hundred ids."""
    rows: list[tuple[list[int], list[float]] | None] = native().shortlists(scores_BV, temperature, top_k, top_p, keep)
    return rows


def shortlist_margin(count: int) -> float:
    """How far probabilities, and sums of them, of `count` tokens in float32 may be from those of `shortlists`."""
    return float(native().shortlist_margin(count))
