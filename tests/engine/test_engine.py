"""Engine = generate(): the same tokens for the same seed, however the requests are mixed."""

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import InputError, cpu
from llama2.cpu import PAGE
from llama2.engine.engine import Engine, EngineBusyError, TokenEvent
from llama2.engine.sampler import TokenSampler
from llama2.engine.stop_text import StopText
from llama2.engine.stream import Stream
from llama2.generation.call_settings import settings
from llama2.generation.processors import LogitsProcessorList
from llama2.runners.native import NativeModel

RUNNERS = ["torch", *(["native"] if cpu.available() else [])]
WAYS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
    {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2},
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float32, max_position_embeddings=256)


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def alone(model: Any, prompt: list[int], new: int, seed: int, runner: str, way: dict[str, Any]) -> list[int]:
    given = {"seed": seed} if way.get("do_sample") else {}
    ids = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, eos_token_id=None, pad_token_id=0, runner=runner, **given, **way
    )
    return list(ids[0, len(prompt) :].tolist())


class Words:
    """A tokenizer of fixed words, as far as the engine needs one."""

    def __init__(self, words: dict[int, str]) -> None:
        self.words = words

    def stream_decoder(self, skip_special_tokens: bool = False) -> Any:
        return self

    def put(self, ids: int) -> str:
        return self.words.get(ids, f"<{ids}>")

    def finish(self) -> str:
        return ""


# -- the same tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"budget": 5, "width": 3},
        {"cache_tokens": 7 * PAGE, "budget": 16},
        {"cache_tokens": 7 * PAGE, "prefix_cache": False},
    ],
    ids=["roomy", "chunked", "preempted", "preempted-no-prefix"],
)
def test_engine_equals_generate(model: Any, runner: str, sizes: dict[str, Any]) -> None:
    shared = tiny_ids(1, 40, seed=5)[0].tolist()
    prompts = [[*shared, i + 1] for i in range(4)] + [shared[:5], shared[3:25], [7], [7, 8] * 9]
    rng = random.Random(2)
    cases = [(p, rng.randrange(8, 30), 100 + i, WAYS[i % len(WAYS)]) for i, p in enumerate(prompts)]
    gate = threading.Event()
    with Engine(model, runner=runner, **sizes) as engine:
        engine._put(lambda: gate.wait(30) and None)  # all requests are there before the first step
        streams = [engine.stream(p, max_new_tokens=n, seed=s, eos_token_id=None, **way) for p, n, s, way in cases]
        gate.set()
        found = [[event.token for event in stream if event.token is not None] for stream in streams]
    for tokens, (prompt, new, seed, way) in zip(found, cases, strict=True):
        assert tokens == alone(model, prompt, new, seed, runner, way)
    assert engine.pool.free == engine.pool.count
    assert (engine.preemptions > 0) == ("cache_tokens" in sizes)
    if "prefix_cache" not in sizes and "cache_tokens" not in sizes:
        assert engine.tokens_reused >= 3 * 32


class Periodic:
    """Makes the token after t almost surely t + 1, of five: guesses from earlier text hold, but not always."""

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        out = scores.copy()
        out[0, (ids[0, -1] + 1) % 5] += 14 * scores.std()
        return out


def test_guesses_save_steps_and_change_nothing(model: Any, runner: str) -> None:
    found = []
    for lookup in (0, 3):
        with Engine(model, runner=runner) as engine:
            ask = engine.ask([0, 1, 2, 3, 4, 0, 1], max_new_tokens=60, eos_token_id=None, do_sample=True, seed=1)
            stream = Stream(engine, replace(ask, lookup=lookup, processors=(Periodic(),)))
            tokens = [event.token for event in stream]
        found.append((tokens, engine.steps, engine.tokens_guessed))
    assert found[0][0] == found[1][0] and found[0][1:] == (60, 0)
    assert found[1][1] < 30 and found[1][2] == 60 - found[1][1]


def test_generate_of_the_engine_seeds_rows_as_generate_does(model: Any, runner: str) -> None:
    prompts = tiny_ids(3, 9).tolist()
    with Engine(model, runner=runner) as engine:
        found = engine.generate(prompts, max_new_tokens=6, do_sample=True, seed=4, eos_token_id=None)
    rows = model.generate(
        torch.tensor(prompts),
        max_new_tokens=6,
        do_sample=True,
        seed=4,
        eos_token_id=None,
        pad_token_id=0,
        runner=runner,
    )
    assert [c.tokens for c in found] == rows[:, 9:].tolist()
    assert {c.finish for c in found} == {"length"}


