"""SVG pictures of measurements, drawn without any package: lines with errors, a map of shares, labelled points."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 60, 52
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers at equal distances from at most `low` to at least `high`, two or more."""
    span = max(high - low, abs(high) * 1e-3, 1e-9)
    power = 10 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


class _Canvas:
    """A frame with two axes; `place` gives the point of a pair of values."""

    def __init__(self, title: str, across: str, up: str, xs: Sequence[float], ys: Sequence[float]) -> None:
        self.xs, self.ys = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
        self.parts = [*head(title)]
        for y in self.ys:
            at = self.place(self.xs[0], y)[1]
            self.parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
            self.parts.append(text(LEFT - 8, at + 4, f"{y:g}", "end"))
        for x in self.xs:
            self.parts.append(text(self.place(x, self.ys[0])[0], HEIGHT - BOTTOM + 18, f"{x:g}", "middle"))
        self.parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, across, "middle"))
        self.parts.append(
            f'<text x="18" y="{HEIGHT / 2}" transform="rotate(-90 18 {HEIGHT / 2})" text-anchor="middle">'
            f"{escape(up)}</text>"
        )

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The point of two values."""
        across = (x - self.xs[0]) / (self.xs[-1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)
        up = (y - self.ys[0]) / (self.ys[-1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, HEIGHT - BOTTOM - up

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def head(title: str, height: int = HEIGHT) -> list[str]:
    """The beginning of a picture."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12" fill="#333">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]


def text(x: float, y: float, words: str, anchor: str = "start", colour: str = "#333") -> str:
    """A text at a point."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def lines(title: str, across: str, up: str, series: Mapping[str, Sequence[tuple[float, float, float | None]]]) -> str:
    """Points (x, y, error) of each name, joined; a band is one standard error wide on each side."""
    points = [(x, y, e or 0.0) for each in series.values() for x, y, e in each if math.isfinite(y)]
    if not points:
        return ""
    ys = [y + side * e for _, y, e in points for side in (-1, 1)]
    canvas = _Canvas(title, across, up, [x for x, _, _ in points], ys)
    for i, (name, each) in enumerate(series.items()):
        colour, each = COLOURS[i % len(COLOURS)], [point for point in each if math.isfinite(point[1])]
        upper = [canvas.place(x, y + (e or 0)) for x, y, e in each]
        lower = [canvas.place(x, y - (e or 0)) for x, y, e in reversed(each)]
        canvas.parts.append(f'<polygon points="{_way(upper + lower)}" fill="{colour}" opacity="0.15"/>')
        way = _way([canvas.place(x, y) for x, y, _ in each])
        canvas.parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        canvas.parts.append(text(LEFT + 8 + 230 * (i % 3), 40 + 14 * (i // 3), name, colour=colour))
    return canvas.svg()


def points(
    title: str, across: str, up: str, values: Mapping[str, tuple[float, float, float | None]], chosen: str = ""
) -> str:
    """A labelled point (x, y, error of y) for each name; the chosen one is marked."""
    if not values:
        return ""
    ys = [y + side * (e or 0) for _, y, e in values.values() for side in (-1, 1)]
    canvas = _Canvas(title, across, up, [0.0, *(x for x, _, _ in values.values())], ys)
    for i, (name, (x, y, error)) in enumerate(values.items()):
        colour = COLOURS[i % len(COLOURS)]
        at, height = canvas.place(x, y)
        if error:
            top, bottom = canvas.place(x, y + error)[1], canvas.place(x, y - error)[1]
            canvas.parts.append(f'<path d="M{at:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}" stroke-width="1.5"/>')
        if name == chosen:
            canvas.parts.append(f'<circle cx="{at:.1f}" cy="{height:.1f}" r="9" fill="none" stroke="{colour}"/>')
        canvas.parts.append(f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4.5" fill="{colour}"/>')
    canvas.parts += _labels({name: canvas.place(x, y) for name, (x, y, _) in values.items()})
    return canvas.svg()


def _labels(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names beside their points, none over another name or point where there is room; moved ones have a line."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points.values()]
    parts = []
    for i, (name, (x, y)) in enumerate(points.items()):
        colour, width = COLOURS[i % len(COLOURS)], 7.0 * len(name)
        sides = ("end", "start") if x > WIDTH * 0.6 else ("start", "end")
        places = [(side, 15.0 * step) for step in (0, -1, 1, -2, 2, -3, 3, -4, 4, -5, 5) for side in sides]
        boxes = [_box(x, y + shift, side, width) for side, shift in places]
        free = (k for k, box in enumerate(boxes) if _inside(box) and not any(_overlap(box, other) for other in taken))
        best = next(free, 0)
        (side, shift), box = places[best], boxes[best]
        taken.append(box)
        edge = box[2] if side == "end" else box[0]
        if shift:
            parts.append(
                f'<path d="M{x:.1f} {y:.1f}L{edge:.1f} {y + shift:.1f}" stroke="{colour}" stroke-width="0.7"/>'
            )
        parts.append(text(edge, y + shift + 4, name, side, colour))
    return parts


def _box(x: float, y: float, side: str, width: float) -> tuple[float, float, float, float]:
    """Where a name of this width stands: left, top, right, bottom."""
    return (x - 13 - width, y - 7, x - 13, y + 7) if side == "end" else (x + 13, y - 7, x + 13 + width, y + 7)


def _inside(box: tuple[float, float, float, float]) -> bool:
    return box[0] >= LEFT and box[2] <= WIDTH and box[1] >= TOP - 26 and box[3] <= HEIGHT - BOTTOM


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def shares(
    title: str, across: str, up: str, columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float]]
) -> str:
    """A map of shares from 0 (red) to 1 (green): one cell for each row and column."""
    height = TOP + BOTTOM + 36 * len(rows)
    parts = head(title, height)
    wide = (WIDTH - LEFT - RIGHT) / max(len(columns), 1)
    for r, row in enumerate(rows):
        parts.append(text(LEFT - 8, TOP + 36 * r + 22, row, "end"))
        for c, share in enumerate(values[r]):
            colour = f"hsl({120 * share:.0f},65%,62%)"
            parts.append(
                f'<rect x="{LEFT + wide * c:.1f}" y="{TOP + 36 * r}" width="{wide - 2:.1f}" height="34" '
                f'fill="{colour}"/>'
            )
            parts.append(text(LEFT + wide * (c + 0.5), TOP + 36 * r + 22, f"{share:.0%}", "middle"))
    for c, column in enumerate(columns):
        parts.append(text(LEFT + wide * (c + 0.5), height - BOTTOM + 16, column, "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, height - 10, across, "middle"))
    parts.append(text(LEFT, 44, up))
    return "\n".join([*parts, "</svg>\n"])


def _way(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
