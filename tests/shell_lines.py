"""The shell commands of README.md and docs/: found in fences and between backticks, and given to the real parsers."""

import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

from llama2 import cli
from llama2.cli.args import make_parser, parse

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^ *```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`+((?:llama2|make|pip install|torchrun) [^`]+)`")
# Programs of others: that they are there, and what they take, is not this project's to know.
OTHERS = {
    "cd", "cat", "cmake", "curl", "echo", "export", "git", "head", "kubectl", "lm_eval", "md5sum", "ollama", "podman",
    "printf", "serve", "sleep", "source", "trap", "kill", "wait", "test",
}  # fmt: skip
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = set(_PROJECT["optional-dependencies"])
_MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([\w-]+):", _MAKEFILE, re.MULTILINE))


_REDIRECTION = re.compile(r"""('[^']*'|"[^"]*"|#.*)|(?<=\s)[12]?(?:>>?|<)\s*&?\S+""")


class Wrong(ValueError):
    """A command that cannot be what a reader should type."""


def pages() -> list[Path]:
    """Every page that tells a reader what to type. The log tells what was typed once."""
    docs = [page for page in (ROOT / "docs").rglob("*.md") if page.name != "LOG.md"]
    return sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *docs])


def fences(text: str, *languages: str) -> Iterator[str]:
    """The contents of fences of these languages."""
    for language, body in FENCE.findall(text):
        if language in languages:
            yield body


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of a block: pipes, lists, redirections and here-documents are taken apart."""
    block = re.sub(r"<<\s*'?(\w+)'?([^\n]*)\n.*?^\1$", r"\2", block, flags=re.MULTILINE | re.DOTALL)
    for line in _lines(block.replace("\\\n", " ")):
        lexer = shlex.shlex(_REDIRECTION.sub(lambda match: match[1] or " ", line), posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for token in lexer:
            if set(token) <= set("|&;"):
                yield from [words] if words else []
                words = []
            else:
                words.append(token)
        yield from [words] if words else []


def _lines(block: str) -> Iterator[str]:
    """Lines, those of an open quotation as one."""
    open_line = ""
    for line in block.splitlines():
        open_line += line
        try:
            shlex.split(open_line, comments=True)
        except ValueError:
            open_line += "\n"
            continue
        yield open_line
        open_line = ""
    if open_line:
        raise Wrong(f"a quotation that is not closed: {open_line!r}")


def check(words: list[str]) -> None:
    """Raises Wrong, or the parser's own InputError, for a command that cannot run."""
    while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program = Path(words[0]).name
    if program in ("python", "python3", "torchrun"):
        _check_python(words[1:], program)
    elif program == "pip":
        for extras in re.findall(r"(?:\.|llama2)\[([\w,]+)\]", " ".join(words)):
            if unknown := set(extras.split(",")) - EXTRAS:
                raise Wrong(f"there is no extra {', '.join(sorted(unknown))}")
    elif program == "make":
        names = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        if unknown := set(names) - TARGETS:
            raise Wrong(f"the Makefile has no target {', '.join(sorted(unknown))}")
    elif program == "llama2":
        check_llama2(words[1:])
    elif program not in OTHERS:
        raise Wrong(f"{program} is neither this project's nor in OTHERS")


def _check_python(words: list[str], program: str) -> None:
    if "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        if module == "llama2":
            check_llama2(rest)
        elif module.startswith("llama2.") and importlib.util.find_spec(module) is None:
            raise Wrong(f"there is no module {module}")
        return
    file = next((word for word in words if word.endswith(".py")), None)
    if (
        file is not None
        and file.startswith(("bench/", "examples/", "tools/", "tests/"))
        and not (ROOT / file).is_file()
    ):
        raise Wrong(f"there is no {file}")
    if file is None and "-c" not in words:
        raise Wrong(f"{program} without a script")


def check_llama2(words: list[str]) -> None:
    """Gives a command line to the parser that would read it. Raises InputError."""
    if not words or words[0] in ("--help", "--version"):
        return
    name, *rest = words
    module = cli._module(name)
    command: tuple[str, ...] = (name,)
    if getattr(module, "TASKS", None):
        if "--config" in rest:
            return
        if rest[:1] == ["--help"]:
            return
        command, rest = (name, *rest[:1]), rest[1:]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        parse(cli.options_class(command), " ".join(("llama2", *command)), rest)


def check_mention(text: str) -> None:
    """Checks a command between backticks, in which words may be left out: the command is there, and so is each flag."""
    words = [word for words in commands(text.replace("...", " ").replace("…", " ")) for word in words]
    if words[0] == "torchrun":
        words = words[words.index("-m") + 1 :] if "-m" in words else ["llama2"]
    elif words[0] != "llama2":
        check(words)
        return
    names = [word for word in words[1:] if not word.startswith("-")]
    if not names or names[0].isupper():  # `llama2 COMMAND --help`, `llama2 --version`
        return
    known = _flags(names[0])
    for word in words[1:]:
        flag = word.split("=")[0]
        if flag.startswith("--") and len(flag) > 2 and flag not in known | {"--help", "--debug"}:
            raise Wrong(f"llama2 {names[0]} has no {flag}")


def _flags(name: str) -> set[str]:
    tasks = getattr(cli._module(name), "TASKS", None)
    kinds = [cli.options_class((name, task)) for task in tasks] if tasks else [cli.options_class((name,))]
    return {flag for kind in kinds for flag in make_parser(kind, "llama2")._option_string_actions}
