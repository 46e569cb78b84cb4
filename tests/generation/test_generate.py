"""generate(): arguments, lengths, padding, stopping, and the rungs of the equivalence ladder that it stands on."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from generation.fakes import Pieces, TableModel, chain
from tiny import tiny_ids, tiny_model
from torch import Tensor

from llama2 import GenerationConfig
from llama2.cache import DynamicCache
from llama2.errors import InputError
from llama2.generation.loop import compute_transition_scores, generate, stream

START = torch.tensor([[1]])
PATH = tuple(range(1, 11))


def padded(lengths: tuple[int, ...], width: int = 10) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A left-padded batch, its mask, and its rows alone."""
    ids = tiny_ids(len(lengths), width)
    mask = (torch.arange(width)[None] >= width - torch.tensor(lengths)[:, None]).long()
    rows = [row[width - n :][None] for row, n in zip(ids, lengths, strict=True)]
    return ids * mask, mask, rows


# -- lengths and stopping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "own", "tokens"),
    [
        ({}, {}, 21),  # 20 new ones where nobody says anything
        ({"max_new_tokens": 3}, {}, 4),
        ({"max_length": 3}, {}, 3),
        ({"max_new_tokens": 3}, {"max_length": 40}, 4),
        ({"max_length": 5}, {"max_new_tokens": 9}, 5),  # what the caller says wins
        ({}, {"max_length": 7}, 7),
        ({"generation_config": GenerationConfig(max_new_tokens=2)}, {"max_length": 7}, 3),
        ({"generation_config": GenerationConfig(max_new_tokens=2), "max_new_tokens": 4}, {}, 5),
    ],
)
def test_lengths(settings: dict[str, Any], own: dict[str, Any], tokens: int) -> None:
    assert generate(chain(*PATH, **own), START, **settings).shape == (1, tokens)


def test_default_length_stays_in_the_context() -> None:
    assert generate(chain(*PATH), torch.ones(1, 60, dtype=torch.long)).shape == (1, 64)


def test_ends_and_pads() -> None:
    model = chain(*PATH, eos_token_id=[4, 9], pad_token_id=0)
    rows = torch.tensor([[1], [3], [7]])
    assert generate(model, rows).tolist() == [[1, 2, 3, 4], [3, 4, 0, 0], [7, 8, 9, 0]]
    model.generation_config.pad_token_id = None  # then the first end id fills up
    assert generate(model, rows).tolist() == [[1, 2, 3, 4], [3, 4, 4, 4], [7, 8, 9, 4]]
    assert generate(model, START, eos_token_id=3).tolist() == [[1, 2, 3]]


def test_criteria_and_stop_strings() -> None:
    letters = Pieces(*(bytes([96 + i]) for i in PATH))
    assert generate(chain(*PATH), START, stop_strings="de", tokenizer=letters).tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(InputError, match="tokenizer"):
        generate(chain(*PATH), START, stop_strings="de")
    seen: list[Any] = []

    def at_four(ids: Tensor, scores: Any) -> bool:
        seen.append(scores)
        return int(ids[0, -1]) == 4

    assert generate(chain(*PATH), START, stopping_criteria=[at_four]).tolist() == [[1, 2, 3, 4]]
    assert seen == [None] * 3
    generate(chain(*PATH), START, stopping_criteria=[at_four], output_scores=True, return_dict_in_generate=True)
    assert len(seen[-1]) == 3


def test_max_time_stops_after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("llama2.generation.stopping.time.time", lambda: next(clock))
    assert generate(chain(*PATH), START, max_time=2.5, max_new_tokens=9).tolist() == [[1, 2, 3, 4]]


