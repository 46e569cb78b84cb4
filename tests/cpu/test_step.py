"""A native step against the torch module and the reference step, on tiny models of awkward shapes."""

from __future__ import annotations

import re
import threading
import time
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny import tiny_model

from llama2 import cpu
from llama2.config import LlamaConfig
from llama2.cpu.reference import ReferenceRunner
from llama2.errors import InputError, MismatchError

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native module is not built")

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96},
    "gqa": {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 172},
    "mqa, biases": {
        "hidden_size": 60,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "intermediate_size": 50,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "wide heads, tied": {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "intermediate_size": 64,
        "tie_word_embeddings": True,
    },
}


def model(shape: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    from llama2.model import LlamaForCausalLM

    config = LlamaConfig(vocab_size=131, num_hidden_layers=2, max_position_embeddings=128, **SHAPES[shape], **more)
    torch.manual_seed(7)
    made = LlamaForCausalLM(config)
    for p in made.parameters():  # spiky weights and norms away from 1, so that a wrong norm or head shows
        torch.nn.init.normal_(p, mean=0.5 if p.ndim == 1 else 0.0, std=0.15)
    return made.to(dtype).eval()


def runner(module: Any, precision: str = "exact", isa: str = "auto", threads: int = 2) -> tuple[Any, Any]:
    weights = cpu.CpuWeights.from_module(module, threads=threads)
    return cpu.CpuRunner(weights, precision, isa), cpu.PagedCache(weights, 512, "float32")  # type: ignore[arg-type]


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    assert np.abs(want).max() > 0.3, "the reference must say something"
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("isa", cpu.instruction_sets() if cpu.available() else [])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill_and_decode_equal_the_module(shape: str, isa: str) -> None:
    module = model(shape)
    run, cache = runner(module, isa=isa)
    ids = torch.randint(0, 131, (1, 60))
    with torch.no_grad():
        want = module(input_ids=ids).logits[0].double().numpy()
    sequence = cache.sequence()
    view = cache.view([(sequence, 37)])
    close(run.step(ids[0, :37], np.arange(37), view, np.arange(37)), want[:37], 1e-5)
    for t in range(37, 60):
        close(run.feed(sequence, [int(ids[0, t])]), want[t], 1e-5)


def test_packed_batch_equals_the_reference() -> None:
    module = model("gqa")
    run, cache = runner(module)
    reference, twin = ReferenceRunner(module), cpu.PagedCache(run.weights, 512, "float32")
    mine, theirs = [cache.sequence() for _ in range(4)], [twin.sequence() for _ in range(4)]
    rng = np.random.default_rng(3)
    for counts in [(5, 1, 20, 3), (1, 1, 1, 1), (2, 17, 1, 9), (1, 1, 1, 1)]:
        ids = rng.integers(0, 131, sum(counts)).astype(np.int32)
        positions = np.concatenate([np.arange(s.length, s.length + n) for s, n in zip(mine, counts)])
        rows = np.array([0, sum(counts) - 1])
        got = run.step(ids, positions, cache.view(zip(mine, counts)), rows)
        close(got, reference.step(ids, positions, twin.view(zip(theirs, counts)), rows), 1e-5)


def test_positions_are_the_callers() -> None:
    module = model("mha")
    run, cache = runner(module)
    ids = torch.randint(0, 131, (1, 9))
    places = torch.tensor([[0, 3, 4, 9, 10, 11, 30, 31, 90]])
    with torch.no_grad():
        want = module(input_ids=ids, position_ids=places).logits[0].numpy()
    got = run.step(ids[0], places[0], cache.view([(cache.sequence(), 9)]), np.arange(9))
    close(got, want, 1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda s: s["rope_type"],
)
def test_rope_variants(settings: dict[str, Any]) -> None:
    module = model("gqa", rope_scaling=settings)
    run, cache = runner(module)
    ids = torch.randint(0, 131, (1, 150))
    with torch.no_grad():
        want = module(input_ids=ids).logits[0].numpy()
    got = run.step(ids[0], np.arange(150), cache.view([(cache.sequence(), 150)]), np.arange(150))
    close(got, want, 2e-5)


def test_bfloat16_in_place() -> None:
    module = model("gqa", torch.bfloat16)
    ids = torch.randint(0, 131, (1, 30))
    with torch.no_grad():
        want = module.float()(input_ids=ids).logits[0].numpy()
    module.bfloat16()
    for precision, tolerance in [("exact", 1e-5), ("fast", 3e-2)]:
        run, cache = runner(module, precision)
        got = run.step(ids[0], np.arange(30), cache.view([(cache.sequence(), 30)]), np.arange(30))
        close(got, want, tolerance)
    run, cache = runner(module)
    before = run.feed(cache.sequence(), [5, 6])
    with torch.no_grad():
        module.lm_head.weight.mul_(2)
    np.testing.assert_allclose(run.feed(cache.sequence(), [5, 6]), 2 * before, rtol=1e-6)


@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_threads_and_repetition_change_nothing(precision: str) -> None:
    module = model("gqa", torch.bfloat16)
    ids, results = np.arange(40), []
    for threads in (1, 2, 3, 2):
        run, cache = runner(module, precision, threads=threads)
        results.append(run.step(ids, ids, cache.view([(cache.sequence(), 40)]), ids))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)


