"""Every link between pages leads to a file that is there, and to a heading of it."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "CODE_OF_CONDUCT.md")
]
PAGES = sorted(
    [*OUTSIDE, *(ROOT / "docs").rglob("*.md"), ROOT / "csrc" / "README.md", ROOT / "tests" / "peers" / "README.md"]
)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$", re.MULTILINE)
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
GENERATED = "docs/reference/"  # tests/test_site.py


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and mkdocs make them of headings; a repeated one has a number."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found |= {name, re.sub(r"-+", "-", name).strip("-")}
    return found


def faults(page: Path, text: str) -> list[str]:
    found = []
    for target in (a or b for a, b in LINK.findall(CODE.sub("", text))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if str(file.relative_to(ROOT)).startswith(GENERATED):
            continue
        if not file.exists():
            found.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            found.append(f"{target}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not faults(page, page.read_text())


def test_a_broken_link_is_found() -> None:
    page = ROOT / "README.md"
    text = (
        "[a](docs/none.md) [b](docs/cli.md#no-heading) [c](#nowhere) [d](docs/cli.md#chat) `[e](none)`\n[f]: none.md\n"
    )
    assert [fault.split(":")[0] for fault in faults(page, text)] == [
        "docs/none.md",
        "docs/cli.md#no-heading",
        "#nowhere",
        "none.md",
    ]