def test_processors_and_prefixes_act() -> None:
    def never_three(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([3]), -torch.inf)

    assert generate(chain(*PATH), START, max_new_tokens=2, logits_processor=[never_three]).tolist() == [[1, 2, 0]]
    only_seven = generate(chain(*PATH), START, max_new_tokens=2, prefix_allowed_tokens_fn=lambda row, ids: [7])
    assert only_seven.tolist() == [[1, 7, 7]]


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"max_new_token": 3}, "did you mean 'max_new_tokens'"),
        ({"attention_masks": None}, "did you mean 'attention_mask'"),
        ({"zzzzz": 1}, "no setting"),
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": 0.0, "do_sample": True}, "do_sample=False"),
        ({"num_return_sequences": 2}, "do_sample=True"),
        ({"max_length": 1}, "increase max_length"),
        ({"inputs": torch.ones(1, 64, dtype=torch.long)}, "context is 64"),
        ({"inputs": torch.tensor([1])}, "integer ids"),
        ({"inputs": torch.tensor([[1.0]])}, "integer ids"),
        ({"inputs": torch.empty(1, 0, dtype=torch.long)}, "at least one token"),
        ({"inputs": [[1]]}, "return_tensors"),
        ({"inputs": torch.tensor([[12]])}, "id 12 but ids run from 0 to 11"),
        ({"inputs": torch.tensor([[-1]])}, "id -1"),
        ({"inputs": None}, "bos_token_id"),
        ({"input_ids": START}, "give one"),
        ({"attention_mask": torch.ones(1, 3)}, r"\(1, 1\)"),
        ({"position_ids": torch.tensor([[0, 1]])}, "position_ids"),
        ({"runner": "gpu"}, "auto, native, torch"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"seed": 1, "generator": torch.Generator()}, "both given"),
        ({"seed": [1, 2, 3]}, "3 entries"),
        ({"negative_prompt_ids": START}, "guidance_scale"),
        ({"stopping_criteria": [3]}, "not callable"),
        ({"use_cache": False, "past_key_values": DynamicCache()}, "use_cache=True"),
        ({"num_beams": 2, "guidance_scale": 2.0}, "num_beams=1"),
        ({"prefill_chunk_size": 2, "output_attentions": True, "return_dict_in_generate": True}, "whole"),
        ({"suppress_tokens": list(range(12))}, "every token is forbidden"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),  # objects have addresses in their names
)
def test_refused(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        generate(chain(*PATH), **{"inputs": START, **kwargs})


def test_dynamic_rope_has_no_limit() -> None:
    model = chain(*PATH)
    model.config.rope_scaling = {"rope_type": "dynamic"}
    assert generate(model, torch.ones(1, 80, dtype=torch.long), max_new_tokens=2).shape == (1, 82)


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_invalid_logits_are_named(do_sample: bool, value: float) -> None:
    table = torch.zeros(4, 4)
    table[0, 2] = value
    with pytest.raises(InputError, match=r"NaN or inf in row \[1\] at new token 1"):
        generate(TableModel(table), torch.tensor([[1], [0]]), do_sample=do_sample)
    assert generate(
        TableModel(table), torch.tensor([[1], [0]]), max_new_tokens=1, remove_invalid_values=True
    ).shape == (2, 2)


def test_min_new_tokens_counts_beside_min_length() -> None:
    with pytest.warns(UserWarning, match="min_new_tokens counts"):
        out = generate(chain(*PATH, eos_token_id=PATH[2]), START, max_new_tokens=8, min_length=9, min_new_tokens=1)
    assert out.shape[1] < 9


def test_warnings() -> None:
    with pytest.warns(UserWarning, match="temperature has no effect"):
        generate(chain(*PATH), START, temperature=0.5)
    generate(chain(*PATH, temperature=0.5, do_sample=True), START, do_sample=False)  # stored with the model: silent
    with pytest.warns(UserWarning, match="exceed the model's context of 64"):
        generate(chain(*PATH, eos_token_id=4), START, max_new_tokens=64)
    with pytest.warns(UserWarning, match="at most 2"):
        generate(chain(*PATH), START, max_new_tokens=2, min_new_tokens=3)
    with pytest.warns(UserWarning, match="attention_mask"):
        generate(chain(*PATH, eos_token_id=4, pad_token_id=4), torch.tensor([[4, 1], [1, 2]]))


# -- the ladder -------------------------------------------------------------------------------------------------------

RUNGS: dict[str, dict[str, Any]] = {
    "static": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "chunk_1": {"prefill_chunk_size": 1},
    "chunk_4": {"prefill_chunk_size": 4},
    "chunk_99": {"prefill_chunk_size": 99},
}


@pytest.mark.parametrize("left", [False, True], ids=["full", "left_padded"])
@pytest.mark.parametrize("rung", RUNGS)
def test_rung(rung: str, left: bool) -> None:
    model = tiny_model()
    ids, mask, _ = padded((10, 4, 7) if left else (10, 10, 10))
    kwargs: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    want, got = generate(model, ids, **kwargs), generate(model, ids, **kwargs, **RUNGS[rung])
    assert got.sequences.tolist() == want.sequences.tolist()
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 1},
        {"do_sample": True, "seed": [5, 50, 500]},
        {"do_sample": True, "seed": [5, 50, 500], "num_return_sequences": 2, "temperature": 3.0},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "seed": [5, 50, 500], "temperature": 2.0},
    ],
    ids=str,
)
def test_batch_row_is_single_row(settings: dict[str, Any]) -> None:
    model = tiny_model(eos_token_id=[11, 12, 13])
    ids, mask, rows = padded((10, 4, 7))
    together = generate(model, ids, attention_mask=mask, max_new_tokens=12, pad_token_id=0, **settings)
    copies = settings.get("num_return_sequences", 1)
    for i, row in enumerate(rows):
        one = settings | ({"seed": settings["seed"][i]} if "seed" in settings else {})
        alone = generate(model, row, max_new_tokens=12, pad_token_id=0, **one)
        for j in range(copies):
            text = together[i * copies + j, 10:].tolist()
            own = alone[j, row.shape[1] :].tolist()
            assert text[: len(own)] == own
            assert set(text[len(own) :]) <= {0}


