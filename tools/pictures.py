"""Draws the pictures of docs/assets from the measurements in docs/measurements: `make pictures`.

A measurement is a JSON object: kind (points or lines), title, across and up (the axes), values as
`llama2.evaluate.picture` takes them, the command, the machine and the date of the figures, and the page of docs/ that
has them. `bytes_per_position` and `contexts`, in place of values, give lines of memory. tests/test_pictures.py compares
the figures with the page, and the pictures with the figures.
"""

import json
from pathlib import Path
from typing import Any

from llama2.evaluate import picture
from llama2.files import write_text

DOCS = Path(__file__).resolve().parent.parent / "docs"
UNITS = {"KiB": 2**10, "MiB": 2**20}


def drawn(measured: dict[str, Any]) -> str:
    """Returns the picture of a measurement as SVG. Raises KeyError for a kind that there is not."""
    labels = (measured["title"], measured["across"], measured["up"])
    if "bytes_per_position" in measured:
        return picture.lines(*labels, memory_lines(measured["bytes_per_position"], measured["contexts"]))
    draw = {"points": picture.points, "lines": picture.lines}[measured["kind"]]
    return draw(*labels, measured["values"])


def memory_lines(sizes: dict[str, str], contexts: list[int]) -> dict[str, list[tuple[float, float, None]]]:
    """Returns GiB at each context for every name; sizes are texts such as "512 KiB"."""
    lines = {}
    for name, size in sizes.items():
        number, unit = size.split()
        each = float(number) * UNITS[unit] / 2**30
        lines[name] = [(float(context), each * context, None) for context in contexts]
    return lines


def main() -> None:
    """Draws all of them."""
    for file in sorted((DOCS / "measurements").glob("*.json")):
        write_text(DOCS / "assets" / f"{file.stem}.svg", drawn(json.loads(file.read_text())))


if __name__ == "__main__":
    main()
