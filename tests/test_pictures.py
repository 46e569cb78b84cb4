"""The pictures of docs/assets are those of docs/measurements, whose figures stand on the page that they name."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from shell_lines import check, commands

DOCS = Path(__file__).resolve().parent.parent / "docs"
FILES = sorted((DOCS / "measurements").glob("*.json"))


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", DOCS.parent / "tools" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(measured: dict[str, Any]) -> list[str]:
    """Every measured number of a file, as a page writes it. Of lines the first of a point is how many, not how much."""
    if "bytes_per_position" in measured:
        return list(measured["bytes_per_position"].values())
    if measured["kind"] == "points":
        return [f"{number:g}" for point in measured["values"].values() for number in point]
    return [f"{point[1]:g}" for line in measured["values"].values() for point in line]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_picture_is_drawn_from_its_measurement(file: Path, pictures: ModuleType) -> None:
    """`make pictures` draws it."""
    assert (DOCS / "assets" / f"{file.stem}.svg").read_text() == pictures.drawn(json.loads(file.read_text()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_figures_stand_on_the_page(file: Path) -> None:
    measured = json.loads(file.read_text())
    page = (DOCS / measured["page"]).read_text()
    numbers = set(re.findall(r"\d+(?:\.\d+)?(?: [KM]iB)?", page)) | set(re.findall(r"\d+(?:\.\d+)?", page))
    numbers |= {number.rstrip("0").rstrip(".") for number in numbers if "." in number}
    assert not [number for number in figures(measured) if number not in numbers]
    assert f"assets/{file.stem}.svg" in page
    assert measured["machine"] and re.search(r"20\d\d", measured["date"])
    for words in commands(measured["command"]):
        check(words)


def test_there_are_three() -> None:
    assert {file.stem for file in FILES} == {"quality-size", "throughput-clients", "memory-context"}
    assert {file.stem for file in (DOCS / "assets").glob("*.svg")} == {file.stem for file in FILES}