def test_pad_ids_imply_the_mask_unless_they_are_ends() -> None:
    model = tiny_model()
    ids, mask, _ = padded((10, 4))
    want = generate(model, ids, attention_mask=mask, max_new_tokens=6)
    assert generate(model, ids, max_new_tokens=6, pad_token_id=0).tolist() == want.tolist()


def test_padding_on_the_right_is_a_warning() -> None:
    """As transformers: the text goes on behind the padding. Rows without it are as alone, on every runner."""
    model, ids = tiny_model(), tiny_ids(2, 6)
    ids[1, 4:] = 0
    outs = []
    for settings in (
        {"attention_mask": (ids != 0).long()},
        {"pad_token_id": 0},
        {"pad_token_id": 0, "runner": "torch"},
    ):
        with pytest.warns(UserWarning, match="right-padding.*padding_side = 'left'"):
            outs.append(generate(model, ids, max_new_tokens=6, **settings))
    assert outs[0].tolist() == outs[1].tolist() == outs[2].tolist()
    assert outs[0][:1].tolist() == generate(model, ids[:1], max_new_tokens=6).tolist()


def test_a_negative_end_is_none() -> None:
    """transformers' way to say "never"; it warns too."""
    for ends in (-1, [-1], torch.tensor([-1])):
        with pytest.warns(UserWarning, match="eos_token_id holds .-1."):
            out = generate(chain(*PATH, eos_token_id=3), START, max_new_tokens=5, eos_token_id=ends)
        assert out.tolist() == [[1, 2, 3, 4, 5, 6]]
    with pytest.warns(UserWarning, match="eos_token_id"):
        assert generate(chain(*PATH), START, max_new_tokens=5, eos_token_id=[3, -1]).tolist() == [[1, 2, 3]]
    with pytest.warns(UserWarning, match="eos_token_id"):
        generate(chain(*PATH), START, max_new_tokens=3, min_new_tokens=2, eos_token_id=-1, num_beams=2)


def test_without_a_length_there_are_twenty_new_tokens_and_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"default max_length \(=21\) leaves 20 new tokens.*set max_new_tokens"):
        assert generate(chain(*PATH), START).shape == (1, 21)
    for settings in ({"max_new_tokens": 2}, {"max_length": 3}, {"generation_config": GenerationConfig(max_length=3)}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(chain(*PATH), START, **settings).shape == (1, 3)


def test_of_two_lengths_the_new_tokens_count() -> None:
    with pytest.warns(UserWarning, match="max_new_tokens and max_length are both given; max_new_tokens counts"):
        assert generate(chain(*PATH), START, max_new_tokens=2, max_length=9).shape == (1, 3)
    model = chain(*PATH, eos_token_id=3)
    with pytest.warns(UserWarning, match="min_new_tokens and min_length are both given; min_new_tokens counts"):
        out = generate(model, START, max_new_tokens=6, min_new_tokens=1, min_length=6)
    assert out.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor])
def test_lengths_of_numpy_and_torch(number: Any) -> None:
    assert generate(chain(*PATH), START, max_new_tokens=number(3), num_beams=number(1)).shape == (1, 4)
    assert generate(chain(*PATH), START, max_length=number(3), min_length=number(0)).shape == (1, 3)
    config = GenerationConfig(max_new_tokens=number(2), eos_token_id=number(9))
    assert generate(chain(*PATH), START, config).shape == (1, 3) and type(config.max_new_tokens) is int


QUIET = {
    "logits_to_keep": None,
    "num_logits_to_keep": None,
    "low_memory": False,
    "trust_remote_code": True,
    "return_legacy_cache": False,
    "custom_generate": None,
    "output_router_logits": False,
    "use_model_defaults": True,
}


