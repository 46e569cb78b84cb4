"""Every shell command of README.md and docs/ is one that the parsers, the Makefile and the metadata know."""

import re
from pathlib import Path

import pytest
from shell_lines import INLINE, ROOT, Wrong, check, check_mention, commands, fences, pages

import llama2
from llama2.errors import InputError

IDS = [str(page.relative_to(ROOT)) for page in pages()]


def faults(texts: list[tuple[str, list[str]]]) -> list[str]:
    found = []
    for shown, words in texts:
        try:
            check(words)
        except (Wrong, InputError) as error:
            found.append(f"{shown}: {error}")
    return found


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_commands_of_fences(page: Path) -> None:
    blocks = list(fences(page.read_text(), "sh"))
    assert not faults([(" ".join(words), words) for block in blocks for words in commands(block)])


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_commands_between_backticks(page: Path) -> None:
    """Those of a table of another tool's commands beside ours are whole; elsewhere words may be left out."""
    found = []
    for text in INLINE.findall(page.read_text()):
        try:
            if page.parent.name == "coming-from":
                for words in commands(text.replace("\\|", "|")):
                    check(words)
            else:
                check_mention(text)
        except (Wrong, InputError) as error:
            found.append(f"{text}: {error}")
    assert not found


@pytest.mark.parametrize("page", [page for page in pages() if page.parent.name == "coming-from"], ids=lambda p: p.stem)
def test_a_table_has_a_command_or_a_name_of_ours_in_each_row(page: Path) -> None:
    """And each name of another library that is told to be the same is one of this library's."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", page.read_text(), re.MULTILINE)[2:]
    assert len(rows) >= 12
    for theirs, ours in rows:
        if "the same" in ours:
            names = re.findall(r"`(?:model\.)?([A-Za-z_]+)", theirs)
            assert names and all(name in llama2.__all__ or hasattr(llama2.LlamaForCausalLM, name) for name in names)
        else:
            assert re.search(r"`(llama2|torchrun|/\w+) ?", ours), ours


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_every_fence_of_commands_says_so(page: Path) -> None:
    for block in fences(page.read_text(), ""):
        assert not re.search(r"^(\$ )?(llama2|make|pip|python|torchrun) (?!  )", block, re.MULTILINE), block


@pytest.mark.parametrize(
    "line, fault",
    [
        ("llama2 chatt", "not a command"),
        ("llama2 chat --modle x", "does not know"),
        ("llama2 convert A B --to onnx", "invalid choice"),
        ("llama2 finetune sftt M D O", "needs one of"),
        ("printf x | llama2 generate --no-such 2>/dev/null", "does not know"),
        ("torchrun -m llama2 serve M --prot 1", "does not know"),
        ("LLAMA2_ISA=avx2 llama2 bench M --nope", "does not know"),
        ("pip install 'llama2[serv]'", "no extra serv"),
        ("make tset", "no target tset"),
        ("python bench/nothing.py", "there is no bench/nothing.py"),
        ("python -m llama2.nothing", "there is no module"),
        ("conda install x", "neither"),
    ],
)
def test_what_is_wrong_is_found(line: str, fault: str) -> None:
    with pytest.raises((Wrong, InputError), match=fault):
        for words in commands(line):
            check(words)


def test_how_a_line_is_taken_apart() -> None:
    block = (
        "cd x && llama2 pull y  # a note\nA=1 llama2 serve z \\\n  --port 1 > out 2>&1 &\n"
        "cat > rows <<'E'\nllama2 nonsense\nE\nllama2 generate 'a | b' -- '-5'\n"
    )
    assert list(commands(block)) == [
        ["cd", "x"],
        ["llama2", "pull", "y"],
        ["A=1", "llama2", "serve", "z", "--port", "1"],
        ["cat"],
        ["llama2", "generate", "a | b", "--", "-5"],
    ]
