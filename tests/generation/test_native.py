"""generate() on the native engine is generate() with torch: the same tokens from the same float32 weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model
from tolerance import FLOAT32

from llama2 import InputError, LlamaForCausalLM, LoraConfig, cpu, lora
from llama2.engine.engine import Engine
from llama2.runners.native import NativeCache, NativeModel, native_runner, native_weights
from llama2.runners.padded import make_runner

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the compiled module is not built")


def both(model: Any, ids: torch.Tensor, **kwargs: Any) -> tuple[list[list[int]], list[list[int]]]:
    return tuple(  # type: ignore[return-value]
        model.generate(ids, runner=runner, max_new_tokens=12, eos_token_id=None, pad_token_id=0, **kwargs).tolist()
        for runner in ("native", "torch")
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_sample": True, "seed": 3, "top_p": 0.9},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "seed": 5},
        {"repetition_penalty": 1.3},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
        {"do_sample": True, "num_return_sequences": 3, "seed": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "changes", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}], ids=str
)
def test_native_equals_torch(changes: dict[str, Any], settings: dict[str, Any]) -> None:
    model = tiny_model(torch.float32, **changes)
    one, other = both(model, tiny_ids(2, 7), **settings)
    assert one == other


def test_left_padding_equals_torch_and_single_rows() -> None:
    model = tiny_model(torch.float32)
    ids, mask = tiny_ids(3, 9), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4], mask[1, :8] = 0, 0
    one, other = both(model, ids, attention_mask=mask, prefill_chunk_size=2)
    assert one == other
    alone, _ = both(model, ids[:1, 4:])
    assert alone[0][5:] == one[0][9:]
    assert (
        both(model, ids, attention_mask=mask, num_beams=2)[0] == both(model, ids, attention_mask=mask, num_beams=2)[1]
    )


@pytest.mark.parametrize("lookup", [True, False])
def test_drafts_on_the_native_engine(lookup: bool) -> None:
    model = tiny_model(torch.float32)
    ids = torch.cat((tiny_ids(1, 6), tiny_ids(1, 6)), 1)
    drafts = {"prompt_lookup_num_tokens": 4} if lookup else {"assistant_model": tiny_model(torch.float32, seed=1)}
    plain, _ = both(model, ids)
    drafted, other = both(model, ids, **drafts)
    assert plain == drafted == other


def test_a_cache_goes_on_where_it_ended() -> None:
    model = tiny_model(torch.float32)
    ids = tiny_ids(1, 8)
    runner = native_runner(model)
    assert runner is not None
    cache = runner.new_cache(None, 1, 64)
    first = model.generate(ids, max_new_tokens=5, eos_token_id=None, past_key_values=cache)
    assert cache.get_seq_length() == 12
    again = model.generate(first, max_new_tokens=4, eos_token_id=None, past_key_values=cache)
    whole = model.generate(ids, max_new_tokens=9, eos_token_id=None, runner="torch")
    assert again.tolist() == whole.tolist()


def test_a_changed_model_runs_changed() -> None:
    """No stale copy: a linear, a norm in place, and a replaced head all show at the next call."""
    model, ids = tiny_model(torch.float32), tiny_ids(1, 5)
    before, _ = both(model, ids)
    seen = [before]
    for change in (
        lambda: model.model.layers[0].mlp.up_proj.weight.data.neg_(),
        lambda: model.model.norm.weight.data.neg_(),
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.flip(0).contiguous())),
    ):
        change()
        one, other = both(model, ids)
        assert one == other
        assert one not in seen
        seen.append(one)


def test_logits_equal_the_module() -> None:
    model, ids = tiny_model(torch.float32), tiny_ids(2, 11)
    runner = native_runner(model)
    assert runner is not None
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, :3] = False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        truth = model(ids, attention_mask=mask, position_ids=positions).logits
    logits = runner.step(ids, positions, mask, runner.new_cache(None, 2, 11), keep=11)
    assert truth[mask].abs().max() > 5
    assert (logits - truth)[mask].abs().max() < FLOAT32 * truth[mask].abs().max()
    assert not logits[~mask].any()


def test_auto_chooses_and_says_why_not() -> None:
    model = tiny_model(torch.float32)
    assert native_weights(model) is native_weights(model)
    assert native_weights(model.train()) is None
    assert native_weights(tiny_model(torch.float64)) is None
    assert native_weights(tiny_model(torch.float32, pretraining_tp=2)) is None
    with pytest.raises(InputError, match=r"torch\.float64.*runner='torch'"):
        tiny_model(torch.float64).generate(tiny_ids(), runner="native")
    with pytest.raises(InputError, match="inputs_embeds"):
        model.eval().generate(inputs_embeds=torch.zeros(1, 2, 64), runner="native")
    gelu = tiny_model(torch.float32, hidden_act="gelu")
    with pytest.warns(UserWarning, match="torch runs this model.*gelu"):
        assert native_weights(gelu) is None
    assert native_weights(gelu) is None  # said once


def test_a_full_cache_is_an_error_that_changes_nothing() -> None:
    model = tiny_model(torch.float32)
    runner = native_runner(model)
    assert runner is not None
    cache = runner.new_cache(None, 1, 4)
    runner.step(tiny_ids(1, 3), torch.arange(3)[None], None, cache)
    with pytest.raises(InputError, match="native cache of 4"):
        runner.step(tiny_ids(1, 2), torch.arange(3, 5)[None], None, cache)
    assert isinstance(cache, NativeCache) and cache.get_seq_length() == 3


def test_a_quantized_cache_is_int8() -> None:
    model, ids = tiny_model(torch.float32), tiny_ids(2, 11)
    runner = native_runner(model)
    assert runner is not None
    plain, small = runner.new_cache(None, 2, 12), runner.new_cache("quantized", 2, 12)
    a, b = (runner.step(ids, torch.arange(11)[None], None, cache) for cache in (plain, small))
    # measured with four seeds: 1.6e-2 to 2.8e-2 (bfloat16: 0.5e-2 to 1.1e-2)
    assert 1e-3 < (a - b).pow(2).mean().sqrt() / a.pow(2).mean().sqrt() < 5e-2
    assert [c._pages.dtype for c in (plain, small)] == ["float32", "int8"]
    asked = native_runner(model, "int8")
    assert asked is not None and torch.equal(
        b, asked.step(ids, torch.arange(11)[None], None, asked.new_cache(None, 2, 12))
    )
    out = model.generate(ids, max_new_tokens=4, eos_token_id=None, cache_implementation="quantized", num_beams=2)
    assert out.shape == (2, 15)
    with pytest.raises(InputError, match="'quantized' keeps int8.*torch runs this model"):
        model.generate(ids, max_new_tokens=4, cache_implementation="quantized", runner="torch")
    with pytest.raises(InputError, match="a cache of int8 is the native engine's.*runner='torch' was asked for"):
        make_runner("torch", model, cache_dtype="int8")


def test_a_gguf_file_answers_packed(smollm2: Path) -> None:
    model = NativeModel.from_gguf(smollm2)
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])  # "The capital of France is"
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.tolist()[0][:5] == ids[0].tolist()
    assert model.weights.nbytes < 120e6
    assert 7042 in out.tolist()[0][5:]  # " Paris"
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        model.generate(ids, runner="torch", max_new_tokens=1)


def test_config_is_the_models_own() -> None:
    assert native_weights(tiny_model(torch.float32)).config == tiny_config(dtype=None)  # type: ignore[union-attr]


def test_adapters_of_a_native_model_are_chosen_for_each_call(tmp_path: Path) -> None:
    from checkpoint.adapter_files import tensors_for, write_adapter

    from llama2.checkpoint.merge import merge_into
    from llama2.checkpoint.peft_adapter import read_adapter

    model, parts = tiny_model(torch.float32), ("q_proj", "up_proj", "down_proj")
    native = NativeModel.from_module(model)
    folders = [
        write_adapter(tmp_path / str(i), tensors_for(model.config, parts, seed=i), target_modules=list(parts))
        for i in range(2)
    ]
    native.load_adapter(folders[0], "first")
    native.load_adapter(folders[1], "second")
    ids, mask = tiny_ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    texts = {}
    for name in ("first", "second", None):
        native.set_adapter(name)
        texts[name] = native.generate(ids, **settings).tolist()
    assert texts[None] == model.generate(ids, runner="torch", **settings).tolist()
    assert texts["first"] != texts[None] != texts["second"] != texts["first"]
    for name, folder in zip(("first", "second"), folders, strict=True):
        twin = tiny_model(torch.float32)
        merge_into(twin, read_adapter(folder, twin.config))
        assert texts[name] == twin.generate(ids, runner="torch", **settings).tolist()
    with pytest.raises(InputError, match="no adapter 'third'; there are: 'first', 'second'"):
        native.set_adapter("third")


def test_a_models_own_adapters_run_on_the_engine() -> None:
    """The active ones, several at once too, as they are at each call; DoRA is torch's."""
    model = tiny_model(torch.float32)
    plain = model.generate(tiny_ids(2, 7), runner="torch", max_new_tokens=10, eos_token_id=None).tolist()
    for name in ("one", "two"):
        lora.add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "up_proj"]), name)

    def agree() -> list[list[int]]:
        settings: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None}
        found: list[list[int]] = model.generate(tiny_ids(2, 7), runner="native", **settings).tolist()
        assert found == model.generate(tiny_ids(2, 7), runner="torch", **settings).tolist()
        return found

    texts = []
    for active in (["one"], ["two"], ["one", "two"], []):
        lora.set_adapter(model, *active)
        with torch.no_grad():
            for place, layer in enumerate(lora.layers(model).values()):
                for i, name in enumerate(active):
                    layer.lora_B[name].data.normal_(0, 0.2, generator=torch.Generator().manual_seed(7 * place + i))
        texts.append(agree())
    assert texts[3] == plain and len({str(text) for text in texts}) == 4
    lora.set_adapter(model, "one")
    weights = native_weights(model)
    assert weights is not None and weights.adapters == []  # none to choose by name
    lora.add_adapter(model, LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]), "dora")
    with pytest.warns(UserWarning, match="torch runs this model.*DoRA has no native kernel"):
        model.generate(tiny_ids(), max_new_tokens=2)
    lora.set_adapter(model, "one")
    assert native_weights(model) is not None


