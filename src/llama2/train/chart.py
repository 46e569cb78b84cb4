"""Lines over steps as an SVG picture, drawn without any package."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 36, 44
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
NAMES = {"loss": "training loss", "eval_loss": "held out loss"}
_HEAD = (
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
    'font-family="sans-serif" font-size="12" fill="#333">'
    f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
)
Points = Sequence[tuple[float, float]]


def loss_chart(history: Sequence[Mapping[str, Any]]) -> str:
    """The SVG of the entries' loss and eval_loss over their steps; "" where there is none."""
    lines = {
        said: [(entry["step"], entry[name]) for entry in history if name in entry and math.isfinite(entry[name])]
        for name, said in NAMES.items()
    }
    return chart(lines, "step")


def chart(lines: Mapping[str, Points], across: str) -> str:
    """The SVG of lines by their names, each a list of points; across: what lies on the x axis. "" without points.

    Lines keep their colour by their place, also where one has no points.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return ""
    steps = ticks(min(x for x, _ in points), max(x for x, _ in points))
    losses = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> str:
        right = (x - steps[0]) / (steps[-1] - steps[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - losses[0]) / (losses[-1] - losses[0]) * (HEIGHT - TOP - BOTTOM)
        return f"{LEFT + right:.1f},{HEIGHT - BOTTOM - up:.1f}"

    parts = [_HEAD]
    for y in losses:
        x, at = place(steps[0], y).split(",")
        parts.append(f'<path d="M{x} {at}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(at) + 4}" text-anchor="end">{y:g}</text>')
    for x_value in steps:
        x = place(x_value, losses[0]).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x_value:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{across}</text>')
    shown = [(COLOURS[i % len(COLOURS)], name, line) for i, (name, line) in enumerate(lines.items()) if line]
    space = (WIDTH - LEFT) // max(len(shown), 4)
    for i, (colour, name, line) in enumerate(shown):
        way = " ".join(place(*point) for point in line)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        parts += [
            f'<circle cx="{cx}" cy="{cy}" r="2.5" fill="{colour}"/>'
            for cx, cy in (place(*point).split(",") for point in (line if len(line) < 60 else line[-1:]))
        ]
        parts.append(f'<text x="{LEFT + space * i}" y="20" fill="{colour}">{name} {line[-1][1]:.4g}</text>')
    return "\n".join([*parts, "</svg>\n"])


def svg(parts: Sequence[str]) -> str:
    """A picture of these elements."""
    return "\n".join([_HEAD, *parts, "</svg>\n"])


def svg_text(x: float, y: float, text: str) -> str:
    """A text whose middle is at x."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{text}</text>'


def svg_bar(x: float, floor: float, width: float, height: float, value: str, name: str) -> list[str]:
    """A bar that stands on `floor`, its value above and its name below."""
    middle = x + width / 2
    box = f'<rect x="{x:.1f}" y="{floor - height:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#2563eb"/>'
    return [box, svg_text(middle, floor - height - 6, value), svg_text(middle, floor + 18, name)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers at equal distances from below `low` to above `high`, at least two."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10, 20) if span / (power * factor) <= most)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(i * step, 12) for i in range(first, last + 1)]