def test_logprobs_are_those_of_the_models_logits(model: Any, runner: str) -> None:
    prompt = tiny_ids(1, 9)
    with Engine(model, runner=runner) as engine:
        events = list(
            engine.stream(prompt[0].tolist(), max_new_tokens=3, logprobs=2, do_sample=True, seed=1, temperature=0.3,
                          eos_token_id=None)
        )  # fmt: skip
    ids = torch.cat((prompt, torch.tensor([[e.token for e in events]])), 1)
    with torch.inference_mode():
        wanted = model(ids).logits[0, 8:-1].log_softmax(-1)
    for event, row in zip(events, wanted, strict=True):
        assert event.token is not None and event.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
        best = row.topk(2)
        assert [i for i, _ in event.top] == best.indices.tolist()
        assert [p for _, p in event.top] == pytest.approx(best.values.tolist(), abs=1e-4)


# -- ends --------------------------------------------------------------------------------------------------------


def test_ends_at_an_end_token(model: Any, runner: str) -> None:
    prompt = tiny_ids(1, 6)[0].tolist()
    tokens = alone(model, prompt, 8, 0, runner, {})
    with Engine(model, runner=runner) as engine:
        (found,) = engine.generate(prompt, max_new_tokens=8, eos_token_id=tokens[3])
    assert found.tokens == tokens[: tokens.index(tokens[3]) + 1] and found.finish == "eos"


@pytest.mark.parametrize(("keep", "text"), [(False, "ab"), (True, "abcd")])
def test_ends_at_a_stop_string(model: Any, keep: bool, text: str) -> None:
    prompt, way = tiny_ids(1, 6)[0].tolist(), {"do_sample": True, "temperature": 9.0}
    tokens = alone(model, prompt, 8, 3, "torch", way)
    words = {tokens[0]: "a", tokens[1]: "bc", tokens[2]: "de"}
    assert len(words) == 3  # else the stop string would come elsewhere
    with Engine(model, Words(words), runner="torch") as engine:
        (found,) = engine.generate(prompt, max_new_tokens=8, stop=["cd", "zz"], keep_stop=keep, seed=3,
                                  eos_token_id=None, **way)  # fmt: skip
    assert (found.text, found.finish, found.tokens) == (text, "stop", tokens[:3])


def test_text_is_held_back_only_while_it_may_be_a_stop_string() -> None:
    words = Words({1: "one ", 2: "two ", 3: "thr", 4: "ee", 5: "x"})
    text = StopText(words, ["three", "tx"])
    assert [text.put(i) for i in (1, 2, 3, 5)] == ["one ", "two ", "", "thrx"]
    assert [text.put(i) for i in (3, 4)] == ["", ""] and text.stopped and text.finish() == ""
    text = StopText(words, ["three"])
    assert text.put(3) == "" and text.finish() == "thr"


def test_a_cancelled_request_gives_its_pages_back(model: Any, runner: str) -> None:
    with Engine(model, runner=runner) as engine:
        for event in engine.stream(tiny_ids(1, 20)[0].tolist(), max_new_tokens=200, eos_token_id=None):
            assert event.token is not None
            break
        engine.generate([1, 2, 3], max_new_tokens=2, eos_token_id=None)
        assert engine.running == engine.waiting == 0 and engine.pool.free == engine.pool.count


def test_closing_finishes_what_was_accepted(model: Any, runner: str) -> None:
    engine, events = Engine(model, runner=runner), []
    ask = engine.ask([1, 2, 3], max_new_tokens=30, eos_token_id=None)
    engine.submit(ask, events.append)
    engine.close()
    assert len(events) == 30 and events[-1].finish == "length"
    with pytest.raises(EngineBusyError, match="closing"):
        engine.submit(ask, events.append)


def test_closing_at_once_cancels(model: Any) -> None:
    engine, events = Engine(model, runner="torch"), []
    engine.submit(engine.ask([1, 2, 3], max_new_tokens=250, eos_token_id=None), events.append)
    engine.close(wait=False)
    assert events[-1].finish == "cancelled" and len(events) < 250


def test_a_full_queue_is_said(model: Any) -> None:
    gate = threading.Event()
    with Engine(model, runner="torch", width=1, waiting=1) as engine:
        ask = engine.ask([1, 2], max_new_tokens=2, eos_token_id=None)
        engine.submit(ask, lambda event: gate.wait(10) and None)
        engine.submit(ask, lambda event: None)
        with pytest.raises(EngineBusyError, match="2 requests are waiting or running"):
            engine.submit(ask, lambda event: None)
        gate.set()


