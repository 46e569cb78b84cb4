"""Writes the manual pages, one of `llama2`, of each command and of each task, from the parsers: `make man`.

    python tools/man_pages.py FOLDER

The files are FOLDER/llama2.1, FOLDER/llama2-chat.1, FOLDER/llama2-finetune-sft.1 and so on. A wheel holds those of
build/man, where there are any (CMakeLists.txt). They have no date: the same parsers give the same bytes.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from argparse_manpage.manpage import Manpage

import llama2
from llama2 import cli
from llama2.cli.completion import children, whole_parser
from llama2.files import write_text


def manual_pages() -> dict[str, str]:
    """Returns every page in roff, by its file's name."""
    whole = whole_parser()
    pages = {
        "llama2.1": _list(("llama2",), whole.description or "", {n: text for n, (_, text) in cli.COMMANDS.items()})
    }
    for name, parser in children(whole).items():
        summary = cli.COMMANDS[name][1]
        tasks = children(parser)
        if tasks:
            texts = {task: " ".join((child.description or "").split(". ")[0].split()) for task, child in tasks.items()}
            pages[f"llama2-{name}.1"] = _list(("llama2", name), summary, texts)
            for task, child in tasks.items():
                pages[f"llama2-{name}-{task}.1"] = _page(("llama2", name, task), child, texts[task])
        else:
            pages[f"llama2-{name}.1"] = _page(("llama2", name), parser, summary)
    return pages


def _page(words: tuple[str, ...], parser: argparse.ArgumentParser, summary: str) -> str:
    page = Manpage(parser, _data={"version": llama2.__version__, "description": summary, "manual_title": "llama2"})
    page.prog, page.date, page.source = "-".join(words), "", f"llama2 {llama2.__version__}"
    # A line of text that begins with a dot, as ".parquet", would be read as a macro.
    text = re.sub(r"^\.(?=[a-z])(?!(?:nf|fi|br|sp)$)", r"\\&.", str(page), flags=re.MULTILINE)
    begin, typed = ".SH SYNOPSIS\n", " ".join(words)
    return text.replace(f"{begin}.B {words[0]}\n{' '.join(words[1:])} ", f"{begin}.B {_roff(typed)}\n", 1)


def _list(words: tuple[str, ...], summary: str, rows: Mapping[str, str]) -> str:
    name = "-".join(words)
    entries = "".join(f".TP\n.BR {_roff(f'{name}-{row}')} (1)\n{_roff(text)}\n" for row, text in rows.items())
    kind = "task" if words[1:] else "command"
    return "\n".join(
        (
            f'.TH {_roff(name.upper())} "1" "" "llama2 {llama2.__version__}" "llama2"',
            f".SH NAME\n{_roff(name)} \\- {_roff(summary)}",
            f".SH SYNOPSIS\n.B {_roff(' '.join(words))}\n.I {kind.upper()}\n[options]",
            f".SH {kind.upper()}S\n{entries}",
        )
    )


def _roff(text: str) -> str:
    return text.replace("\\", "\\\\").replace("-", "\\-")


def main(folder: Path) -> None:
    """Writes all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in manual_pages().items():
        write_text(folder / name, text)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