def test_chunks_pages_and_crops() -> None:
    module = model("gqa")
    run, cache = runner(module)
    whole = run.feed(cache.sequence(), list(range(100)))
    pieces = cache.sequence()
    run.feed(pieces, list(range(50)))
    run.feed(pieces, list(range(60, 90)))
    pieces.crop(50)
    other = pieces.fork()
    run.feed(pieces, [1, 2, 3])
    np.testing.assert_allclose(run.feed(other, list(range(50, 100))), whole, rtol=0, atol=1e-5)
    used = len(pieces.pages) + len(other.pages)
    pieces.free()
    other.free()
    assert used > 0 and len(cache._free) == 32 - 7


def test_more_tokens_than_one_call_takes() -> None:
    module = model("gqa")
    module.config.max_position_embeddings = 2048
    run, cache = runner(module)
    cache = cpu.PagedCache(run.weights, 2048, "float32")
    ids = np.arange(1100) % 131
    a, b = cache.sequence(), cache.sequence()
    rows = np.array([3, 400, 511, 512, 700, 1099])
    places = np.concatenate((np.arange(400), np.arange(700)))
    got = run.step(ids, places, cache.view([(a, 400), (b, 700)]), rows)
    one, two = cache.sequence(), cache.sequence()
    close(got[0], run.feed(one, ids[:4].tolist()), 1e-5)
    close(got[5], [run.feed(two, ids[400 + i : 500 + i].tolist()) for i in range(0, 700, 100)][-1], 1e-5)
    for sequence in (a, b, one, two):
        sequence.free()
    with pytest.raises(InputError, match="ascending"):
        run.step(ids[:600], places[:600], cache.view([(cache.sequence(), 600)]), [5, 1])


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2e-2), ("int8", 6e-2)])
def test_a_rounded_cache_is_close(dtype: Any, error: float) -> None:
    module = model("gqa")
    run, cache = runner(module)
    rounded = cpu.PagedCache(run.weights, 512, dtype)
    ids = list(range(100))
    a, b = run.feed(cache.sequence(), ids), run.feed(rounded.sequence(), ids)
    assert 0 < np.abs(a - b).max() < error * np.abs(a).max()
    twin = rounded.sequence()
    for first in range(0, 100, 25):
        c = run.feed(twin, ids[first : first + 25])
    assert np.abs(b - c).max() < 1e-3 * np.abs(a).max()
    other = twin.fork()  # shares its last page until one of the two writes
    d, e = run.feed(other, [5]), run.feed(twin, [5])
    np.testing.assert_array_equal(d, e)
    assert other.pages[:-1] == twin.pages[:-1] and other.pages[-1] != twin.pages[-1]


