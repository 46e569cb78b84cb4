"""The pages of the cache: who holds each, and what a page that nobody holds any more still contains. No torch here.

A full page is remembered under a key that names every token up to its end (a keyed hash chain) and the tenant it was
computed for; a later sequence with the same beginning takes it instead of computing it. Pages that nobody holds stay
remembered until their room is needed, least recently used first.
"""

import hashlib
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from llama2.errors import InputError


class BlockPool:
    """`count` pages of `size` positions."""

    def __init__(self, count: int, size: int, remember: bool = True) -> None:
        """remember: whether pages are found again by their content (prefix caching)."""
        if count < 1 or size < 1:
            raise InputError(f"a pool of {count} pages of {size} positions holds nothing; give at least 1 of each")
        self.count, self.size, self.remembers = count, size, remember
        self._owners = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))  # next to be taken first
        self._content: dict[int, tuple[bytes, tuple[int, ...]]] = {}  # page -> its key and tokens
        self._by_key: dict[bytes, int] = {}
        self._secret = secrets.token_bytes(32)  # nobody outside can compute a key, so none can be made to collide

    @property
    def free(self) -> int:
        """Pages that can be taken, remembered ones among them."""
        return len(self._free)

    def owners(self, page: int) -> int:
        """How many sequences hold a page."""
        return self._owners[page]

    # -- taking and giving ---------------------------------------------------------------------------------------

    def take(self) -> int:
        """A page with one owner, its content forgotten. Raises InputError where none is free: ask `free` before."""
        if not self._free:
            raise InputError(f"all {self.count} pages are held; give some back first")
        page, _ = self._free.popitem(last=False)
        self._forget(page)
        self._owners[page] = 1
        return page

    def share(self, page: int) -> None:
        """One owner more for a page that `find` gave."""
        if not self._owners[page]:
            del self._free[page]
        self._owners[page] += 1

    def give_back(self, pages: Sequence[int]) -> None:
        """One owner less for each page of a sequence, in its order: the end of a text is forgotten before its start."""
        for page in reversed(pages):
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free[page] = None
                if page not in self._content:
                    self._free.move_to_end(page, last=False)

    # -- remembering ---------------------------------------------------------------------------------------------

    def keys(self, tokens: Sequence[int], salt: bytes, known: Sequence[bytes] = ()) -> list[bytes]:
        """The keys of all full pages of `tokens`; `known` are those of the first pages, from an earlier call."""
        found = list(known)
        for start in range(len(found) * self.size, len(tokens) - self.size + 1, self.size):
            parent = found[-1] if found else b"\0" + salt
            page = array("q", tokens[start : start + self.size]).tobytes()
            found.append(hashlib.blake2b(parent + page, key=self._secret, digest_size=32).digest())
        return found

    def find(self, key: bytes, tokens: Iterable[int]) -> int | None:
        """The page remembered under `key`, whose tokens are compared too; `share` it to keep it."""
        page = self._by_key.get(key)
        return page if page is not None and self._content[page][1] == tuple(tokens) else None

    def remember(self, page: int, key: bytes, tokens: Iterable[int]) -> None:
        """Makes a full page findable; the first page with a key stays the one that is found."""
        if self.remembers and key not in self._by_key and page not in self._content:
            self._content[page], self._by_key[key] = (key, tuple(tokens)), page

    def _forget(self, page: int) -> None:
        if page in self._content:
            del self._by_key[self._content.pop(page)[0]]

    def clear(self) -> None:
        """Forgets the content of every page, for instance after the weights have changed."""
        self._content.clear()
        self._by_key.clear()
