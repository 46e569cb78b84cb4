"""SentencePiece model files (`tokenizer.model`): a protobuf message read and written without protobuf.

Fields used, from sentencepiece_model.proto: ModelProto {1 pieces, 2 trainer_spec, 3 normalizer_spec};
SentencePiece {1 piece, 2 score (float), 3 type}; TrainerSpec {3 model_type, 24 treat_whitespace_as_suffix,
35 byte_fallback};
NormalizerSpec {1 name, 2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces}.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2.errors import CheckpointError, TokenizerError
from llama2.text_file import LISTING_BYTES, read_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2
MAX_PIECE = 4096  # characters; Llama 2's longest has 16


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """The parts of the file that decide how a text is encoded. Index in `pieces` is the token id."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    model_type: int = _BPE
    byte_fallback: bool = True
    normalizer: str = "identity"
    has_charsmap: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = False
    escape_whitespaces: bool = True
    whitespace_as_suffix: bool = False
    raw: bytes = b""  # the file itself, where there is one: saving gives it back unchanged
    _merges: list[tuple[str, str]] = field(default_factory=list, repr=False, compare=False)  # worked out once

    @classmethod
    def from_file(cls, path: str | Path) -> "SentencePieceModel":
        """Read `path`. CheckpointError where it is missing, empty or no SentencePiece model."""
        try:
            return cls.from_bytes(read_bytes(path, LISTING_BYTES))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(
                f"no SentencePiece model at {path}; give the path of a tokenizer.model file"
            ) from error
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> "SentencePieceModel":
        """Parse a serialised ModelProto."""
        try:
            return _parse(data)
        except (IndexError, struct.error, UnicodeDecodeError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"not a SentencePiece model ({len(data)} bytes, {error}); perhaps truncated or a Git LFS pointer"
            ) from error

    def to_bytes(self, add_dummy_prefix: bool | None = None) -> bytes:
        """A serialised ModelProto with the same behaviour; the original bytes where it was read from a file.

        add_dummy_prefix: None leaves that setting as it is.
        """
        data = self.raw or _serialize(self)
        if add_dummy_prefix is None or add_dummy_prefix == self.add_dummy_prefix:
            return data
        # a second normalizer_spec is merged into the first, field by field: the rule of protobuf for messages
        return data + _string(3, _number(3, add_dummy_prefix))

    @property
    def is_plain(self) -> bool:
        """Whether a text is cut into its characters as it stands, but for the space in front: as Llama's models do."""
        changes = self.has_charsmap or self.remove_extra_whitespaces or USER_DEFINED in self.types
        return self.byte_fallback and BYTE in self.types and not changes

    def check_llama(self) -> "SentencePieceModel":
        """Refuse models whose ids no Llama tokenizer has. TokenizerError that names the settings."""
        faults = []
        if self.model_type != _BPE:
            faults.append(f"model_type {self.model_type} (needs 2, BPE)")
        if not self.escape_whitespaces:
            faults.append("escape_whitespaces=false (spaces must be written as '▁')")
        if self.whitespace_as_suffix:
            faults.append("treat_whitespace_as_suffix=true (the '▁' must stand in front of a word)")
        if faults:
            raise TokenizerError(f"this SentencePiece model is not of the Llama kind: {'; '.join(faults)}")
        return self

    def beyond_ranks(self) -> str | None:
        """Returns the part of this model that merge ranks cannot express; None if there is none."""
        if self.has_charsmap:
            return f"its normalizer {self.normalizer!r} rewrites characters"
        if self.remove_extra_whitespaces:
            return "it removes extra whitespace"
        if USER_DEFINED in self.types:
            return f"it has user-defined symbols ({self.pieces[self.types.index(USER_DEFINED)]!r})"
        if not (self.byte_fallback and BYTE in self.types):
            return "it has no byte fallback, and neighbouring unknown characters become one token"
        pair = self._tied_pieces()
        return None if pair is None else "{!r} and {!r} share one score, and the leftmost is merged first".format(*pair)

    def _tied_pieces(self) -> tuple[str, str] | None:
        """Two pieces of one score of which a text may offer either first; SentencePiece takes the leftmost.

        Runs of "▁", which share a score in Llama 2's vocabulary, come out the same in any order of ranks.
        """
        groups: dict[float, list[str]] = {}
        for piece, score, piece_type in zip(self.pieces, self.scores, self.types):
            if piece_type == NORMAL and len(piece) > 1 and piece.strip("▁"):
                groups.setdefault(score, []).append(piece)
        tied = {piece: score for score, group in groups.items() if len(group) > 1 for piece in group}
        if not tied:
            return None
        score_of = dict(zip(self.pieces, self.scores))
        begins: dict[tuple[float, str], set[str]] = {}  # (score, left half) -> tied pieces
        merges = [(left, right) for left, right in self.merges() if left + right in tied]
        for left, right in merges:
            begins.setdefault((tied[left + right], left), set()).add(left + right)
        for left, right in merges:
            others = begins.get((tied[left + right], right), set()) - {left + right}
            if others:
                return left + right, min(others)
        for left, right in self.merges():  # a piece that goes on from a tied one before its equals have had their turn
            half = left if left in tied else right
            if half in tied and score_of[left + right] >= tied[half] and left + right not in tied:
                return half, next(piece for piece in groups[tied[half]] if piece != half)
        return None

    def merges(self) -> list[tuple[str, str]]:
        """BPE merges in rank order: every split of each normal piece into two known pieces, best score first.

        Equal scores (the whitespace runs of Llama 2, all -1e9) fall back to the ids of the two halves.
        """
        if self._merges:
            return self._merges
        usable = (NORMAL, USER_DEFINED)
        ids = {piece: i for i, piece in enumerate(self.pieces) if self.types[i] in usable}
        candidates: list[tuple[float, int, int, str, str]] = []
        for piece, i in ids.items():
            score = -self.scores[i]
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left in ids and right in ids:
                    candidates.append((score, ids[left], ids[right], left, right))
        candidates.sort()
        self._merges.extend((left, right) for *_, left, right in candidates)
        return self._merges


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise OverflowError("a number of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message; a length that passes the end is an IndexError."""
    offset, end = 0, len(data)
    while offset < end:
        key, offset = _varint(data, offset)
        wire_type = key & 7
        if wire_type == 0:
            value: int | bytes
            value, offset = _varint(data, offset)
        else:
            if wire_type == 2:
                size, offset = _varint(data, offset)
            elif wire_type in (1, 5):
                size = 8 if wire_type == 1 else 4
            else:
                raise TypeError(f"wire type {wire_type} at byte {offset}")
            value = data[offset : offset + size]
            offset += size
            if offset > end:
                raise IndexError(f"field {key >> 3} ends at byte {offset} of {end}")
        yield key >> 3, value


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    specs: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            piece, score, piece_type = _parse_piece(value)
            pieces.append(piece)
            scores.append(score)
            types.append(piece_type)
        elif number in specs and isinstance(value, bytes):
            specs[number].update(_fields(value))
    if not pieces or len(pieces) > 2**24 or max(map(len, pieces)) > MAX_PIECE:
        raise IndexError(f"{len(pieces)} pieces, the longest of {max(map(len, pieces), default=0)} characters")
    trainer, normalizer = specs[2], specs[3]
    name = normalizer.get(1, b"")
    return SentencePieceModel(
        tuple(pieces),
        tuple(scores),
        tuple(types),
        model_type=int(trainer.get(3, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
        normalizer=name.decode() if isinstance(name, bytes) else str(name),
        has_charsmap=bool(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        raw=data,
    )


def pieces_of_text(data: bytes) -> list[tuple[int, str, int, int]]:
    """(id, piece, first byte, byte behind the last) of each piece of a serialised SentencePieceText."""
    pieces = []
    for number, value in _fields(data):
        if number == 2 and isinstance(value, bytes):
            entry: dict[int, Any] = dict(_fields(value))
            pieces.append((entry.get(2, 0), entry.get(1, b"").decode(), entry.get(4, 0), entry.get(5, 0)))
    return pieces


def _parse_piece(data: bytes) -> tuple[str, float, int]:
    # The common layout (string, float, optional type), read without the general loop: 32,000 pieces in 20 ms.
    size = data[1]
    end = 2 + size
    if size < 0x80 and data[0] == 0x0A and data[end : end + 1] == b"\x15":
        piece, score = data[2:end].decode(), struct.unpack_from("<f", data, end + 1)[0]
        rest = data[end + 5 :]
        if not rest:
            return piece, score, NORMAL
        if len(rest) == 2 and rest[0] == 0x18:
            return piece, score, rest[1]
    fields = dict(_fields(data))
    text, packed, piece_type = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(packed, bytes) or not isinstance(piece_type, int):
        raise TypeError("a piece of an unknown layout")
    return text.decode(), struct.unpack("<f", packed)[0], piece_type


def _number(field: int, value: int) -> bytes:
    return _encode_varint(field << 3) + _encode_varint(value)


def _string(field: int, value: bytes) -> bytes:
    return _encode_varint(field << 3 | 2) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _serialize(model: SentencePieceModel) -> bytes:
    body = bytearray()
    for piece, score, piece_type in zip(model.pieces, model.scores, model.types):
        entry = _string(1, piece.encode()) + b"\x15" + struct.pack("<f", score)
        body += _string(1, entry if piece_type == NORMAL else entry + _number(3, piece_type))
    trainer = _number(3, model.model_type) + _number(4, len(model.pieces)) + _number(35, model.byte_fallback)
    body += _string(2, trainer + _special_ids(model))
    normalizer = _string(1, model.normalizer.encode()) + _number(3, model.add_dummy_prefix)
    body += _string(3, normalizer + _number(4, model.remove_extra_whitespaces) + _number(5, 1))
    return bytes(body)


def _special_ids(model: SentencePieceModel) -> bytes:
    """TrainerSpec 40 to 43 (unk, bos, eos, pad id) and 45 to 47 (their pieces): SentencePiece checks that they fit."""
    unk = model.types.index(UNKNOWN) if UNKNOWN in model.types else 0
    out = _number(40, unk) + _string(45, model.pieces[unk].encode())
    for number, piece in ((41, "<s>"), (42, "</s>")):
        known = piece in model.pieces
        # -1 (absent) is written as the 64-bit two's complement that protobuf uses for a negative int32
        out += _number(number, model.pieces.index(piece) if known else 2**64 - 1)
    return out + _number(43, 2**64 - 1)