def test_wrong_input_is_refused() -> None:
    module = model("mha")
    run, cache = runner(module)
    view = cache.view([(cache.sequence(), 2)])
    with pytest.raises(InputError, match="token id 131 is outside the vocabulary of 131"):
        run.step([1, 131], [0, 1], view)
    with pytest.raises(InputError, match="room for 2 tokens"):
        run.step([1], [0], view)
    with pytest.raises(InputError, match="position -1 is negative"):
        run.step([1, 2], [-1, 0], view)
    with pytest.raises(InputError, match="logits row 2 is outside the step's 2 tokens"):
        run.step([1, 2], [0, 1], view, [2])
    with pytest.raises(InputError, match="more logits rows than tokens"):
        run.step([1, 2], [0, 1], view, [0, 1, 1])
    with pytest.raises(InputError, match="cache of 512 positions is full"):
        cache.view([(cache.sequence(), 600)])
    with pytest.raises(InputError, match="precision is 'sloppy'; it must be one of fast, exact"):
        cpu.CpuRunner(run.weights, "sloppy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="instruction set 'mmx'"):
        cpu.CpuRunner(run.weights, isa="mmx")
    with pytest.raises(InputError, match=r"torch.float64 on cpu.*runner='torch'"):
        cpu.CpuWeights.from_module(model("mha", torch.float64))
    with pytest.raises(InputError, match="float32, bfloat16, int8, not 'int4'"):
        cpu.PagedCache(run.weights, 16, "int4")  # type: ignore[arg-type]
    other = cpu.PagedCache(cpu.CpuWeights.from_module(model("gqa")), 64)
    with pytest.raises(InputError, match="made for another model"):
        run.feed(other.sequence(), [1])
    module.config.hidden_size = 128
    with pytest.raises(MismatchError, match="expected"):
        cpu.CpuWeights.from_module(module)


def test_a_sequence_that_a_step_runs_with_is_refused_to_other_threads() -> None:
    run, cache = runner(model("gqa"))
    sequence, other = cache.sequence(), cache.sequence()
    run.feed(sequence, [1, 2, 3])
    view = cache.view([(sequence, 1), (other, 1)])
    told = "is in a step of another thread; give each thread a sequence of its own"
    with cache.view([(sequence, 1)]).held():  # as a step of another thread holds it
        for use in (lambda: run.feed(sequence, [4]), lambda: run.step([4, 5], [3, 0], view), lambda: sequence.crop(1),
                    sequence.free, lambda: sequence.copy_of(other), lambda: cache.view([(sequence, 1)])):  # fmt: skip
            with pytest.raises(InputError, match=told):
                use()
    assert sequence.length == 3 and other.length == 0
    run.step([4, 5], [3, 0], view)
    assert sequence.length == 4 and other.length == 1


def test_arrays_that_another_thread_changes_during_a_step_end_no_process() -> None:
    """What is checked is a copy: a step gives its logits, or refuses what it copied."""
    run, cache = runner(model("mqa, biases"))
    engine, weights = run._runner, run.weights
    sequence = cache.sequence()
    view = cache.view([(sequence, 40)])
    ids, positions = np.arange(40, dtype=np.int32), np.arange(40, dtype=np.int32)
    starts, past, tables, rows = view.starts.copy(), view.past.copy(), view.tables.copy(), np.array([39], np.int32)
    logits, done = np.empty((1, 131), np.float32), threading.Event()

    def change() -> None:
        while not done.is_set():
            for array in (ids, starts, past, tables, rows):
                array[-1] ^= 0x5000_0000
                time.sleep(0.0002)  # lets the step begin, or go on, with a wrong value
                array[-1] ^= 0x5000_0000

    changing = threading.Thread(target=change)
    changing.start()
    ended = []
    try:
        for _ in range(60):
            try:
                engine.step(weights.model, cache.handle, ids, positions, starts, past, tables, rows, weights.inv_freq,
                            weights.rope_scale, logits, None)  # fmt: skip
                ended.append(bool(np.isfinite(logits).all()))
            except ValueError as error:
                assert re.search("outside|runs from|negative|needs", str(error))
    finally:
        done.set()
        changing.join()
    assert all(ended)


def test_a_model_that_runs_is_not_changed() -> None:
    """This thread wakes during a step of the other, on one processor too."""
    run, cache = runner(model("gqa"), isa="scalar", threads=1)
    weights, sequence, told = run.weights, cache.sequence(), list[str]()
    norm, found = np.ones(96, np.float32), threading.Event()

    def steps() -> None:
        for _ in range(2000):
            if found.is_set():
                return
            run.feed(sequence, [1] * 120)
            sequence.free()

    stepping = threading.Thread(target=steps)
    stepping.start()
    while stepping.is_alive() and not found.is_set():
        time.sleep(0.001)
        try:
            weights.model.add_layer(*[norm] * 9)
        except (ValueError, RuntimeError, TypeError) as error:
            told.append(str(error))
            if "runs in another thread" in told[-1]:
                found.set()
    stepping.join()
    assert any("the model runs in another thread; add layers before" in text for text in told)


@pytest.mark.parametrize("width", [16, 32, 48, 64, 128])
def test_bytes_of_a_value_are_those_of_the_cache(width: int) -> None:
    module = tiny_model(torch.float32, hidden_size=4 * width, num_attention_heads=4, head_dim=width)
    weights = cpu.CpuWeights.from_module(module)
    sizes = {dtype: cpu.PagedCache(weights, 64 * cpu.PAGE, dtype).nbytes for dtype in get_args(cpu.KvDtype)}
    for dtype, size in sizes.items():
        assert size / sizes["float32"] == pytest.approx(cpu.bytes_per_value(dtype, width) / 4)
