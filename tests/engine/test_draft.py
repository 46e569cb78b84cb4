"""A draft model changes how many steps a text takes, and nothing of the text."""

import random
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import InputError, cpu
from llama2.cpu import PAGE
from llama2.engine.engine import Engine
from llama2.engine.stream import Stream
from llama2.generation.seeded import SeededSampler

RUNNERS = ["torch", *(["native"] if cpu.available() else [])]
WAYS: list[dict[str, Any]] = [{}, {"do_sample": True, "top_k": 30, "temperature": 0.7}, {"repetition_penalty": 1.3}]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float32, max_position_embeddings=256)


@pytest.fixture(scope="module")
def near(model: Any) -> Any:
    """A draft whose guesses hold often: the model with noise on its weights."""
    found = tiny_model(torch.float32, max_position_embeddings=256)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.01)
    return found


@pytest.fixture(params=RUNNERS)
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def told(engine: Engine, cases: list[tuple[list[int], int, dict[str, Any]]]) -> list[list[int | None]]:
    streams = [
        engine.stream(p, max_new_tokens=n, eos_token_id=None, **({"seed": i} if "do_sample" in way else {}), **way)
        for i, (p, n, way) in enumerate(cases)
    ]
    return [[event.token for event in stream] for stream in streams]


@pytest.mark.parametrize(
    "sizes",
    [{}, {"budget": 7, "width": 3}, {"cache_tokens": 7 * PAGE, "budget": 16}, {"guesses": 1}],
    ids=["roomy", "chunked", "preempted", "one"],
)
def test_a_draft_changes_no_token(model: Any, near: Any, runner: str, sizes: dict[str, Any]) -> None:
    shared = tiny_ids(1, 40, seed=5)[0].tolist()
    prompts = [[*shared, i + 1] for i in range(3)] + [shared[:5], shared[3:25], [7]]
    rng = random.Random(2)
    cases = [(p, rng.randrange(8, 40), WAYS[i % len(WAYS)]) for i, p in enumerate(prompts)]
    with Engine(model, runner=runner) as engine:
        wanted = told(engine, cases)
    for draft in (near, tiny_model(torch.float32, seed=9, max_position_embeddings=60)):
        with Engine(model, runner=runner, draft=draft, **sizes) as engine:
            assert told(engine, cases) == wanted
        assert engine.pool.free == engine.pool.count
        assert draft is not near or engine.tokens_guessed > 10


@pytest.mark.parametrize("way", [{}, {"do_sample": True, "top_k": 30, "temperature": 0.7}], ids=["greedy", "sampled"])
def test_the_model_as_its_own_draft_is_always_right(model: Any, runner: str, way: dict[str, Any]) -> None:
    prompt = tiny_ids(1, 20)[0].tolist()
    with Engine(model, runner=runner, draft=model, guesses=3) as engine:
        told(engine, [(prompt, 41, way)])
        told(engine, [(prompt, 41, way)])  # the prompt's page is found again, in the draft's cache too
    assert engine.tokens_guessed == 60 and engine.steps == 22  # one token behind the prompt, then four a step
    assert engine.tokens_reused == PAGE


class Periodic:
    """Makes the token after t almost surely t + 1, of five: what is looked up holds, but not always."""

    def __call__(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        out = scores.copy()
        out[0, (ids[0, -1] + 1) % 5] += 14 * scores.std()
        return out


def test_guesses_looked_up_leave_no_hole_in_the_drafts_cache(model: Any) -> None:
    """With the model as its own draft, both caches hold the same, whoever guessed and whatever held."""
    with Engine(model, runner="torch", draft=model, guesses=3) as engine:
        ask = engine.ask([0, 1, 2, 3, 4, 0, 1], max_new_tokens=60, eos_token_id=None, do_sample=True, seed=1, lookup=2)
        events = list(Stream(engine, replace(ask, processors=(Periodic(),))))
        caches = [runner.cache[:, :, :4].flatten(2, 3)[:, :, :60] for runner in (engine.runner, engine.drafter.runner)]
    assert len(events) == 60 and engine.tokens_guessed > 20
    assert torch.allclose(*caches, atol=1e-4) and float(caches[0].abs().sum(dim=(0, 1, 3, 4)).min()) > 0


def test_a_draft_of_another_vocabulary(model: Any) -> None:
    other = tiny_model(torch.float32, vocab_size=98)
    with pytest.raises(InputError, match="vocabulary is 98 but the model's is 97"):
        Engine(model, draft=other)
    with pytest.raises(InputError, match="guesses is 0"):
        Engine(model, draft=model, guesses=0)


def test_many_at_once_are_not_guessed(model: Any) -> None:
    gate = threading.Event()
    with Engine(model, runner="torch", draft=model) as engine:
        engine._put(lambda: gate.wait(30) and None)
        asks = [engine.stream([i], max_new_tokens=6, eos_token_id=None) for i in range(1, 13)]
        gate.set()
        assert [len(list(stream)) for stream in asks] == [6] * 12
    assert engine.tokens_guessed == 0 and engine.steps == 6


def test_peeking_takes_no_number() -> None:
    one, other = (SeededSampler(True, [5]) for _ in range(2))
    seen = [one.peek(i).item() for i in (0, 70, 3, 1)]
    drawn = [other.uniform().item() for _ in range(150)]
    assert seen == [drawn[i] for i in (0, 70, 3, 1)] and [one.uniform().item() for _ in range(150)] == drawn
