"""Text while it is being generated: to the screen, to an iterator in another thread, or to an async iterator.

A streamer gets `put(prompt ids (1, P))`, then `put(ids (1,))` for each step, then `end()`. What it gives out, joined,
is `tokenizer.decode` of the same ids: no space, indentation or byte is lost on the way.
"""

import asyncio
from collections.abc import Iterable
from queue import Empty, Queue
from typing import Any, Protocol, Self

from llama2.errors import InputError
from llama2.protocols import TextDecoder


class StreamingTokenizer(Protocol):
    """The part of a tokenizer that streamers use; `stream_decoder` is taken where there is one."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any: ...


class WindowDecoder:
    """Incremental decoding with nothing but `tokenizer.decode`, for tokenizers of other libraries.

    Decodes a window that starts at ids already given out and ends at the newest, and gives out the difference, unless
    it ends inside a character. The window moves on only behind visible text, for a tokenizer strips a leading space.
    """

    def __init__(self, tokenizer: StreamingTokenizer, **decode_kwargs: Any) -> None:
        self._tokenizer, self._kwargs = tokenizer, decode_kwargs
        self._window: list[int] = []
        self._done = 0  # ids of the window whose text was given out

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, **self._kwargs)
        return text

    def put(self, ids: int | Iterable[int]) -> str:
        """The text that these ids complete."""
        return "".join(self._one(i) for i in ((ids,) if isinstance(ids, int) else ids))

    def _one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._text(self._window)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._text(self._window[: self._done])) :]
        if self._text(self._window[self._done :]).strip():
            self._window = self._window[self._done :]
        self._done = len(self._window)
        return new

    def finish(self) -> str:
        """Returns the text held back."""
        rest = self._text(self._window)[len(self._text(self._window[: self._done])) :]
        self._done = len(self._window)
        return rest


class BaseStreamer:
    """Interface of a streamer of generate()."""

    def put(self, value: Any) -> None:
        """Takes the prompt (1, P) first, then the new ids (1,) of each step."""
        raise NotImplementedError(f"{type(self).__name__} must define put(value)")

    def end(self) -> None:
        """Called once when generation is over, however it ended."""
        raise NotImplementedError(f"{type(self).__name__} must define end()")


class TextStreamer(BaseStreamer):
    """Prints text as soon as it is complete. Batches of one row only.

    `skip_prompt` leaves the prompt out; further keywords (skip_special_tokens=True, ...) go to the decoder.
    """

    def __init__(self, tokenizer: StreamingTokenizer, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer, self.skip_prompt, self.decode_kwargs = tokenizer, skip_prompt, decode_kwargs
        self._restart()

    def _restart(self) -> None:
        self._next_is_prompt = True
        make = getattr(self.tokenizer, "stream_decoder", None)
        self._decoder: TextDecoder = (
            WindowDecoder(self.tokenizer, **self.decode_kwargs) if make is None else make(**self.decode_kwargs)
        )

    def put(self, value: Any) -> None:
        """Decodes what it can and passes it to `on_finalized_text`."""
        if len(value.shape) > 1:
            if value.shape[0] != 1:
                raise InputError(
                    f"{type(self).__name__} got a batch of {value.shape[0]} rows; stream one prompt at a time"
                )
            value = value[0]
        was_prompt, self._next_is_prompt = self._next_is_prompt, False
        if was_prompt and self.skip_prompt:
            return
        text = self._decoder.put(value.tolist())
        if text:
            self.on_finalized_text(text)

    def end(self) -> None:
        """Gives out what was held back and gets ready for the next generation."""
        text = self._decoder.finish()
        self._restart()
        self.on_finalized_text(text, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives each piece of text; the last one, possibly empty, with stream_end=True."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Iterate over it while generate() runs in another thread. Raises queue.Empty after `timeout` seconds."""

    def __init__(
        self,
        tokenizer: StreamingTokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: Queue[str | None] = Queue()
        self.stop_signal = None
        self.timeout = timeout

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Queues the piece, and the end mark behind the last."""
        self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(self.stop_signal, timeout=self.timeout)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is self.stop_signal:
            raise StopIteration
        assert piece is not None
        return piece


class AsyncTextIteratorStreamer(TextStreamer):
    """`async for` over it while generate() runs in another thread. Make it inside the running event loop.

    Raises TimeoutError after `timeout` seconds without text.
    """

    def __init__(
        self,
        tokenizer: StreamingTokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.text_queue: asyncio.Queue[str | None] = asyncio.Queue()
        self.stop_signal = None
        self.timeout = timeout
        self.loop = asyncio.get_running_loop()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hands the piece over to the event loop's thread."""
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, text)
        if stream_end:
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, self.stop_signal)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        async with asyncio.timeout(self.timeout):
            piece = await self.text_queue.get()
        if piece is self.stop_signal:
            raise StopAsyncIteration
        assert piece is not None
        return piece


__all__ = ["AsyncTextIteratorStreamer", "BaseStreamer", "Empty", "TextIteratorStreamer", "TextStreamer"]
