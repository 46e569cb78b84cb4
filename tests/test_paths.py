"""The four paths of docs/how-it-works.md: every room exists, is entered once, and is imported on its path."""

import ast
import re
from pathlib import Path

import pytest
from rooms import walked

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "llama2"
_PATH = re.compile(r"^- (\S+ -> \S+), driven by ((?:.|\n  )+)$", re.M)
TEXT = (ROOT / "docs" / "how-it-works.md").read_text()
PATHS = {name: re.findall(r"`([\w/.]+)`", rooms) for name, rooms in _PATH.findall(TEXT)}


def files(room: str) -> list[Path]:
    place = PACKAGE / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def imported(room: str) -> set[str]:
    """Modules that a room imports, through doors too, as dotted names in the package."""
    found = set()
    for path in files(room):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama2"):
                module = (node.module or "")[len("llama2.") :]
                found |= {module, *(f"{module}.{alias.name}".lstrip(".") for alias in node.names)}
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("door", "declares"):
                found |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return found


def dotted(room: str) -> str:
    return room.rstrip("/").removesuffix(".py").replace("/", ".")


def test_the_document_has_the_four_paths() -> None:
    assert list(PATHS) == ["text -> text", "checkpoint -> module", "rows -> checkpoint", "request -> stream"]
    assert [len(rooms) for rooms in PATHS.values()] == [8, 7, 10, 9]  # the driver included


@pytest.mark.parametrize("name", ["text -> text", "checkpoint -> module", "rows -> checkpoint", "request -> stream"])
def test_rooms_are_there_and_entered_once(name: str) -> None:
    rooms = PATHS[name]
    assert len(set(rooms)) == len(rooms)
    assert not [room for room in rooms if not all(path.exists() for path in files(room)) or not files(room)]


@pytest.mark.parametrize("name", ["text -> text", "checkpoint -> module", "rows -> checkpoint", "request -> stream"])
def test_every_room_is_imported_by_one_of_its_path(name: str) -> None:
    rooms = PATHS[name]
    for room in rooms[1:]:
        others = set().union(*(imported(other) for other in rooms if other != room))
        assert any(known == dotted(room) or known.startswith(dotted(room) + ".") for known in others), (
            f"nothing on the path {name} imports {room}"
        )


BESIDE = 14  # files that an answer calls besides the rooms of its path: settings, forms, the arithmetic of a draw


def test_an_answer_walks_its_path(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind loading, which is a path of its own. Only the ids go back: into the tokenizer, as text."""
    from llama2.cli import generate, loading

    options = generate.GenerateOptions(prompt=("Hello",), chat=True, model=str(smollm2), max_new_tokens=3, seed=1,
                                       temperature=0.6)  # fmt: skip
    loaded = loading.load(options)
    monkeypatch.setattr(generate, "load", lambda _: loaded)
    generate.run(options)  # what is imported late is there now
    with walked() as walk:
        generate.run(options)
    rooms = PATHS["text -> text"]
    assert walk.rooms(rooms) == rooms
    assert walk.backward(rooms) == {("cli/session.py", "tokenizer/")}
    assert len(walk.beside(rooms)) <= BESIDE, sorted(walk.beside(rooms))
