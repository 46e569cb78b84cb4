"""What generate() returns as a cache is one: it can be looked into, copied, converted, and gone on from."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model
from tolerance import FLOAT32

from llama2 import InputError, cpu
from llama2.cache import Cache, DynamicCache, StaticCache
from llama2.runners.native import NativeModel

RUNNERS = ["torch"] + ["native"] * cpu.available()
DTYPES = [torch.float32, torch.bfloat16]


def left_padded(rows: int = 3, tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tiny_ids(rows, tokens), torch.ones(rows, tokens, dtype=torch.long)
    for row, padding in enumerate((4, 0, 7)):
        mask[row, :padding] = 0
        ids[row, :padding] = 0
    return ids, mask


def turn(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> Any:
    settings = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, **settings}
    return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **settings)


def more(sequences: torch.Tensor, mask: torch.Tensor | None, count: int = 5) -> tuple[torch.Tensor, Any]:
    """The next prompt: what was said, and some tokens of the user."""
    ids = torch.cat((sequences, tiny_ids(len(sequences), count, seed=9)), 1)
    if mask is None:
        return ids, None
    return ids, torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)


def as_it_is(cache: Any, model: Any) -> Any:
    return cache


def looked_into(cache: Any, model: Any) -> Any:
    assert len(cache) == 2 and cache[1][0].shape[2] == cache.get_seq_length()
    return cache


def through_pickle(cache: Any, model: Any) -> Any:
    return pickle.loads(pickle.dumps(cache))


def legacy(cache: Any, model: Any) -> Any:
    return cache.to_legacy_cache()


def through_legacy(cache: Any, model: Any) -> Any:
    return DynamicCache.from_legacy_cache(cache.to_legacy_cache())


def through_copy(cache: Any, model: Any) -> Any:
    copied = copy.deepcopy(cache)
    cache.reset()
    return copied


def cropped(cache: Any, model: Any) -> Any:
    cache.crop(-3)
    return cache


def reordered_twice(cache: Any, model: Any) -> Any:
    rows = torch.arange(cache.rows).flip(0)
    cache.reorder_cache(rows)
    cache.reorder_cache(rows)
    return cache


def repeated_and_selected(cache: Any, model: Any) -> Any:
    rows = cache.rows
    cache.batch_repeat_interleave(2)
    assert cache.rows == 2 * rows
    cache.batch_select_indices(torch.arange(0, 2 * rows, 2))
    return cache


WAYS: list[Callable[[Any, Any], Any]] = [
    as_it_is,
    looked_into,
    through_pickle,
    legacy,
    through_legacy,
    through_copy,
    cropped,
    reordered_twice,
    repeated_and_selected,
]


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("runners", [(a, b) for a in RUNNERS for b in RUNNERS], ids=str)
def test_a_second_turn(runners: tuple[str, str], way: Callable[[Any, Any], Any], padded: bool) -> None:
    model = tiny_model(torch.float32)
    ids, mask = left_padded() if padded else (tiny_ids(2, 8), None)
    first = turn(model, ids, mask, runner=runners[0])
    cache = first.past_key_values
    assert isinstance(cache, Cache) and type(cache) is DynamicCache
    assert cache.get_seq_length() == first.sequences.shape[1] - 1
    ids, mask = more(first.sequences, mask)
    whole = turn(model, ids, mask, runner="torch", use_cache=False).sequences
    # A tuple of another dtype or device would be torch's; these fit the engine as well.
    second = turn(model, ids, mask, runner=runners[1], past_key_values=way(cache, model))
    assert second.sequences.tolist() == whole.tolist()
    third = turn(model, *more(second.sequences, mask), past_key_values=second.past_key_values)
    alone = turn(model, *more(second.sequences, mask), runner="torch", use_cache=False)
    assert third.sequences.tolist() == alone.sequences.tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "seed": 3, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "seed": 4, "num_return_sequences": 2},
        {"repetition_penalty": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_ways_of_decoding(runner: str, settings: dict[str, Any], padded: bool) -> None:
    model = tiny_model(torch.float32)
    prompt, mask = left_padded() if padded else (tiny_ids(2, 8), None)
    first = turn(model, prompt, mask, runner=runner, **settings)
    cache = first.past_key_values
    assert cache.rows == len(first.sequences) and cache.get_seq_length() == first.sequences.shape[1] - 1
    mask = mask if mask is None else mask.repeat_interleave(len(first.sequences) // len(prompt), 0)
    ids, mask = more(first.sequences, mask)
    # The cache's rows are one for each sequence; the second turn may ask for several of each again.
    second = turn(model, ids, mask, runner=runner, past_key_values=cache, **settings)
    whole = turn(model, ids, mask, runner="torch", **settings)
    assert second.sequences.tolist() == whole.sequences.tolist()
    assert second.past_key_values.rows == len(second.sequences)


@pytest.mark.parametrize("runner", RUNNERS)
def test_drafts(runner: str) -> None:
    model = tiny_model(torch.float32)
    for drafts in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": tiny_model(torch.float32, seed=1)}):
        first = turn(model, tiny_ids(1, 8), runner=runner, **drafts)
        assert len(first.past_key_values.to_legacy_cache()) == 2
        ids, _ = more(first.sequences, None)
        second = turn(model, ids, runner=runner, past_key_values=first.past_key_values, **drafts)
        assert second.sequences.tolist() == turn(model, ids, runner="torch").sequences.tolist()


@pytest.mark.parametrize("runner", RUNNERS)
def test_rows_that_ended_earlier(runner: str) -> None:
    """Padding behind the end of a row is in the cache; the next prompt's mask says that it is none of the text."""
    model = tiny_model(torch.float32)
    ids = tiny_ids(2, 8)
    said = turn(model, ids, max_new_tokens=8).sequences
    end = int(said[0, 10])
    assert end not in said[1, 8:].tolist()
    first = turn(model, ids, runner=runner, eos_token_id=end, max_new_tokens=8)
    mask = torch.ones_like(first.sequences)
    mask[0, 11:] = 0
    ids, mask = more(first.sequences, mask)
    whole = turn(model, ids, mask, runner="torch", use_cache=False).sequences
    second = turn(model, ids, mask, runner=runner, past_key_values=first.past_key_values)
    assert second.sequences.tolist() == whole.tolist()


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_callers_own_object_grows(runner: str) -> None:
    """Several turns over one DynamicCache, as transformers' guide has them; also after a turn that was broken off."""
    model, cache = tiny_model(torch.float32), DynamicCache()
    ids = tiny_ids(1, 6)
    for _ in range(3):
        out = turn(model, ids, runner=runner, past_key_values=cache)
        assert out.past_key_values is cache and cache.get_seq_length() == out.sequences.shape[1] - 1
        assert out.sequences.tolist() == turn(model, ids, runner="torch", use_cache=False).sequences.tolist()
        ids, _ = more(out.sequences, None)

    def breaks_off(so_far: torch.Tensor, scores: Any) -> bool:
        if so_far.shape[1] > ids.shape[1] + 2:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        turn(model, ids, runner=runner, past_key_values=cache, stopping_criteria=[breaks_off])
    assert cache.get_seq_length() == ids.shape[1] + 2 and len(cache) == 2
    cache.crop(ids.shape[1])
    out = turn(model, ids, runner=runner, past_key_values=cache)
    assert out.sequences.tolist() == turn(model, ids, runner="torch").sequences.tolist()


