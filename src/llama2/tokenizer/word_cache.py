"""A memory of words: Llama's vocabulary lets a text be cut in front of every run of spaces without changing its ids.

No piece has "▁" behind another character and none holds a newline, so no merge crosses such a cut. Most words of a
text were seen before, and a dict lookup is many times faster than merging characters again.
"""

import re
from collections.abc import Callable, Iterable

from llama2.tokenizer.prefix import SPACES, Prefix

_WORD = re.compile("\n|▁+[^▁\n]*|[^▁\n]+")
_LONGEST = 48  # characters of a word worth keeping
_MOST = 100_000  # words kept, some 20 MB; then the memory starts afresh


def cuts_hold(pieces: Iterable[str]) -> bool:
    """Whether a vocabulary allows the cuts."""
    return not any("\n" in piece or "▁" in piece.lstrip("▁") for piece in pieces)


class WordMemory:
    """Encodes plain text (no added tokens in it) word by word; `encode` is asked for words not seen before."""

    def __init__(self, encode: Callable[[str], list[int]], prefix: Prefix):
        self._encode, self._prefix = encode, prefix
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """The ids of a whole text, its leading "▁" as the prefix behaviour has it."""
        if not text:
            return []
        marked = text.replace(" ", "▁")
        if self._prefix in ("every", "first") or (self._prefix == "metaspace" and not text.startswith(SPACES)):
            marked = "▁" + marked
        out: list[int] = []
        known = self._known
        for word in _WORD.findall(marked):
            found = known.get(word)
            out += self._learn(word) if found is None else found
        return out

    def _learn(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= _LONGEST:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[word] = ids
        return ids