def test_precision_is_that_of_the_activations(smollm2: Path) -> None:
    """Logits of packed weights: float32 activations give those of the dequantised model, 8-bit ones come near."""
    packed = NativeModel.from_gguf(smollm2)
    plain = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    places = torch.arange(5)[None]
    with torch.no_grad():
        wanted = plain(ids).logits[:, -1]
    errors = {}
    for precision in ("exact", "fast"):
        runner = make_runner("native", packed, cache_dtype="float32", precision=precision)
        found = runner.step(ids, places, None, runner.new_cache(None, 1, 8))[:, -1]
        errors[precision] = float((found - wanted).norm() / wanted.norm())
    assert errors["exact"] < 1e-4 < errors["fast"] < 0.2
    greedy = plain.generate(ids, max_new_tokens=8, do_sample=False, runner="torch")
    assert torch.equal(packed.generate(ids, max_new_tokens=8, do_sample=False, precision="exact"), greedy)


def test_a_precision_beside_a_ready_runner_is_refused() -> None:
    model = tiny_model(torch.float32)
    with pytest.raises(InputError, match="precision='exact' beside a runner that is made already"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=1, runner=make_runner("torch", model), precision="exact")


@pytest.mark.parametrize("runner", ["auto", "torch"])
def test_an_unknown_precision_is_refused_whatever_runs(runner: str) -> None:
    model = tiny_model(torch.float32)
    with pytest.raises(InputError, match="precision is 'exactly'; it must be one of fast, exact"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=1, runner=runner, precision="exactly")
    with pytest.raises(InputError, match="precision is 'exactly'; it must be one of fast, exact"):
        Engine(model, precision="exactly")
