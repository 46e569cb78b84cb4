"""Evaluation of a reward model on pairs: accuracy overall and by rating, calibration, and a picture of both.

Sources: the tables of arXiv 2307.09288 (A.3.3); the correlation of reward and length, which warns of a model that has
learnt to count.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from llama2.protocols import CausalLM
from llama2.train.chart import svg, svg_bar, svg_text
from llama2.train.ranking import RATINGS, Ranked
from llama2.train.reward import Rewards
from llama2.train.tasks.base import Outcome

BINS = 5  # of the model's probability that its preferred answer is the better one, from 0.5 to 1
AT_ONCE = 8  # pairs of a pass
HACKED = 0.3  # a correlation of reward and length beyond it is said


@torch.inference_mode()
def rewards_of(model: CausalLM, items: Sequence[Ranked]) -> np.ndarray:
    """Rewards (2, N) of the chosen and the rejected answers. Raises nothing for NaN: the report counts it."""
    objective, was = Rewards(), model.training
    model.eval()
    parts = []
    for first in range(0, len(items), AT_ONCE):
        batch = objective.collate(items[first : first + AT_ONCE])
        batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        parts.append(objective.rewards(model, batch).float().cpu().numpy().reshape(2, -1))
    model.train(was)
    return np.concatenate(parts, 1)


def measured(items: Sequence[Ranked], rewards_2N: np.ndarray) -> dict[str, Any]:
    """Figures of rewards (2, N): pairs, accuracy with its standard error, by rating, calibration, safety, lengths.

    A tie counts half. calibration: bins of p = s(|chosen - rejected|) with the share in which the higher reward is the
    chosen answer's; error is the mean over pairs of the difference of the two in its bin.
    """
    gaps = (rewards_2N[0] - rewards_2N[1]).astype(np.float64)
    right = (gaps > 0) + 0.5 * (gaps == 0)
    lengths = np.array([[len(a.input_ids) for a in item.pair] for item in items]).T
    found: dict[str, Any] = {
        "pairs": len(items),
        "loss": float(np.logaddexp(0, -gaps).mean()),
        **_share(right),
        "mean_reward": float(rewards_2N.mean()),
        "reward_sd": float(rewards_2N.std()),
        "length_correlation": _correlation(rewards_2N.ravel(), lengths.ravel()),
        "by_rating": {},
        "calibration": [],
    }
    for rating in RATINGS:
        chosen = np.array([item.rating == rating for item in items])
        if chosen.any():
            found["by_rating"][rating] = {**_share(right[chosen]), "mean_margin": float(gaps[chosen].mean())}
    certain, won = 1 / (1 + np.exp(-np.abs(gaps))), np.where(gaps == 0, 0.5, gaps > 0)
    places = np.minimum(((certain - 0.5) * 2 * BINS).astype(int), BINS - 1)
    error = 0.0
    for i in range(BINS):
        if (there := places == i).any():
            predicted, observed = float(certain[there].mean()), float(won[there].mean())
            error += abs(predicted - observed) * there.mean()
            edges = {"from": 0.5 + i / (2 * BINS), "to": 0.5 + (i + 1) / (2 * BINS)}
            shares = {"pairs": int(there.sum()), "predicted": predicted, "observed": observed}
            found["calibration"].append({**edges, **shares})
    found["calibration_error"] = float(error)
    return found | _safety(items, rewards_2N)


def _share(right: np.ndarray) -> dict[str, float]:
    mean = float(right.mean())
    return {"count": len(right), "accuracy": mean, "accuracy_se": math.sqrt(max(mean * (1 - mean), 0) / len(right))}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


def _safety(items: Sequence[Ranked], rewards_2N: np.ndarray) -> dict[str, Any]:
    """Of labelled answers: how many are told right at probability 0.5, and how many unsafe ones are found."""
    labels = np.array([[math.nan if label is None else label for label in item.safe] for item in items]).T
    known = ~np.isnan(labels)
    if not known.any():
        return {}
    safe, said = labels[known] == 1, rewards_2N[known] > 0
    recall = float((~said)[~safe].mean()) if (~safe).any() else None
    return {"safety": {"answers": int(known.sum()), "accuracy": float((safe == said).mean()), "unsafe_recall": recall}}


def lines_of(found: dict[str, Any], where: str) -> list[str]:
    """The figures for people."""
    lines = [
        f"{where}: accuracy {found['accuracy']:.3f} +- {found['accuracy_se']:.3f} of {found['pairs']:,} pairs, loss "
        f"{found['loss']:.4f} (a coin: {math.log(2):.4f}), calibration error {found['calibration_error']:.3f}"
    ]
    lines += [
        f"  {rating.replace('_', ' '):<22} {of['accuracy']:.3f} +- {of['accuracy_se']:.3f}  ({of['count']:,} pairs, "
        f"mean margin {of['mean_margin']:+.3f})"
        for rating, of in found["by_rating"].items()
    ]
    if safety := found.get("safety"):
        recall = "none is unsafe" if safety["unsafe_recall"] is None else f"{safety['unsafe_recall']:.3f} of the unsafe"
        lines.append(f"  safety: {safety['accuracy']:.3f} of {safety['answers']:,} labelled answers; found: {recall}")
    if abs(found["length_correlation"]) > HACKED:
        lines.append(
            f"  rewards and lengths correlate by {found['length_correlation']:+.2f}: the model may be counting tokens"
        )
    return lines


def picture(found: dict[str, Any]) -> str:
    """Left the calibration beside the diagonal, right the accuracy by rating, as SVG."""
    parts = [svg_text(190, 20, "calibration: share that is right by probability"), svg_text(540, 20, "accuracy")]
    parts.append('<path d="M60 340L340 60" stroke="#999" stroke-dasharray="4"/>')
    parts.append('<path d="M60 60V340H340" fill="none" stroke="#333"/>')

    def at(p: float) -> float:
        return (p - 0.5) * 2 * 280

    for tick in (0.5, 0.75, 1.0):
        parts += [svg_text(60 + at(tick), 358, f"{tick:g}"), svg_text(44, 344 - at(tick), f"{tick:g}")]
    most = max((one["pairs"] for one in found["calibration"]), default=1)
    for one in found["calibration"]:
        x, y = 60 + at(one["predicted"]), 340 - at(max(one["observed"], 0.5))
        radius = 3 + 7 * math.sqrt(one["pairs"] / most)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="#2563eb" fill-opacity="0.7"/>')
    bars = {"all": found, **found["by_rating"]}
    for i, (name, of) in enumerate(bars.items()):
        parts += svg_bar(400 + 62 * i, 340, 44, 280 * of["accuracy"], f"{of['accuracy']:.2f}", name.split("_better")[0])
    return svg(parts)


def reward_report(model: CausalLM, held_out: Sequence[Ranked], trained_on: Sequence[Ranked]) -> Outcome:
    """The report of `llama2 finetune reward`: of the pairs held out, or where there are none of those trained on."""
    items = held_out or trained_on[:1000]
    where = "held out" if held_out else "of the pairs trained on (hold some out with --eval-split 0.1)"
    found = measured(items, rewards_of(model, items))
    rows = [["bin", "pairs", "predicted", "observed"]]
    rows += [[f"{one['from']:.1f} to {one['to']:.1f}", str(one["pairs"]), f"{one['predicted']:.4f}",
              f"{one['observed']:.4f}"] for one in found["calibration"]]  # fmt: skip
    table = "".join(",".join(row) + "\n" for row in rows)
    values = {"measured": "held out" if held_out else "training", **found}
    return Outcome(values, lines_of(found, where), {"calibration.svg": picture(found), "calibration.csv": table})