@pytest.mark.parametrize("name", QUIET)
def test_keywords_of_transformers_that_ask_for_nothing(name: str) -> None:
    assert generate(chain(*PATH), START, max_new_tokens=2, **{name: QUIET[name]}).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    "name", ["logits_to_keep", "num_logits_to_keep", "low_memory", "compile_config", "disable_compile", "head_mask"]
)
def test_keywords_of_transformers_without_an_effect_warn_once(name: str) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert generate(chain(*PATH), START, max_new_tokens=2, **{name: 1}).tolist() == [[1, 2, 3]]
    assert [str(w.message).startswith(f"{name} has no effect here") for w in said] == [True]


@pytest.mark.parametrize("kind", ["dynamic_full", "sliding_window", "hybrid", "offloaded", "offloaded_static"])
def test_other_names_of_caches(kind: str) -> None:
    model, ids = tiny_model(), tiny_ids(1, 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = generate(model, ids, max_new_tokens=4, cache_implementation=kind)
    assert out.tolist() == generate(model, ids, max_new_tokens=4).tolist()
    assert [("nothing is offloaded" in str(w.message)) for w in said] == [True] * ("offloaded" in kind)


def test_settings_of_transformers_are_obeyed() -> None:
    """An object of another class with a GenerationConfig's methods, as argument and as the model's own."""
    theirs = SimpleNamespace(
        to_dict=lambda: {"transformers_version": "5.23.0", "max_new_tokens": 2, "do_sample": None},
        to_diff_dict=dict,
    )
    assert generate(chain(*PATH), START, generation_config=theirs).tolist() == [[1, 2, 3]]
    model = chain(*PATH)
    model.generation_config = theirs  # type: ignore[assignment]
    assert generate(model, START).tolist() == [[1, 2, 3]]
    with pytest.raises(InputError, match="generation_config is a int"):
        generate(model, START, generation_config=3)


def test_continues_a_cache() -> None:
    model, ids = tiny_model(), tiny_ids(2, 8)
    whole = generate(model, ids, max_new_tokens=10)
    first = generate(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    calls: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    rest = generate(model, first.sequences, past_key_values=first.past_key_values, max_new_tokens=6)
    assert rest.tolist() == whole.tolist()
    assert calls == [1] * 6
    hook.remove()
    legacy = model(ids, use_cache=True).past_key_values.to_legacy_cache()  # holds the prompt whole
    assert generate(model, ids, past_key_values=legacy, max_new_tokens=10).tolist() == whole.tolist()
    with pytest.raises(InputError, match="holds 17"):
        generate(model, ids, past_key_values=first.past_key_values)


def test_embeddings_give_the_new_tokens_only() -> None:
    model = tiny_model()
    ids, mask, _ = padded((10, 4))
    embeds = model.get_input_embeddings()(ids).detach()
    want = generate(model, ids, attention_mask=mask, max_new_tokens=6)
    assert (
        generate(model, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6).tolist() == want[:, 10:].tolist()
    )
    both = generate(model, ids, inputs_embeds=embeds, attention_mask=mask, max_new_tokens=6)
    assert both.tolist() == want.tolist()
    assert generate(model, inputs_embeds=embeds, max_length=16).shape == (2, 6)


def test_no_inputs_start_from_bos() -> None:
    assert generate(tiny_model(), max_new_tokens=3).tolist() == generate(tiny_model(), START, max_new_tokens=3).tolist()


def test_given_positions_are_used() -> None:
    model, ids = tiny_model(), tiny_ids(1, 6)
    gaps = torch.tensor([[0, 1, 2, 20, 21, 22]])
    want = model(ids, position_ids=gaps).logits[:, -1].argmax(-1)
    out = generate(model, ids, position_ids=gaps, max_new_tokens=8)
    assert out[0, 6] == want
    assert out.tolist() != generate(model, ids, max_new_tokens=8).tolist()


# -- sampling and outputs ---------------------------------------------------------------------------------------------


def test_sampling_draws_the_exact_distribution() -> None:
    # temperature 0.5 squares, top-k 3 drops the last, top-p 0.9 the third: .36 .09 -> .8 .2
    table = torch.tensor([0.6, 0.3, 0.07, 0.03]).log().expand(4, 4)
    rows = torch.zeros(4000, 1, dtype=torch.long)
    kwargs: dict[str, Any] = {"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_new_tokens": 1}
    for source in ({"seed": 3}, {"generator": torch.Generator().manual_seed(3)}):
        counts = torch.bincount(generate(TableModel(table), rows, **kwargs, **source)[:, 1], minlength=4)
        assert counts[2:].tolist() == [0, 0]
        assert abs(float(counts[0]) / 4000 - 0.8) < 3.3 * (0.8 * 0.2 / 4000) ** 0.5


def test_int_seed_gives_row_i_the_seed_plus_i() -> None:
    model = TableModel(torch.zeros(50, 50))
    model.config.vocab_size = 50
    together = generate(model, torch.tensor([[1], [2], [3]]), do_sample=True, seed=40)
    assert together[2:].tolist() == generate(model, torch.tensor([[3]]), do_sample=True, seed=42).tolist()
    assert together[0, 1:].tolist() != together[1, 1:].tolist()


def test_returned_sequences_are_interleaved() -> None:
    out = generate(tiny_model(), tiny_ids(2, 4), do_sample=True, num_return_sequences=3, seed=0)
    assert out[:, :4].tolist() == tiny_ids(2, 4).repeat_interleave(3, 0).tolist()


def test_outputs() -> None:
    model = tiny_model()
    out = generate(
        model,
        tiny_ids(2, 5),
        max_new_tokens=3,
        repetition_penalty=2.0,
        output_scores=True,
        output_logits=True,
        output_attentions=True,
        output_hidden_states=True,
        return_dict_in_generate=True,
    )
    assert list(out.keys()) == ["sequences", "scores", "logits", "attentions", "hidden_states", "past_key_values"]
    assert len(out.scores) == len(out.logits) == len(out.attentions) == len(out.hidden_states) == 3
    assert not torch.equal(out.scores[0], out.logits[0])
    assert out.scores[0].dtype == torch.float64
    assert [h.shape[1] for h in (out.hidden_states[0][0], out.hidden_states[1][0])] == [5, 1]
    assert out.attentions[1][0].shape == (2, 4, 1, 6)
    moved = compute_transition_scores(model, out.sequences, out.scores, normalize_logits=True)
    by_hand = torch.stack(
        [s.log_softmax(-1)[[0, 1], t] for s, t in zip(out.scores, out.sequences[:, 5:].T, strict=True)]
    )
    torch.testing.assert_close(moved, by_hand.T)
    low = generate(model.to(torch.bfloat16), START, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    assert low.logits[0].dtype == torch.float32


def test_guidance_equals_two_runs_by_hand() -> None:
    model, ids, other = tiny_model(), tiny_ids(1, 6), tiny_ids(1, 3, seed=9)
    out = generate(model, ids, negative_prompt_ids=other, guidance_scale=1.7, max_new_tokens=5)
    for _ in range(5):
        wanted, away = (model(x).logits[:, -1].log_softmax(-1) for x in (ids, other))
        token = (away + 1.7 * (wanted - away)).argmax(-1, keepdim=True)
        ids, other = torch.cat((ids, token), 1), torch.cat((other, token), 1)
    assert out.tolist() == ids.tolist()


def test_stream_gives_the_events_of_generate() -> None:
    model = chain(*PATH, eos_token_id=4)
    events = list(stream(model, START))
    assert [(int(e.tokens), e.last) for e in events] == [(2, False), (3, False), (4, True)]
    with pytest.raises(InputError, match="num_beams=1"):
        stream(model, START, num_beams=2)


def test_nothing_is_left_behind() -> None:
    model = chain(*PATH)
    config = GenerationConfig(max_new_tokens=3, min_length=2)
    before = config.to_dict(), model.generation_config.to_dict()
    inputs = START.clone()
    generate(model, inputs, config, num_beams=2)
    assert (config.to_dict(), model.generation_config.to_dict()) == before
    assert torch.is_grad_enabled() and inputs.tolist() == [[1]]


def test_embeddings_continue_a_cache() -> None:
    """Prompt and answer as embeddings, with the cache of the first call: the tokens of a run without a break."""
    model, ids = tiny_model(), tiny_ids(2, 6)
    embed = model.get_input_embeddings()
    whole = generate(model, inputs_embeds=embed(ids), max_new_tokens=6)
    first = generate(model, inputs_embeds=embed(ids), max_new_tokens=3, return_dict_in_generate=True)
    longer = torch.cat((embed(ids), embed(first.sequences)), dim=1)
    rest = generate(model, inputs_embeds=longer, past_key_values=first.past_key_values, max_new_tokens=3)
    assert torch.cat((first.sequences, rest), dim=1).tolist() == whole.tolist()
