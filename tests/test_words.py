"""Standard technical English in docstrings, help, metrics and messages: the rules of CONTRIBUTING.md."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama2 import cli
from llama2.serve.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "llama2"
FILES = sorted(PACKAGE.rglob("*.py"))
_UNIT = "second|minute|token|row|step|group|column|weight|layer|request|epoch"
_UNITS = "tokens|bytes|bits|seconds|times|requests|GB|MB|ms|us"
IDIOMS = {
    "per, not a, before a unit": re.compile(rf"\b(?:{_UNITS}) an? (?:{_UNIT})\b(?! (?:is|has))"),
    "one per line, one per row": re.compile(r"\b[Oo]ne an? (?:line|row|token|prompt|request|step)\b(?! (?:is|has))"),
    "the operator, the caller": re.compile(r"\bwho(?:m)?ever\b", re.I),
    "receives, is called with": re.compile(r"\bhears?\b", re.I),
    "permanently": re.compile(r"\b(?:weights|process|files?) for good\b"),
    "in place of": re.compile(r"\bin the place of\b"),
}
# Pages of README.md and docs/ have these too; the log is history.
PAGE_IDIOMS = IDIOMS | {
    "without a warning": re.compile(r"\bwithout a word\b"),
    "and similar, its variants": re.compile(r"\b(?:its|and) kin\b"),
    "is reported": re.compile(r"\b(?:is|are) told\b(?! (?:by|from|apart))"),
    "none, no process, no client": re.compile(r"\bnobody\b", re.I),
    "by itself": re.compile(r"\bunasked\b"),
    "was not available": re.compile(r"\bto be had\b"),
    "permanently, always": re.compile(r"\bfor good\b"),
}
PAGES = sorted(
    [ROOT / "README.md", ROOT / "SECURITY.md", *(p for p in (ROOT / "docs").rglob("*.md") if p.name != "LOG.md")]
)


def sentences(path: Path) -> Iterator[tuple[int, str]]:
    """Docstrings, and texts of several words that are handed to a call: help, messages of errors and warnings."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield getattr(node, "lineno", 1), " ".join(text.split())
        elif isinstance(node, ast.Call):
            for inner in (*node.args, *(keyword.value for keyword in node.keywords)):
                for part in ast.walk(inner):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and " " in part.value:
                        yield part.lineno, part.value


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_sentence_has_an_old_idiom(path: Path) -> None:
    found = [
        f"{path.name}:{line}: write '{remedy}': {text[max(0, match.start() - 30) : match.end() + 30]!r}"
        for line, text in sentences(path)
        for remedy, idiom in IDIOMS.items()
        if (match := idiom.search(text))
    ]
    assert not found


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_page_has_an_old_idiom(path: Path) -> None:
    text = " ".join(re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL).split())
    found = [
        f"write '{remedy}': {text[max(0, match.start() - 30) : match.end() + 30]!r}"
        for remedy, idiom in PAGE_IDIOMS.items()
        for match in idiom.finditer(text)
    ]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_docstring_says_what_it_is_or_does(path: Path) -> None:
    """It begins with a verb or a noun, never with a question."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            assert not re.match(r"What\b|Who\b|Whoever\b|Whatever\b", text), f"{path.name}: {text.splitlines()[0]}"


def test_help_and_metrics_are_read_too() -> None:
    """The sentences above hold every flag's help and every metric's HELP; here as users get them."""
    texts = [text for _, text in cli.COMMANDS.values()]
    for name in cli.COMMANDS:
        module = __import__(cli.COMMANDS[name][0], fromlist=["TASKS"])
        for task in getattr(module, "TASKS", None) or ("",):
            kind = cli.options_class((name, task) if task else (name,))
            texts += [field.metadata.get("help", "") for field in dataclasses.fields(kind)]
    texts += re.findall(r"^# HELP \S+ (.+)$", Metrics().page(), re.M)
    assert len(texts) > 300
    assert not [text for text in texts for idiom in IDIOMS.values() if idiom.search(text)]


def test_the_glossary_has_forty_terms_and_three_rules() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    words = text[text.index("## Words") :]
    rows = re.findall(r"^\| (?!term|---)([^|]+) \| ([^|]+) \|$", words, re.M)
    assert len(rows) >= 38 and len({term for term, _ in rows}) == len(rows)
    assert len(re.findall(r"^\d\. ", words, re.M)) == 3 and words.count("Before:") == words.count("After:") >= 3
