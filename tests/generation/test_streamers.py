"""What streamers give out, joined, is what decode gives."""

import asyncio
import random
from pathlib import Path
from queue import Empty
from threading import Thread

import pytest
import torch
from generation.fakes import Pieces, chain

from llama2.errors import InputError
from llama2.generation.loop import generate
from llama2.generation.streamers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer, WindowDecoder

CODE = Pieces(b" def", b" f():", b"\n", b"    ", b" ", b"return", b" 1", b"\xe2", b"\x82", b"\xac", b"")


def collect(streamer_ids: list[list[int]], skip_prompt: bool = False) -> list[str]:
    streamer = TextIteratorStreamer(CODE, skip_prompt=skip_prompt)
    for first, ids in enumerate(streamer_ids):
        streamer.put(torch.tensor([ids] if first == 0 else ids))
    streamer.end()
    return list(streamer)


def test_indentation_is_kept() -> None:
    pieces = collect([[1, 2], [3], [4], [6], [7], [3], [5], [6]])
    assert "".join(pieces) == "def f():\n    return 1\n return"
    assert len(pieces) == 9  # one per step and the end


def test_a_character_is_never_split_and_never_lost() -> None:
    assert collect([[1], [8], [9], [10]]) == ["def", "€", ""]
    assert collect([[1], [8], [9]]) == ["def", "\ufffd"]


def test_skip_prompt() -> None:
    assert "".join(collect([[1, 2], [7], [3], [7]], skip_prompt=True)) == "1\n 1"


@pytest.mark.parametrize("seed", range(20))
def test_window_decoder_equals_decode(seed: int) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(1, 12) for _ in range(60)]
    decoder = WindowDecoder(CODE)
    joined = "".join(decoder.put(i) for i in ids) + decoder.finish()
    assert joined.replace("\ufffd", "") == CODE.decode(ids).replace("\ufffd", "")


def test_real_vocabulary(tokenizer_model: Path) -> None:
    tokenizer = pytest.importorskip("llama2.tokenizer").load(tokenizer_model)
    text = "def f(x):\n    if x:\n        return '€ 日本 🙂'\n\n  # done"
    ids = tokenizer(text)["input_ids"]
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    streamer.put(torch.tensor([ids[:3]]))
    for i in ids[3:]:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(streamer) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_text_streamer_prints(capsys: pytest.CaptureFixture[str]) -> None:
    generate(chain(1, 2, 3, 4, 6, eos_token_id=6), torch.tensor([[1]]), streamer=TextStreamer(CODE))
    assert capsys.readouterr().out == "def f():\n    return\n"


def test_only_one_row() -> None:
    with pytest.raises(InputError, match="2 rows"):
        TextStreamer(CODE).put(torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(InputError, match="batch has 2"):
        generate(chain(1, 2), torch.tensor([[1], [1]]), streamer=TextIteratorStreamer(CODE))


def test_iterator_in_a_thread_ends_even_after_an_error() -> None:
    streamer = TextIteratorStreamer(CODE, timeout=20)
    worker = Thread(
        target=generate, args=(chain(1, 2, 3, eos_token_id=3), torch.tensor([[1]])), kwargs={"streamer": streamer}
    )
    worker.start()
    assert "".join(streamer) == "def f():\n"
    worker.join()
    with pytest.raises(InputError):
        generate(chain(1, 2), torch.tensor([[99]]), streamer=streamer)
    assert list(streamer) == [""]
    with pytest.raises(Empty):
        next(TextIteratorStreamer(CODE, timeout=0.01))


def test_async_iterator() -> None:
    async def run() -> str:
        streamer = AsyncTextIteratorStreamer(CODE, timeout=20)
        model = chain(1, 2, 3, eos_token_id=3)
        task = asyncio.create_task(asyncio.to_thread(generate, model, torch.tensor([[1]]), streamer=streamer))
        text = "".join([piece async for piece in streamer])
        await task
        with pytest.raises(TimeoutError):
            await anext(AsyncTextIteratorStreamer(CODE, timeout=0.01))
        return text

    assert asyncio.run(run()) == "def f():\n"
