"""Ids to text: the table of piece bytes, the whole-text decoder and the incremental one, which agree by construction.

SentencePiece's rules: "▁" is a space, one leading space is dropped, byte pieces form UTF-8, each byte that does not
is U+FFFD. Special tokens are printed unless skipped, and a printed one protects the space behind it.
"""

import codecs
from collections.abc import Callable, Iterable

from llama2.errors import TokenizerError

EACH_BYTE = "llama2.each_byte"  # error handler: one U+FFFD for each invalid byte, as SentencePiece
_CLEANUP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_CLEANUP_ALPHABET = frozenset("".join(_CLEANUP))


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _replace_each_byte)


def clean_up_tokenization(text: str) -> str:
    """Drop the spaces in front of English punctuation and contractions, as `transformers` does on request."""
    for pattern in _CLEANUP:
        text = text.replace(pattern, pattern.strip())
    return text


class PieceTable(dict[int, bytes]):
    """id -> the bytes it stands for, each worked out at its first use.

    `strip` drops one leading space of a text, except where it comes from a piece in `raw_bytes`.
    """

    def __init__(self, piece_bytes: Callable[[int], bytes], *, strip: bool, errors: str, raw_bytes: frozenset[int]):
        super().__init__()
        self._piece_bytes = piece_bytes
        self.strip, self.errors, self.raw_bytes = strip, errors, raw_bytes

    def __missing__(self, token_id: int) -> bytes:
        """An id beyond the vocabulary, as a padded embedding has, stands for nothing; a negative one is an error."""
        if token_id < 0:
            raise TokenizerError(
                f"token id {token_id} is negative; labels are decoded after their {token_id} are replaced or left out"
            )
        # Only plain ints become keys: a tensor element or numpy scalar is looked up by value.
        value = self[token_id] = self._piece_bytes(token_id)
        return value

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens included."""
        data = b"".join([self[i] for i in ids])
        if self.strip and data[:1] == b" " and self._space_is_virtual(ids):
            data = data[1:]
        return data.decode("utf-8", self.errors)

    def _space_is_virtual(self, ids: Iterable[int]) -> bool:
        return next(i for i in ids if self[i]) not in self.raw_bytes


class StreamDecoder:
    """Feed ids as they come, get text pieces whose join is `tokenizer.decode` of all of them. Linear time.

    Bytes of an unfinished character are held back until the character is complete or `finish` is called.

        stream = tokenizer.stream_decoder(skip_special_tokens=True)
        for token_id in ids:
            print(stream.put(token_id), end="")
        print(stream.finish())
    """

    def __init__(self, table: PieceTable, skip: frozenset[int] = frozenset(), clean_up: bool = False):
        self._table, self._skip, self._clean_up = table, skip, clean_up
        self._decoder = codecs.getincrementaldecoder("utf-8")(table.errors)
        self._at_start = table.strip
        self._held = ""
        self._finished = False

    def put(self, ids: int | Iterable[int]) -> str:
        """The text that these ids complete; "" while a character is unfinished."""
        if self._finished:
            raise TokenizerError("this stream is finished; make a new one with tokenizer.stream_decoder()")
        data = bytearray()
        for token_id in (ids,) if isinstance(ids, int) else ids:
            if token_id in self._skip:
                continue
            piece = self._table[token_id]
            if self._at_start and piece:
                self._at_start = False
                if piece[:1] == b" " and token_id not in self._table.raw_bytes:
                    piece = piece[1:]
            data += piece
        return self._release(self._decoder.decode(bytes(data)))

    def finish(self) -> str:
        """Returns the text held back. The stream takes no ids afterwards."""
        if self._finished:
            return ""
        self._finished = True
        return self._release(self._decoder.decode(b"", final=True), final=True)

    def _release(self, text: str, final: bool = False) -> str:
        if not self._clean_up:
            return text
        # Every clean-up pattern consists of characters of one small alphabet, and no other character is ever removed:
        # cutting behind such another character cannot cut through a pattern.
        text = self._held + text
        cut = len(text)
        while not final and cut and text[cut - 1] in _CLEANUP_ALPHABET:
            cut -= 1
        self._held = text[cut:]
        return clean_up_tokenization(text[:cut])


def gpt2_byte_alphabet() -> dict[str, int]:
    """character -> byte of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return alphabet
