"""Prompts that are scored: equal to the network, sharing their beginning, the same bits in the same company."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import Engine
from llama2.engine.request import EngineRequest, Score, TokenEvent
from llama2.errors import ContextLengthError, InputError
from llama2.generation.config import GenerationConfig

CONFIG = GenerationConfig()


def score(engine: Engine, asks: Sequence[EngineRequest]) -> list[tuple[Score, ...]]:
    found: dict[int, TokenEvent] = {}
    done = threading.Semaphore(0)

    def hear(i: int) -> Any:
        def sink(event: TokenEvent) -> None:
            found[i] = event
            done.release()

        return sink

    engine.submit_together([(ask, hear(i)) for i, ask in enumerate(asks)])
    for _ in asks:
        assert done.acquire(timeout=60)
    assert all(event.finish == "length" and event.error is None for event in found.values()), found
    return [found[i].scores for i in range(len(asks))]


def expected(model: Any, ids: list[int], start: int) -> list[Score]:
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    pairs = [(logs[i - 1], ids[i]) for i in range(start, len(ids))]
    return [Score(float(row[token]), bool(row.argmax() == token)) for row, token in pairs]


@pytest.mark.parametrize("runner", ["native", "torch"])
@pytest.mark.parametrize("budget", [5, 512])
def test_scores_are_the_networks(runner: str, budget: int) -> None:
    model = tiny_model(torch.float32)
    ids = tiny_ids(tokens=60)[0].tolist()
    cases = [(ids[:40], 30), (ids[:40] + ids[50:53], 40), (ids[:2], 1), (ids, 1), ([*ids[:40], 5], 40), (ids[:33], 20)]
    with Engine(model, budget=budget, runner=runner) as engine:
        found = score(engine, [EngineRequest(tokens, CONFIG, score_from=start) for tokens, start in cases])
    for (tokens, start), scores in zip(cases, found, strict=True):
        wanted = expected(model, tokens, start)
        assert [s.first for s in scores] == [s.first for s in wanted]
        assert [s.logprob for s in scores] == pytest.approx([s.logprob for s in wanted], abs=1e-4)


def test_a_prompt_one_longer_than_the_context() -> None:
    model = tiny_model(torch.float32)
    ids = tiny_ids(tokens=65)[0].tolist()
    with Engine(model) as engine:
        (found,) = score(engine, [EngineRequest(ids, CONFIG, score_from=60)])
        assert len(found) == 5
        with pytest.raises(ContextLengthError, match="64 before the last"):
            engine.submit(EngineRequest([*ids, 1], CONFIG, score_from=60), lambda event: None)


def test_endings_are_what_each_would_be_alone() -> None:
    model = tiny_model(torch.float32)
    ids = tiny_ids(tokens=20)[0].tolist()
    with Engine(model) as engine:
        (found,) = score(engine, [EngineRequest([*ids, 5], CONFIG, score_from=18, endings=(6, 7))])
        alone = score(engine, [EngineRequest([*ids, token], CONFIG, score_from=20) for token in (5, 6, 7)])
    assert len(found) == 5
    assert [s.logprob for s in found[2:]] == pytest.approx([s[0].logprob for s in alone], abs=1e-5)


def test_a_common_beginning_is_computed_once() -> None:
    model = tiny_model(torch.float32)
    ids = tiny_ids(tokens=48)[0].tolist()
    with Engine(model) as engine:
        score(engine, [EngineRequest([*ids, token, 9], CONFIG, score_from=48) for token in range(1, 5)])
        assert engine.tokens_reused == 3 * 32  # 47 computed tokens may be shared: two pages of 16


def test_the_same_company_gives_the_same_bits() -> None:
    """Whatever ran before; with another tenant nothing of it is found."""
    model = tiny_model(torch.float32)
    ids = tiny_ids(tokens=60)[0].tolist()

    def asks(tenant: str) -> list[EngineRequest]:
        return [EngineRequest(ids[: 20 + i], CONFIG, score_from=12, tenant=tenant) for i in range(30)]

    with Engine(model) as engine:
        first = score(engine, asks("a"))
        assert score(engine, asks("b")) == first
    with Engine(model) as engine:
        assert score(engine, asks("c")) == first


@pytest.mark.parametrize("start", [0, 20, -1])
def test_places_that_cannot_be_scored(start: int) -> None:
    with Engine(tiny_model(torch.float32)) as engine, pytest.raises(InputError, match="between 1 and 19"):
        engine.submit(EngineRequest(list(range(1, 21)), CONFIG, score_from=start), lambda event: None)


def test_one_refused_and_none_begins() -> None:
    heard: list[TokenEvent] = []
    with Engine(tiny_model(torch.float32)) as engine:
        with pytest.raises(InputError, match="id 97"):
            engine.submit_together(
                [
                    (EngineRequest([1, 2], CONFIG, score_from=1), heard.append),
                    (EngineRequest([97], CONFIG), heard.append),
                ]
            )
        score(engine, [EngineRequest([1, 2, 3], CONFIG, score_from=1)])
        assert not heard and engine.waiting == engine.running == 0
