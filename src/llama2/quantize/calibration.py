"""Text -> token windows of full length, seeded: what a calibrated method measures the inputs of a layer on.

Nothing is padded: documents follow one another, each with the special tokens that its tokenizer gives it, and windows
are cut from that stream without overlap. What is held out comes from its end, so no window reaches into it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.text_file import read_utf8

BUNDLED = "calibration.txt"
_HELD_OUT = 0.1  # of the stream, where no other text is given to measure on
# Names that transformers' users give; here there is no download.
_HUB_NAMES = ("wikitext2", "c4", "c4-new", "ptb", "ptb-new")


@dataclass(frozen=True)
class Calibration:
    """windows: ids (samples, length). held_out: ids (T,) that no window has, or none. origin: what the text is."""

    windows: Tensor
    held_out: Tensor
    origin: str
    digest: str
    held_out_origin: str = "the end of the calibration text"


def calibrate(
    data: str | Path | Sequence[Any] | None, tokenizer: Any, samples: int, length: int, seed: int
) -> Calibration:
    """Windows of `data`: a file, texts (or lists of chat messages), or None for the text that comes with the package.

    A .jsonl file has an object per line, with "text" or "messages" (which go through the chat template); any other is
    plain text. Fewer than `samples` windows come back where the text is short. Raises InputError where it is too short
    for one, and for what cannot be read.
    """
    if length < 2 or samples < 1:
        raise InputError(f"{samples} windows of {length} tokens are no calibration; give at least 1 of 2 tokens")
    documents, origin = _documents(data)
    digest, stream = hashlib.sha256(), []
    for document in documents:
        digest.update(repr(document).encode())
        stream += encode(document, tokenizer)
    kept = len(stream) - int(len(stream) * _HELD_OUT)
    count = kept // length
    if count == 0:
        raise InputError(
            f"{origin} has {len(stream)} tokens, of which {kept} calibrate: too few for a window of {length}; give "
            "more text, or a smaller length"
        )
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    ids = torch.tensor(stream)
    windows = ids[: count * length].view(count, length)[chosen].contiguous()
    return Calibration(windows, ids[kept:], origin, digest.hexdigest())


def encode(document: Any, tokenizer: Any) -> list[int]:
    """The ids of a text, or of a list of chat messages."""
    if isinstance(document, str):
        ids: list[int] = tokenizer(document, verbose=False)["input_ids"]
        return ids
    found: list[int] = tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)
    return found


def read_text(path: str | Path) -> str:
    """A UTF-8 file. Raises InputError where it is none, or empty."""
    text = read_utf8(path)
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


def _documents(data: str | Path | Sequence[Any] | None) -> tuple[list[Any], str]:
    if data is None:
        text = files("llama2.quantize").joinpath(BUNDLED).read_text(encoding="utf-8")
        return text.split("\n\n\n"), "the generated text that comes with llama2"
    if isinstance(data, str | Path):
        if str(data) in _HUB_NAMES and not Path(data).exists():
            return _dataset(str(data)), str(data)
        text = read_text(data)
        return (list(_rows(Path(data), text)) if Path(data).suffix == ".jsonl" else [text]), Path(data).name
    documents = list(data)
    if not documents or not all(isinstance(entry, str | list) for entry in documents):
        raise InputError("the calibration data must be texts, or lists of chat messages, and at least one of them")
    return documents, f"{len(documents)} given texts"


def _rows(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}, is not JSON ({error}); give an object per line") from error
        found = row.get("text", row.get("messages")) if isinstance(row, dict) else None
        if not isinstance(found, str | list):
            raise InputError(f'{path}, line {number}, has neither "text" (a string) nor "messages" (a list)')
        yield found


def _dataset(name: str) -> list[Any]:
    """A data set by the name that transformers knows, where the `datasets` package is here and can fetch it."""
    places = {"wikitext2": ("wikitext", "wikitext-2-raw-v1"), "ptb": ("ptb_text_only", "penn_treebank")}
    remedy = f"give the texts themselves, dataset=[text, ...] or --data FILE, instead of the name {name!r}"
    if name not in places:
        raise InputError(f"there is no download of data sets here; {remedy}")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"there is no download of data sets here (`datasets` is not installed); {remedy}") from error
    try:
        rows = datasets.load_dataset(*places[name], split="train")
    except Exception as error:  # whatever the network, the hub or the package raises
        raise InputError(f"`datasets` cannot load {name!r} ({error}); {remedy}") from error
    column = "text" if "text" in rows.column_names else "sentence"
    return ["\n\n".join(rows[column])]
