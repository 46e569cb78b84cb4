"""`llama2 tokenize`: text to ids and back, without torch."""

import json
import re
import sys
from dataclasses import dataclass
from typing import Any, Literal

from llama2.cli.args import option
from llama2.cli.loading import ModelOptions, load_tokenizer, model_path
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TokenizeOptions(ModelOptions):
    """Show how a model's tokenizer splits text, or turn ids back into text."""

    text: tuple[str, ...] = option(
        (), "the text, several words joined by spaces; - reads the standard input", metavar="TEXT", positional=True
    )
    show: Literal["table", "ids", "json", "count"] = option(
        "table",
        "a table | only the ids, separated by spaces | one JSON object with ids, pieces and count | only how many",
        switches=True,
    )
    decode: bool = option(False, "the text is token ids, separated by spaces or commas; print what they stand for")
    special_tokens: bool = option(True, "add what the tokenizer puts around a text, such as <s>")


def run(options: TokenizeOptions) -> int:
    """Runs the command."""
    if not options.text:
        raise InputError("no text was given; add it to the command, or - to read the standard input")
    text = sys.stdin.read() if options.text == ("-",) else " ".join(options.text)
    if options.decode:
        ids = _parse_ids(text)
        tokenizer = load_tokenizer(model_path(options.model), options.revision)
        _check_range(ids, tokenizer)
        decoded = tokenizer.decode(ids)
        if options.show == "table":
            print(decoded)
            return 0
        return _show(ids, tokenizer, options.show)
    tokenizer = load_tokenizer(model_path(options.model), options.revision)
    return _show(tokenizer.encode(text, add_special_tokens=options.special_tokens), tokenizer, options.show)


def _parse_ids(text: str) -> list[int]:
    words = re.split(r"[\s,\[\]]+", text.strip(" \n\t[],"))
    bad = [word for word in words if not word.isdecimal()]
    if bad:
        raise InputError(f"{bad[0]!r} is not a token id; --decode takes whole numbers separated by spaces or commas")
    return [int(word) for word in words]


def _check_range(ids: list[int], tokenizer: Any) -> None:
    size = len(tokenizer)
    for token_id in ids:
        if token_id >= size:
            raise InputError(f"token id {token_id} does not exist; this tokenizer's ids run from 0 to {size - 1}")


def _show(ids: list[int], tokenizer: Any, how: str) -> int:
    if how == "ids":
        print(*ids)
    elif how == "count":
        print(len(ids))
    elif how == "json":
        pieces = tokenizer.convert_ids_to_tokens(ids)
        print(json.dumps({"ids": ids, "pieces": pieces, "count": len(ids)}, ensure_ascii=False))
    else:
        _table(ids, tokenizer)
    return 0


def _table(ids: list[int], tokenizer: Any) -> None:
    """Position, id, the piece as the vocabulary spells it, and the text it stands for where that differs."""
    pieces = [repr(piece)[1:-1] for piece in tokenizer.convert_ids_to_tokens(ids)]
    texts = [tokenizer.decode([i]) for i in ids]
    digits, width = len(str(max(ids, default=0))), max(map(len, pieces), default=0)
    for position, (i, piece, text) in enumerate(zip(ids, pieces, texts, strict=True)):
        shown = "" if text == piece else json.dumps(text, ensure_ascii=False)
        print(f"{position:>4}  {i:>{digits}}  {piece:<{width}}  {shown}".rstrip())
    print(f"{len(ids)} tokens")
