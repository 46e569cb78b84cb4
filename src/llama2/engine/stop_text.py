"""A sequence's text as it comes out, up to a stop string. Its pieces joined are the whole text. No torch here."""

from collections.abc import Sequence

from llama2.protocols import TextDecoder


class StopText:
    """Decodes tokens and ends at the first stop string, wherever in a token it begins or ends.

    What may still become a stop string is held back, so nothing of one is ever given out (keep=False); with keep=True
    the text ends behind the stop string. The text of the first `least` tokens is given out as it comes: no stop string
    begins in it.
    """

    def __init__(self, decoder: TextDecoder, stops: Sequence[str] = (), keep: bool = False, least: int = 0) -> None:
        self._decoder, self._stops, self._keep = decoder, tuple(stops), keep
        self._longest = max(map(len, self._stops), default=1)
        self._held = ""
        self._least, self._count = least, 0
        self.stop: str | None = None  # the stop string that has ended the text

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop is not None

    def put(self, token: int) -> str:
        """The text that is certain after this token."""
        self._count += 1
        return self._release(self._decoder.put(token))

    def finish(self) -> str:
        """Returns the text held back, at the end of the sequence."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, piece: str) -> str:
        text = self._held + piece
        if self._count <= self._least:
            return text
        found = [(at, -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, _, self.stop = min(found)
            self._held = ""
            return text[: at + len(self.stop) if self._keep else at]
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stops):
                self._held = text[-size:]
                return text[:-size]
        self._held = ""
        return text
