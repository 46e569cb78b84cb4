"""Bytes that are held for clients: bounded in all, and for each key where several keys hold some."""

from llama2.serve.errors import Refusal

SHARE = 0.5  # of all, for one key


class Budget:
    """Counts bytes. Used in the event loop only."""

    def __init__(self, what: str, most: int) -> None:
        """what: for the message of a refusal."""
        self.what, self.most, self.held = what, most, 0
        self._by_owner: dict[str, int] = {}

    def take(self, owner: str, size: int) -> None:
        """Raises Refusal where there is no room; then nothing is taken."""
        own = self._by_owner.get(owner, 0)
        others = self.held - own
        if self.held + size > self.most or (others and own + size > self.most * SHARE):
            raise Refusal(
                "busy", f"{self.held} bytes of {self.what} are held, of {self.most} at most; try again", retry_after=1
            )
        self.held += size
        self._by_owner[owner] = own + size

    def give_back(self, owner: str, size: int) -> None:
        """Frees what was taken."""
        self.held -= size
        left = self._by_owner.get(owner, 0) - size
        if left:
            self._by_owner[owner] = left
        else:
            self._by_owner.pop(owner, None)