def test_the_failure_of_one_is_not_that_of_others(model: Any) -> None:
    class Poison:
        def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
            return np.full_like(scores, np.nan)

    events: list[TokenEvent] = []
    done = threading.Event()
    with Engine(model, runner="torch") as engine:
        good = engine.ask([1, 2, 3], max_new_tokens=20, eos_token_id=None)
        stream = engine.stream([1, 2, 3], max_new_tokens=20, eos_token_id=None)
        engine.submit(replace(good, processors=(Poison(),)), lambda e: (events.append(e), done.set()))
        assert done.wait(10)
        assert len([e for e in stream if e.token is not None]) == 20
    assert events[-1].finish == "error" and "NaN" in str(events[-1].error)


def test_async_streams(model: Any, runner: str) -> None:
    async def collect(engine: Engine, prompt: list[int], most: int) -> list[int]:
        found = []
        async for event in engine.astream(engine.ask(prompt, max_new_tokens=12, eos_token_id=None)):
            found.append(event.token)
            if len(found) == most:
                break
        return found

    async def main() -> list[list[int]]:
        with Engine(model, runner=runner) as engine:
            found = await asyncio.gather(*(collect(engine, [i, 5, 9], 12 if i % 2 else 3) for i in range(1, 7)))
            while engine.running:
                await asyncio.sleep(0.01)
            return found

    for i, tokens in enumerate(asyncio.run(main()), 1):
        assert tokens == alone(model, [i, 5, 9], 12, 0, runner, {})[: len(tokens)]
        assert len(tokens) == (12 if i % 2 else 3)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(model: Any) -> Iterator[Engine]:
    with Engine(model, runner="torch", cache_tokens=4 * PAGE) as engine:
        yield engine


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ("text", {}, "no tokenizer"),
        ([], {}, "at least one token"),
        ([97], {}, "id 97 but ids run from 0 to 96"),
        ([1] * 70, {}, "the prompt has 70 tokens"),
        ([1], {"max_new_tokens": 500}, "exceed the context of 256"),
        ([1], {"max_new_tokens": 80}, "81 tokens do not fit the cache of 64"),
        ([1], {"num_beams": 2}, "num_beams is 2"),
        ([1], {"stop": "x"}, "stop strings need the tokenizer"),
        ([1], {"logprobs": 98}, "logprobs is 98"),
        ([1], {"temperatur": 1.0}, "did you mean 'temperature'"),
        ([1], {"temperature": float("nan"), "do_sample": True}, "temperature"),
        ([1], {"adapter": "a", "max_new_tokens": 2}, "needs the native engine"),
    ],
)
def test_refused_before_it_is_queued(small: Engine, prompt: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small.generate([prompt] if prompt == [] else prompt, **given)
    assert small.running == small.waiting == 0


def test_a_prompt_is_rated_whatever_is_cached_or_preempted(model: Any, runner: str) -> None:
    prompt = tiny_ids(1, 90)[0].tolist()
    with torch.inference_mode():
        wanted = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with Engine(model, runner=runner, cache_tokens=9 * PAGE, budget=70) as engine:
        engine.generate(prompt, max_new_tokens=1, eos_token_id=None)  # its pages are remembered now
        others = [engine.stream([i, 4], max_new_tokens=40, eos_token_id=None) for i in range(1, 4)]
        ask = replace(engine.ask(prompt, max_new_tokens=3, logprobs=2, eos_token_id=None), rate_prompt=True)
        events = list(Stream(engine, ask))
        for other in others:
            list(other)
    rated = [picked for event in events for picked in event.prompt]
    assert [p.token for p in rated] == prompt[1:] and len([e for e in events if e.token is not None]) == 3
    for i, picked in enumerate(rated):
        assert picked.logprob == pytest.approx(float(wanted[i, prompt[i + 1]]), abs=1e-4)
        assert picked.top[0] == (int(wanted[i].argmax()), pytest.approx(float(wanted[i].max()), abs=1e-4))


def test_what_a_processor_or_a_listener_raises_ends_its_request_only(model: Any) -> None:
    class Broken:
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise IndexError("broken")

    def deaf(event: TokenEvent) -> None:
        raise RuntimeError("deaf")

    events: list[TokenEvent] = []
    with Engine(model, runner="torch") as engine:
        ask = engine.ask([1, 2, 3], max_new_tokens=20, eos_token_id=None)
        engine.submit(replace(ask, processors=(Broken(),)), events.append)
        engine.submit(ask, deaf)
        assert len([e for e in engine.stream([1, 2, 3], max_new_tokens=20, eos_token_id=None) if e.token]) == 20
    assert isinstance(events[-1].error, IndexError) and engine.pool.free == engine.pool.count


def test_a_text_that_goes_on_keeps_its_first_space(model: Any, tokenizer_model: Any) -> None:
    from llama2 import LlamaTokenizer

    tokenizer = LlamaTokenizer(str(tokenizer_model))
    (one,) = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    for continues, text in ((True, " Hello"), (False, "Hello")):
        with Engine(model, tokenizer, runner="torch") as engine:
            ask = engine.ask([1, 2], max_new_tokens=1, eos_token_id=None)
            always = replace(ask, continues=continues)
            engine.tokenizer = _Always(tokenizer, one)
            assert "".join(e.text for e in Stream(engine, always)) == text


class _Always:
    """The tokenizer's decoder, fed with one id whatever the model says."""

    def __init__(self, tokenizer: Any, token: int) -> None:
        self.tokenizer, self.token = tokenizer, token

    def stream_decoder(self, skip_special_tokens: bool = False) -> Any:
        decoder, token = self.tokenizer.stream_decoder(), self.token

        class Decoder:
            def put(self, ids: Any) -> str:
                return str(decoder.put(token if isinstance(ids, int) else ids))

            def finish(self) -> str:
                return str(decoder.finish())

        return Decoder()


def test_sampling_looks_at_few_tokens_only(model: Any) -> None:
    config = settings(model, None, {"do_sample": True, "top_k": 20, "top_p": 0.9})
    choice = TokenSampler(config, [1, 2], 30, seed=3)
    assert (choice._shortlist is not None) == cpu.available() and not choice._before
    long = TokenSampler(config, [1, 2], 30, seed=3)
    long._before, long._filters, long._shortlist = long._filters, LogitsProcessorList(), None
    long._ids = np.zeros((1, 30), np.int64)
    rows = np.random.default_rng(1).standard_normal((28, 97), np.float32) * 3
    assert [choice(row).token for row in rows] == [long(row).token for row in rows]


@pytest.mark.skipif(not cpu.available(), reason="the native module is not built")
def test_a_model_keeps_the_adapter_it_was_loaded_with() -> None:
    """Requests that name none get the model's own, in tokens and scores; and share no cached prefix with the base."""
    model = tiny_model(torch.float32, max_position_embeddings=256)
    held = NativeModel.from_module(model)
    draw, prompt = torch.Generator().manual_seed(3), list(range(1, 60))
    pairs = {
        path: (torch.randn(4, linear.in_features, generator=draw), torch.randn(linear.out_features, 4, generator=draw))
        for path, linear in model.named_modules()
        if path.endswith(("q_proj", "v_proj", "down_proj"))
    }

    def answers(engine: Engine) -> tuple[list[int], list[float]]:
        (made,) = engine.generate([prompt], max_new_tokens=12, do_sample=False, eos_token_id=None)
        scores = Stream(engine, replace(engine.ask(prompt, max_new_tokens=1), score_from=1))
        return made.tokens, [score.logprob for event in scores for score in event.scores]

    with Engine(held) as engine:
        base = answers(engine)
        held.add_adapter("own", {path: (0.3 * a, 0.3 * b, 1.0) for path, (a, b) in pairs.items()})
        adapted = answers(engine)
        wanted = held.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)
        assert adapted[0] == wanted[0, len(prompt) :].tolist() != base[0]
        assert max(abs(a - b) for a, b in zip(adapted[1], base[1], strict=True)) > 0.1
        held.set_adapter(None)
        assert answers(engine) == base


def test_of_several_prompts_none_begins_where_one_is_refused() -> None:
    """Those before the refused one went on for nobody, to the end of the context."""
    model = tiny_model(vocab_size=64, max_position_embeddings=512)
    with Engine(model, runner="torch") as engine:
        with pytest.raises(InputError, match="id 64"):
            engine.generate([[1, 2, 3], [64]], max_new_tokens=400)
        assert engine.waiting + engine.running == 0
        assert len(engine.generate([[1, 2, 3], [4]], max_new_tokens=2)) == 2
