"""A SentencePiece model from a tokenizer.json alone, as transformers 5 saves Llama's: scores from the merges' ranks.

SentencePiece joins the pair whose piece has the highest score, the leftmost of equals; a tokenizer.json lists for each
piece every pair that makes it, in the order of the scores. So the piece of an earlier merge gets a higher score, and
pieces whose merges are interleaved get the same. Which of the pairs that make one piece comes first differs between
transformers 4, 5 and this library.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.checkpoint import read_json
from llama2.errors import CheckpointError
from llama2.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SentencePieceModel


def rebuild(folder: Path, tokenizer: Any) -> SentencePieceModel | None:
    """The SentencePiece model behind the tokenizer.json of a folder; None where there is none behind it.

    tokenizer: the one of the folder, whose treatment of spaces and special tokens count. Warns where the merges are not
    those of a SentencePiece model, so that rare words may be cut otherwise.
    """
    document = read_json(folder / "tokenizer.json")
    model = document.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback") or tokenizer.space_prefix is None:
        return None
    pieces = _pieces(folder, model["vocab"])
    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    scores = _scores(pieces, [left + right for left, right in merges])
    made = SentencePieceModel(tuple(pieces), tuple(scores), tuple(_types(pieces, model, tokenizer)))
    # Only which pairs there are: the order of those that make one piece differs between programs, and says nothing.
    if set(made.merges()) != set(merges):
        warnings.warn(
            f"{folder}/tokenizer.json has merges that no SentencePiece model has; with the rebuilt one rare words may "
            "be cut into other tokens",
            stacklevel=4,
        )
    return made


def _pieces(folder: Path, vocabulary: Mapping[str, int]) -> list[str]:
    pieces = sorted(vocabulary, key=lambda piece: vocabulary[piece])
    if [vocabulary[piece] for piece in pieces] != list(range(len(pieces))):
        raise CheckpointError(
            f"{folder}/tokenizer.json has a vocabulary with gaps; a tokenizer lists tokens by their id"
        )
    return pieces


def _scores(pieces: list[str], made: list[str]) -> list[float]:
    """made: the piece of each merge in order."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, piece in enumerate(made):
        first.setdefault(piece, rank)
        last[piece] = rank
    level, end = -1, -1
    scores: dict[str, float] = {}
    for piece, start in first.items():
        if start > end:
            level += 1
        end = max(end, last[piece])
        scores[piece] = -float(level)
    # Characters, bytes and special tokens are never made, so that theirs say nothing.
    return [scores.get(piece, -float(level + 1) if len(piece) == 1 else 0.0) for piece in pieces]


def _types(pieces: list[str], model: Mapping[str, Any], tokenizer: Any) -> list[int]:
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    unknown = model.get("unk_token") or tokenizer.unk_token or "<unk>"
    types = []
    for piece in pieces:
        if piece == unknown:
            types.append(UNKNOWN)
        elif len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            types.append(BYTE)
        elif piece in added or piece in ("<s>", "</s>"):
            special = piece not in added or added[piece].special
            types.append(CONTROL if special else USER_DEFINED)
        else:
            types.append(NORMAL)
    return types
