"""The picture of the losses: valid XML, every value in the frame, round ticks."""

import math
from xml.etree import ElementTree

import pytest

from llama2.train.chart import HEIGHT, WIDTH, loss_chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.11, 2.9, [0, 0.5, 1, 1.5, 2, 2.5, 3]),
        (3, 40, [0, 10, 20, 30, 40]),
        (-3, 11, [-5, 0, 5, 10, 15]),
    ],
)
def test_ticks_are_round(low: float, high: float, wanted: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(wanted)


@pytest.mark.parametrize("value", [0.0, 1.0, -7.25, 1e-12, 1e9])
def test_ticks_of_one_value(value: float) -> None:
    found = ticks(value, value)
    assert len(found) >= 2 and found[0] <= value <= found[-1] and found[0] < found[-1]


def test_points_lie_in_the_frame() -> None:
    history = [{"step": i, "loss": 3 / i} for i in range(1, 9)] + [
        {"step": 8, "eval_loss": 0.5},
        {"step": 9, "loss": math.nan},
    ]
    root = ElementTree.fromstring(loss_chart(history))
    lines = [e for e in root if e.tag.endswith("polyline")]
    assert [len(line.attrib["points"].split()) for line in lines] == [8, 1]
    points = [tuple(map(float, p.split(","))) for line in lines for p in line.attrib["points"].split()]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    heights = [y for _, y in points[:8]]
    assert heights == sorted(heights)  # the loss falls, so its line does
    assert any("held out loss 0.5" in (e.text or "") for e in root)
    assert loss_chart([{"step": 1, "learning_rate": 1.0}]) == ""
