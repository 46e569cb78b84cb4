"""Writes src/llama2/__init__.pyi: what `from llama2 import ...` gives, for type checkers and editors.

The package resolves its names at their first use, which no type checker follows. Run `make format` after a change of
`_HOMES` in src/llama2/__init__.py; tests/test_architecture.py fails while the file is not what this makes.
"""

from pathlib import Path

import llama2

TARGET = Path(__file__).resolve().parent.parent / "src" / "llama2" / "__init__.pyi"
WIDTH = 120


def stub(homes: dict[str, tuple[str, ...]]) -> str:
    """The text of the file: an import a module, sorted, and `__all__`."""
    lines = ['"""Written by tools/write_stub.py from `_HOMES` in __init__.py; do not edit."""', ""]
    for module in sorted(homes):
        names = sorted(homes[module], key=lambda name: (not name[0].isupper(), name.lower()))
        line = f"from llama2.{module} import {', '.join(names)}"
        lines += [line] if len(line) <= WIDTH else [f"{line.split(' import ')[0]} import (", *_column(names), ")"]
    exported = [f'"{name}"' for name in sorted(name for names in homes.values() for name in names)]
    return "\n".join([*lines, "", "__version__: str", "__all__ = [", *_column(exported), "]"]) + "\n"


def _column(items: list[str]) -> list[str]:
    return [f"    {item}," for item in items]


if __name__ == "__main__":
    TARGET.write_text(stub(llama2._HOMES))
