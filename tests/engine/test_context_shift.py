"""Beyond the context: the text goes on as a full computation of what is kept says, on every runner."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2 import InputError, cpu
from llama2.cpu import PAGE
from llama2.engine.engine import Engine
from llama2.engine.request import ContextShift
from llama2.engine.stream import complete

RUNNERS = ["torch", *(["native"] if cpu.available() else [])]
WINDOW, NEW = 3 * PAGE + 5, 9 * PAGE


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(torch.float32, max_position_embeddings=WINDOW)


@torch.inference_mode()
def recomputed(model: Any, prompt: list[int], new: int, keep: int, window: int) -> list[int]:
    """Greedy decoding without any cache: every token from all that is kept at that time."""
    tokens, found = list(prompt), list[int]()
    while len(found) < new:
        found.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        tokens.append(found[-1])
        if len(tokens) == window:
            tokens = tokens[:keep] + tokens[keep + (window - keep) // 2 :]
    return found


def shifted(engine: Engine, prompt: list[int], new: int, keep: int, window: int = WINDOW, **more: Any) -> Any:
    ask = engine.ask(prompt, max_new_tokens=new, eos_token_id=None, **more)
    return replace(ask, shift=ContextShift(keep, window))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"budget": 5, "width": 2}, {"cache_tokens": 6 * PAGE}, {"prefix_cache": False}, {"guesses": 3}],
    ids=["roomy", "chunked", "preempted", "no-prefix", "lookup"],
)
def test_text_beyond_the_context_is_that_of_a_full_computation(model: Any, runner: str, sizes: dict[str, Any]) -> None:
    cases = [(tiny_ids(1, 6, seed=i)[0].tolist(), keep) for i, keep in enumerate((0, 1, 6, 2 * PAGE))]
    with Engine(model, runner=runner, **{"cache_tokens": 40 * PAGE, **sizes}) as engine:
        found = complete(engine, [shifted(engine, prompt, NEW, keep) for prompt, keep in cases])
    for (prompt, keep), completion in zip(cases, found, strict=True):
        assert completion.tokens == recomputed(model, prompt, NEW, keep, WINDOW)
        assert completion.finish == "length"


def test_a_smaller_window_of_the_request_and_a_text_that_fits(model: Any) -> None:
    prompt = tiny_ids(1, 6)[0].tolist()
    with Engine(model, cache_tokens=40 * PAGE) as engine:
        small, whole = complete(
            engine, [shifted(engine, prompt, 60, 2, window=20), shifted(engine, prompt, WINDOW - 6, 2)]
        )
        plain = engine.generate(prompt, max_new_tokens=WINDOW - 6, eos_token_id=None)[0]
    assert small.tokens == recomputed(model, prompt, 60, 2, 20)
    assert whole.tokens == plain.tokens


def test_an_equal_seed_gives_an_equal_text_beyond_the_context(model: Any) -> None:
    prompt = tiny_ids(1, 6)[0].tolist()
    way: dict[str, Any] = {"do_sample": True, "seed": 3, "repetition_penalty": 1.2}
    with Engine(model, cache_tokens=40 * PAGE) as engine:
        one = complete(engine, [shifted(engine, prompt, NEW, 1, **way)])[0]
        two = complete(engine, [shifted(engine, prompt, NEW, 1, **way), *[shifted(engine, prompt, NEW, 0)] * 3])[0]
    assert one.tokens == two.tokens and len(one.tokens) == NEW


@pytest.mark.parametrize("keep", [-1, WINDOW - 1, WINDOW])
def test_what_is_kept_leaves_room(model: Any, keep: int) -> None:
    with Engine(model, cache_tokens=40 * PAGE) as engine, pytest.raises(InputError, match=f"keep is {keep}"):
        complete(engine, [shifted(engine, tiny_ids(1, 6)[0].tolist(), NEW, keep)])
