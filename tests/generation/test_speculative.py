"""Assisted decoding with assistants that are never, always and sometimes right."""

from typing import Any

import pytest
import torch
from generation.fakes import TableModel, chain
from tiny import tiny_ids, tiny_model

from llama2.errors import InputError
from llama2.generation.loop import generate
from llama2.generation.speculative import PromptLookup

START = torch.tensor([[1]])
PATH = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)


@pytest.mark.parametrize(
    ("assistant", "calls"),
    [
        (chain(*PATH), [1, 6, 2]),  # the first token; 5 drafts and one more; the last two
        (chain(10, 9), [1, 6, 6, 6, 5, 4, 3, 2, 1]),  # one token a pass, drafts limited by the room left
        (chain(1, 2, 3, 4, 5, 0), [1, 6, 4, 3, 2, 1]),  # three drafts right, then none
    ],
    ids=["always", "never", "sometimes"],
)
def test_greedy_is_greedy(assistant: TableModel, calls: list[int]) -> None:
    model = chain(*PATH)
    kwargs: dict[str, Any] = {"max_new_tokens": 9, "num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0}
    out = generate(model, START, assistant_model=assistant, **kwargs)
    assert out.tolist() == [list(PATH)] == generate(chain(*PATH), START, max_new_tokens=9).tolist()
    assert model.calls == calls


def test_end_inside_a_draft() -> None:
    model = chain(*PATH, eos_token_id=4)
    assert generate(model, START, assistant_model=chain(*PATH), max_new_tokens=9).tolist() == [[1, 2, 3, 4]]


def test_prompt_lookup_takes_the_latest_longest_match() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 5, 6, 1, 2]])
    lookup = PromptLookup(3, 2)
    assert lookup.propose(ids, 9)[0].tolist() == [5, 6, 1]
    assert lookup.propose(ids, 1)[0].tolist() == [5]
    assert lookup.propose(torch.tensor([[7, 2, 9, 2]]), 9)[0].tolist() == [9, 2]
    assert lookup.propose(torch.tensor([[7, 8]]), 9)[0].tolist() == []
    assert lookup.propose(torch.tensor([[7]]), 9)[0].tolist() == []


@pytest.mark.parametrize("source", ["same", "other", "lookup"])
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"eos_token_id": list(range(3, 20))}], ids=str)
def test_tiny_model_greedy(source: str, settings: dict[str, Any]) -> None:
    model, ids = tiny_model(), tiny_ids(1, 10)
    help_: dict[str, Any] = {
        "same": {"assistant_model": model},
        "other": {
            "assistant_model": tiny_model(seed=4, num_hidden_layers=1),
            "num_assistant_tokens_schedule": "heuristic",
        },
        "lookup": {"prompt_lookup_num_tokens": 3},
    }[source]
    want = generate(model, ids, max_new_tokens=30, output_scores=True, return_dict_in_generate=True, **settings)
    got = generate(model, ids, max_new_tokens=30, output_scores=True, return_dict_in_generate=True, **settings, **help_)
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(want.scores))
    # The cache holds all but the last token, whatever was taken back on the way.
    assert got.past_key_values.get_seq_length() == got.sequences.shape[1] - 1
    torch.testing.assert_close(got.past_key_values[1][0], want.past_key_values[1][0])


@pytest.mark.parametrize(("schedule", "after"), [("heuristic", 7), ("heuristic_transient", 5), ("constant", 5)])
def test_the_number_of_drafts_outlives_a_call_where_the_schedule_says_so(schedule: str, after: int) -> None:
    """transformers: "heuristic" is persistent over calls with the same assistant, "heuristic_transient" is not."""
    model, assistant = tiny_model(), tiny_model()  # the same weights: every draft is right
    assistant.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=0.0
    )
    generate(model, tiny_ids(1, 10), max_new_tokens=5, eos_token_id=None, assistant_model=assistant, runner="torch")
    assert assistant.generation_config.num_assistant_tokens == after


def test_left_padding() -> None:
    model, ids = tiny_model(), tiny_ids(1, 10)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), 1)
    mask = (padded != 0).long()
    out = generate(model, padded, attention_mask=mask, max_new_tokens=12, assistant_model=tiny_model(seed=5))
    assert out[:, 3:].tolist() == generate(model, ids, max_new_tokens=12).tolist()


@pytest.mark.parametrize("source", ["assistant", "lookup"])
def test_sampling_keeps_the_exact_distribution(source: str) -> None:
    # Two tokens after id 1; from any id the next is drawn from p, while the assistant draws from q.
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.tensor([0.1, 0.2, 0.7])
    model, assistant = TableModel(p.log().expand(3, 3)), TableModel(q.log().expand(3, 3))
    kwargs: dict[str, Any] = {"assistant_model": assistant, "assistant_confidence_threshold": 0.0}
    if source == "lookup":
        kwargs = {"prompt_lookup_num_tokens": 2}
    counts = torch.zeros(3, 3)
    prompt, runs = torch.tensor([[1, 2, 0, 1, 2]]), 1000
    generator = torch.Generator().manual_seed(0)
    for _ in range(runs):
        out = generate(model, prompt, do_sample=True, max_new_tokens=3, generator=generator, **kwargs)
        counts[out[0, 6], out[0, 7]] += 1
    expected = torch.outer(p, p) * runs
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # 0.1 % point of 8 degrees of freedom


def test_refusals() -> None:
    model = chain(*PATH)
    for kwargs, says in (
        ({"inputs": torch.tensor([[1], [1]])}, "one row"),
        ({"num_beams": 2}, "num_beams=1"),
        ({"use_cache": False}, "use_cache=True"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 3}, "choose one"),
        ({"assistant_tokenizer": object()}, "tokenizer"),
        ({"assistant_model": chain(1, size=9)}, "vocabulary is 9"),
    ):
        with pytest.raises(InputError, match=says):
            generate(model, **{"inputs": START, "assistant_model": chain(*PATH), **kwargs})  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", ["assistant", "lookup"])
def test_attentions_and_hidden_states_are_those_of_plain_decoding(kind: str) -> None:
    """One entry a token: the prompt's first, then (layers x (1, H, 1, S)) and (layers + 1 x (1, 1, D)) as without."""
    model, ids = tiny_model(), tiny_ids(1, 5).repeat(1, 2)
    drafts: dict[str, Any] = {"assistant": {"assistant_model": tiny_model(seed=1)}, "lookup": {}}[kind]
    if kind == "lookup":
        drafts = {"prompt_lookup_num_tokens": 3}
    kept = ("attentions", "hidden_states", "scores", "logits")
    kwargs = {"max_new_tokens": 6, "return_dict_in_generate": True, **{f"output_{name}": True for name in kept}}
    plain, fast = generate(model, ids, **kwargs), generate(model, ids, **kwargs, **drafts)
    assert plain.sequences.tolist() == fast.sequences.tolist()
    for name in ("attentions", "hidden_states"):
        for want, got in zip(plain[name], fast[name], strict=True):
            for a, b in zip(want, got, strict=True):
                assert a.shape == b.shape and torch.allclose(a, b, atol=1e-10)


def test_static_caches_show_their_layers() -> None:
    out = generate(
        tiny_model(), tiny_ids(2, 4), max_new_tokens=3, cache_implementation="static", return_dict_in_generate=True
    )
    assert out.past_key_values.layers[0].keys.shape == (2, 2, 6, 16) and len(out.past_key_values.layers) == 2