@pytest.mark.parametrize("runner", RUNNERS)
def test_looking_into_it_during_the_call(runner: str) -> None:
    model, cache, seen = tiny_model(torch.float32), DynamicCache(), []

    def look(ids: torch.Tensor, scores: Any) -> bool:
        seen.append(cache[0][0].shape[2])
        return False

    out = turn(model, tiny_ids(1, 6), runner=runner, past_key_values=cache, stopping_criteria=[look])
    assert seen == list(range(6, 12)) and cache.get_seq_length() == 11
    assert out.sequences.tolist() == turn(model, tiny_ids(1, 6), runner="torch").sequences.tolist()


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_its_content_is_what_torch_computes(dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    ids, mask = left_padded()
    native, own = (turn(model, ids, mask, max_new_tokens=2, runner=r).past_key_values for r in ("native", "torch"))
    assert native.store is not None
    bound = {torch.float32: FLOAT32, torch.bfloat16: 6e-2, torch.float16: 2e-2}[dtype]
    seen = torch.nn.functional.pad(mask, (0, 1), value=1).bool()[:, None, :, None]
    for (keys, values), (their_keys, their_values) in zip(native, own, strict=True):
        assert keys.dtype == dtype and keys.shape == their_keys.shape
        for a, b in ((keys, their_keys), (values, their_values)):
            apart = ((a - b) * seen).abs().max() / b.abs().max()
            assert apart < bound
            assert not (a * ~seen).any()
    assert native.store is None


@pytest.mark.parametrize("runner", RUNNERS)
def test_model_and_generate_pass_it_to_each_other(runner: str) -> None:
    """A prompt computed once by the model, copied for each continuation; and a forward over a cache of generate()."""
    model, ids = tiny_model(torch.float32), tiny_ids(2, 8)
    with torch.no_grad():
        prompt = model(ids, past_key_values=DynamicCache()).past_key_values
        for seed in (3, 4):
            longer = torch.cat((ids, tiny_ids(2, 3, seed)), 1)
            out = turn(model, longer, runner=runner, past_key_values=copy.deepcopy(prompt))
            assert out.sequences.tolist() == turn(model, longer, runner="torch").sequences.tolist()
            new = tiny_ids(2, 2, seed + 10)
            whole = model(torch.cat((out.sequences[:, :-1], new), 1)).logits[:, -2:]
            assert (model(new, past_key_values=out.past_key_values).logits - whole).abs().max() < 1e-4
        assert prompt.get_seq_length() == 8


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
@pytest.mark.parametrize("looks", [False, True])
def test_a_cache_of_int8_goes_on_as_it_is(looks: bool) -> None:
    model = tiny_model(torch.float32)
    first = turn(model, tiny_ids(2, 8), cache_implementation="quantized")
    ids, _ = more(first.sequences, None)
    if looks:
        assert first.past_key_values[0][0].dtype == torch.float32
    second = turn(model, ids, past_key_values=first.past_key_values)
    assert second.sequences.shape == (2, 25)


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
def test_it_costs_nothing_until_it_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama2.runners.native import NativeCache

    model = tiny_model(torch.float32)
    read: list[int] = []
    tensors = NativeCache.tensors
    monkeypatch.setattr(NativeCache, "tensors", lambda self: read.append(1) or tensors(self))
    first = turn(model, tiny_ids(2, 8), runner="native")
    second = turn(model, *more(first.sequences, None), runner="native", past_key_values=first.past_key_values)
    assert not read and second.past_key_values is first.past_key_values
    assert len(list(second.past_key_values)) == 2 and read == [1]


@pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")
def test_a_native_model_returns_one_too() -> None:
    model = tiny_model(torch.float32)
    native = NativeModel.from_module(model)
    first = turn(native, tiny_ids(2, 8))
    assert first.past_key_values[1][1].shape == (2, 2, 13, 16)
    ids, _ = more(first.sequences, None)
    second = turn(native, ids, past_key_values=first.past_key_values)
    assert second.sequences.tolist() == turn(model, ids, runner="torch").sequences.tolist()


def test_what_does_not_fit_is_told() -> None:
    model, ids = tiny_model(torch.float32), tiny_ids(2, 8)
    cache = turn(model, ids).past_key_values
    with pytest.raises(InputError, match="holds 2 rows but the prompt has 3"):
        turn(model, tiny_ids(3, 20), past_key_values=cache)
    with pytest.raises(InputError, match="holds 13 tokens but the prompt has 8"):
        turn(model, ids, past_key_values=cache)
    if cpu.available():
        other = turn(tiny_model(torch.float64), ids, runner="torch").past_key_values
        with pytest.raises(InputError, match="past_key_values of type KVCache"):
            turn(model, tiny_ids(2, 20), past_key_values=other, runner="native")


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True, "seed": 1}], ids=str
)
@pytest.mark.parametrize("runner", RUNNERS)
def test_what_a_mask_hides_can_be_shown_again(runner: str, settings: dict[str, Any], looks: bool) -> None:
    """A turn that hides a part of the text leaves its keys and values in the cache, as transformers does."""
    model = tiny_model(torch.float32)

    def three_turns(runner: str) -> list[Any]:
        made = [turn(model, tiny_ids(2, 12), runner=runner)]
        for hidden in (slice(3, 7), slice(5, 6), slice(0, 0)):
            ids, mask = more(made[-1].sequences, torch.ones_like(made[-1].sequences))
            assert mask is not None
            mask[0, hidden] = 0
            if looks:
                assert made[-1].past_key_values[0][0].shape[2] == made[-1].sequences.shape[1] - 1
            given = settings if hidden == slice(0, 0) else {}
            made.append(turn(model, ids, mask, past_key_values=made[-1].past_key_values, runner=runner, **given))
        return made

    ours, theirs = three_turns(runner), three_turns("torch")
    assert [turn.sequences.tolist() for turn in ours] == [turn.sequences.tolist() for turn in theirs]
    for mine, wanted in zip(ours[-1].past_key_values, theirs[-1].past_key_values, strict=True):
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=FLOAT32)


@pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
def test_hidden_columns_are_cut_and_reordered_with_the_others() -> None:
    model = tiny_model(torch.float32)
    torch_made = turn(model, tiny_ids(2, 12), runner="torch").past_key_values
    expected = [[x.clone() for x in pair] for pair in torch_made]
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[0, 2:5] = mask[1, 14:16] = 0
    ids = torch.cat((turn(model, tiny_ids(2, 12), runner="torch").sequences[:, :17], tiny_ids(2, 1)), 1)
    cache = turn(model, ids, mask, past_key_values=torch_made, max_new_tokens=1, runner="native").past_key_values
    cache.crop(15)
    cache.reorder_cache(torch.tensor([1, 0]))
    for mine, wanted in zip(cache, expected, strict=True):
        for a, b in zip(mine, wanted, strict=True):
            assert torch.equal(a, b[[1, 0], :, :15])


@pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
@pytest.mark.parametrize("again", [True, False])
def test_padding_that_was_never_computed_cannot_be_shown(again: bool) -> None:
    model = tiny_model(torch.float32)
    ids, mask = left_padded()
    first = turn(model, ids, mask, runner="native")
    ids, _ = more(first.sequences, None)
    with pytest.raises(InputError, match="column 0 of row 0 was padding"):
        turn(
            model,
            ids,
            torch.ones_like(ids) if again else None,
            past_key_values=first.past_key_values,
            pad_token_id=None,
        )


def test_splits_and_their_sum() -> None:
    model = tiny_model(torch.float32)
    cache = turn(model, tiny_ids(3, 8)).past_key_values
    parts = cache.batch_split(3, 2)
    assert [part.rows for part in parts] == [2, 1]
    whole = DynamicCache.from_batch_splits(parts)
    assert all(torch.equal(a, b) for x, y in zip(whole, cache, strict=True) for a, b in zip(x, y, strict=True))
    static = StaticCache(model.config, 2, 16)
    assert static.rows == 2 and isinstance(static, Cache)
