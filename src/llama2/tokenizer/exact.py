"""Text to ids by sentencepiece itself, with Python finding the added tokens around it.

The path of `LlamaTokenizer`, and of `LlamaTokenizerFast` for models whose segmentation merge ranks cannot express.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llama2.errors import CheckpointError, TokenizerError
from llama2.tokenizer.added import TokenMatcher
from llama2.tokenizer.encoding import Segment, Span
from llama2.tokenizer.prefix import SPACES, Prefix, normalize, surrogate_message
from llama2.tokenizer.sentencepiece_model import BYTE, SentencePieceModel, pieces_of_text
from llama2.tokenizer.word_cache import WordMemory, cuts_hold

Matchers = tuple[TokenMatcher, TokenMatcher]


class SentencePieceEncoder:
    """Encodes texts with a SentencePiece model. `matchers` gives (tokens of the raw text, tokens of the normal one)."""

    def __init__(
        self, model: SentencePieceModel, prefix: Prefix, matchers: Callable[[], Matchers], options: dict[str, Any]
    ):
        self._model, self._prefix, self._matchers, self._options = model, prefix, matchers, options
        self._processors: dict[bool, Any] = {}
        self._memory: WordMemory | None = None
        # sampled segmentation is drawn anew at each call: nothing to remember
        if not options and model.is_plain and cuts_hold(model.pieces):
            self._memory = WordMemory(self.processor(False).encode, prefix)

    def processor(self, dummy_prefix: bool) -> Any:
        """The `sentencepiece.SentencePieceProcessor`, with or without its space in front of each text."""
        if dummy_prefix not in self._processors:
            import sentencepiece

            data = self._model.to_bytes(add_dummy_prefix=dummy_prefix)
            try:
                made = sentencepiece.SentencePieceProcessor(model_proto=data, **self._options)
            except (RuntimeError, TypeError) as error:
                raise CheckpointError(f"sentencepiece refuses this tokenizer.model: {error}; fetch it again") from error
            self._processors[dummy_prefix] = made
        return self._processors[dummy_prefix]

    # -- ids -----------------------------------------------------------------------------------------------------
    def ids(self, texts: list[str], keep_special: bool) -> list[list[int]]:
        """The ids of each text, without the special tokens around it."""
        memory = self._memory
        try:
            return [
                self._encode(text, keep_special) if memory is None or self._has_added(text) else memory.ids(text)
                for text in texts
            ]
        except RuntimeError as error:
            raise TokenizerError(surrogate_message(texts)) from error

    def parts(self, parts: Sequence[str | int]) -> list[int]:
        """Texts taken literally, between ids already known; the first text has the prefix of a text's start."""
        ids: list[int] = []
        for i, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
            elif i == 0 or self._prefix in ("every", "never"):
                ids += self._encode(part, keep_special=False)
            else:
                ids += self.inside(part)
        return ids

    def inside(self, text: str) -> list[int]:
        """Text taken literally as it stands inside another: nothing is put in front of it."""
        ids: list[int] = self.processor(False).encode(text)
        return ids

    def _has_added(self, text: str) -> bool:
        raw, late = self._matchers()
        return raw.any_in(text) or (bool(late) and late.any_in(normalize(text, self._prefix)))

    def _encode(self, text: str, keep_special: bool) -> list[int]:
        ids: list[int] = []
        for token_id, piece, start, _ in self._split(text, keep_special):
            if token_id is None:
                ids += self.processor(self._dummy(piece, start)).encode(piece)
            else:
                ids.append(token_id)
        return ids

    def _dummy(self, piece: str, start: int) -> bool:
        """Whether sentencepiece is to put the space in front: where it also normalises, it must see the text itself."""
        if self._model.is_plain:
            return False  # `_split` has put the "▁" in front already
        at_start = start == 0 and not (self._prefix == "metaspace" and piece.startswith(SPACES))
        return self._prefix == "every" or (self._prefix in ("first", "metaspace") and at_start)

    def _split(self, text: str, keep_special: bool) -> Iterator[tuple[int | None, str, int, int]]:
        """(id, "", start, stop) of an added token, or (None, its text, start, stop); places in `text`.

        The text of a plain model has its "▁" already.
        """
        raw, late = self._matchers()
        for token_id, start, stop in raw.split(text, keep_special):
            if token_id is not None:
                yield token_id, "", start, stop
            elif self._model.is_plain:
                yield from self._split_normal(text[start:stop], start, late, keep_special)
            else:
                yield None, text[start:stop], start, stop

    def _split_normal(
        self, stretch: str, start: int, late: TokenMatcher, keep_special: bool
    ) -> Iterator[tuple[int | None, str, int, int]]:
        normal = normalize(stretch, self._prefix)
        shift = start - (len(normal) - len(stretch))  # the "▁" in front has no character of its own
        for inner_id, first, last in late.split(normal, keep_special):
            if inner_id is not None:
                yield inner_id, "", max(start, first + shift), last + shift
                continue
            piece, low = normal[first:last], max(start, first + shift)
            # the first stretch of the whole text, as Metaspace tells it: by its place, and not by its order
            if self._prefix in ("first", "metaspace") and low == 0 and not piece.startswith(SPACES):
                piece = "▁" + piece
            yield None, piece, low, last + shift

    # -- ids with their places -----------------------------------------------------------------------------------
    def segments(self, texts: list[str], keep_special: bool) -> list[Segment]:
        """The ids of each text with the characters and the word of each."""
        try:
            return [self._segment(text, keep_special) for text in texts]
        except RuntimeError as error:
            raise TokenizerError(surrogate_message(texts)) from error

    def _segment(self, text: str, keep_special: bool) -> Segment:
        found = Segment([], [], [])
        word = -1
        for token_id, piece, low, stop in self._split(text, keep_special):
            if token_id is not None:
                rows: list[tuple[int, Span, bool]] = [(token_id, (low, stop), True)]
            elif self._model.is_plain:
                rows = self._plain_rows(piece, low, stop)
            else:
                rows = self._normalised_rows(piece, low)
            for found_id, span, begins in rows:
                word += begins
                found.add(found_id, span, word)
        return found

    def _plain_rows(self, piece: str, low: int, stop: int) -> list[tuple[int, Span, bool]]:
        ids = self.processor(False).encode(piece)
        shift = stop - len(piece)
        rows: list[tuple[int, Span, bool]] = []
        before: Span | None = None
        for token_id, (first, last) in zip(ids, self._spans(ids, piece), strict=True):
            begins = first == 0 or (piece[first] in SPACES and piece[first - 1] not in SPACES)
            # a virtual "▁" has no character: it is given the one behind it
            span = (max(low, first + shift), max(low + 1, last + shift))
            rows.append((token_id, span, begins and before != (first, last)))
            before = (first, last)
        return rows

    def _normalised_rows(self, piece: str, low: int) -> list[tuple[int, Span, bool]]:
        """sentencepiece knows which bytes of the text each piece of the normalised one comes from."""
        encoded = self.processor(self._dummy(piece, low)).encode(piece, out_type="serialized_proto")
        places: list[int] = []  # byte -> character
        for i, char in enumerate(piece):
            places += [i] * len(char.encode())
        places.append(len(piece))
        rows: list[tuple[int, Span, bool]] = []
        for token_id, token, first, last in pieces_of_text(encoded):
            rows.append((token_id, (low + places[first], low + places[last]), not rows or token.startswith("▁")))
        return rows

    def _spans(self, ids: list[int], text: str) -> Iterator[Span]:
        """The characters of `text` that each id covers; all bytes of a character cover it whole."""
        at = left = 0
        for token_id in ids:
            if self._model.types[token_id] != BYTE:
                at, left = at + len(self._model.pieces[token_id]), 0
                yield at - len(self._model.pieces[token_id]), at
                continue
            if left == 0:
                at, left = at + 1, len(text[at].encode("utf-8"))
            left -= 1
            yield at - 1, at
