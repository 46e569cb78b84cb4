"""LoRA in the native step: attached = merged, a mixed batch = alone, no adapter = the base to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu.ggml_blocks import TYPES, random_blocks
from cpu.test_step import SHAPES, close, model, runner

from llama2 import cpu
from llama2.checkpoint.gguf import GgufFile
from llama2.cpu.adapters import PARTS
from llama2.cpu.reference import ReferenceRunner
from llama2.errors import InputError, MismatchError

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native module is not built")

Tensors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]


def adapter(
    module: Any, rank: int, seed: int, dtype: torch.dtype = torch.float32, parts: tuple[str, ...] = tuple(PARTS)
) -> Tensors:
    """Random A and B of every named linear, about as large in effect as the weights themselves."""
    draw = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for name, linear in module.named_modules():
        if name.endswith(parts):
            a = torch.randn(rank, linear.in_features, generator=draw) * 0.2
            b = torch.randn(linear.out_features, rank, generator=draw) * 0.2
            made[name] = (a.to(dtype), b.to(dtype), 1.5 / rank)
    return made


def merged(module: Any, tensors: Tensors) -> Any:
    """A copy of the module with W + scale * B A in float64, rounded once."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name, (a, b, scale) in tensors.items():
            weight = twin.get_submodule(name).weight
            weight.copy_((weight.double() + scale * b.double() @ a.double()).to(weight.dtype))
    return twin


def packed_weights(module: Any) -> cpu.CpuWeights:
    """Random 4- and 8-bit blocks for a model of the module's shapes, packed as from a GGUF file."""
    weights, rng = cpu.CpuWeights(module.config, threads=2), np.random.default_rng(5)

    def packed(linear: Any, kind: str) -> Any:
        rows, cols = linear.weight.shape
        assert cols % TYPES[kind][1] == 0
        return weights.pack(random_blocks(kind, rows, cols, rng), kind, (rows, cols))

    norm = np.ones(module.config.hidden_size, np.float32)
    weights._begin(packed(module.model.embed_tokens, "Q8_0"), packed(module.lm_head, "Q8_0"), norm)
    for layer in module.model.layers:
        linears = {"q": "Q4_0", "k": "Q4_1", "v": "Q8_0", "o": "Q5_1", "gate": "Q4_0", "up": "Q8_0", "down": "Q4_0"}
        found = {part: layer.get_submodule(path) for path, part in PARTS.items()}
        weights._layer(norm, norm, {part: packed(found[part], kind) for part, kind in linears.items()})
    return weights


def batch(run: Any, cache: Any, texts: list[list[int]], names: list[str | None] | None) -> np.ndarray:
    """Logits of the last token of new sequences with these tokens."""
    sequences = [cache.sequence() for _ in texts]
    places = np.concatenate([np.arange(len(t)) for t in texts])
    logits: np.ndarray = run.step(
        np.concatenate(texts), places, cache.view(zip(sequences, map(len, texts))), adapters=names
    )
    for sequence in sequences:
        sequence.free()
    return logits


TEXTS = [[5, 6, 7, 8, 9, 10, 11], [3], list(range(40, 61)), [9, 9, 4]]


@pytest.mark.parametrize("isa", cpu.instruction_sets() if cpu.available() else [])
@pytest.mark.parametrize("shape", SHAPES)
def test_attached_equals_merged(shape: str, isa: str) -> None:
    module = model(shape)
    run, cache = runner(module, isa=isa)
    for rank in (1, 6, 16):
        tensors = adapter(module, rank, seed=rank)
        run.weights.add_adapter("a", tensors)
        want = merged(module, tensors)
        ids = torch.randint(0, 131, (1, 30))
        with torch.no_grad():
            want_logits, base = (m(input_ids=ids).logits[0].double().numpy() for m in (want, module))
        assert np.abs(want_logits - base).max() > 0.05 * np.abs(base).max(), "the adapter must change something"
        sequence = cache.sequence()
        view = cache.view([(sequence, 23)])
        close(run.step(ids[0, :23], np.arange(23), view, np.arange(23), ["a"]), want_logits[:23], 1e-5)
        for t in range(23, 30):
            close(run.feed(sequence, [int(ids[0, t])], adapter="a"), want_logits[t], 1e-5)
        run.weights.remove_adapter("a")
        sequence.free()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mixed_batch_equals_the_reference(threads: int) -> None:
    module = model("gqa")
    run, cache = runner(module, threads=threads)
    reference, twin = ReferenceRunner(module), cpu.PagedCache(run.weights, 512, "float32")
    for name, tensors in {
        "all": adapter(module, 16, 1),
        "attention, odd rank": adapter(module, 5, 2, torch.bfloat16, ("q_proj", "v_proj", "o_proj")),
        "down, half": adapter(module, 8, 3, torch.float16, ("gate_proj", "down_proj")),
    }.items():
        run.weights.add_adapter(name, tensors)
        reference.add_adapter(name, tensors)
    names = ["all", None, "attention, odd rank", "down, half", "all"]
    mine, theirs = [cache.sequence() for _ in names], [twin.sequence() for _ in names]
    rng = np.random.default_rng(3)
    for counts in [(5, 1, 20, 3, 2), (1, 1, 1, 1, 1), (2, 17, 1, 9, 1), (1, 1, 1, 1, 1)]:
        ids = rng.integers(0, 131, sum(counts)).astype(np.int32)
        positions = np.concatenate([np.arange(s.length, s.length + n) for s, n in zip(mine, counts)])
        got = run.step(ids, positions, cache.view(zip(mine, counts)), None, names)
        close(got, reference.step(ids, positions, twin.view(zip(theirs, counts)), None, names), 1e-5)


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("texts", [TEXTS, [[t] for t in (5, 3, 40, 9)]], ids=["prefill", "decode"])
def test_a_row_does_not_depend_on_the_others_adapters(texts: list[list[int]], precision: str) -> None:
    module = model("gqa", torch.bfloat16)
    run, cache = runner(module, precision)
    run.weights.add_adapter("a", adapter(module, 16, 1))
    run.weights.add_adapter("b", adapter(module, 7, 2, torch.bfloat16))
    names = ["a", None, "b", "a"]
    mixed, base = batch(run, cache, texts, names), batch(run, cache, texts, None)
    np.testing.assert_array_equal(base, batch(run, cache, texts, [None] * 4))
    every = {name: batch(run, cache, texts, [name] * 4) for name in ("a", "b")}
    for row, name in enumerate(names):
        np.testing.assert_array_equal(mixed[row], base[row] if name is None else every[name][row])
        assert np.abs(mixed[row] - base[row]).max() > (-1 if name is None else 0.1 * np.abs(base[row]).max())


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("isa", cpu.instruction_sets() if cpu.available() else [])
def test_mixed_batch_of_packed_weights_equals_alone(isa: str, precision: str) -> None:
    module = model("mha")
    weights = packed_weights(module)
    run, cache = cpu.CpuRunner(weights, precision, isa), cpu.PagedCache(weights, 512, "float32")  # type: ignore[arg-type]
    weights.add_adapter("a", adapter(module, 16, 1))
    weights.add_adapter("b", adapter(module, 6, 2, torch.float16))
    names = ["a", None, "b", "a"]
    for texts in (TEXTS, [[t] for t in (5, 3, 40, 9)]):
        mixed = batch(run, cache, texts, names)
        for row, name in enumerate(names):
            alone = batch(run, cache, [texts[row]], [name])[0]
            if precision == "fast":
                np.testing.assert_array_equal(mixed[row], alone)
            else:  # the exact products themselves add in another order for four tokens than for one
                close(mixed[row], alone, 3e-6)


def test_a_real_packed_file_equals_its_merged_weights(smollm2: Path) -> None:
    from llama2.model import LlamaForCausalLM

    weights = cpu.CpuWeights.from_gguf(GgufFile(smollm2), threads=2)
    module = LlamaForCausalLM.from_pretrained(str(smollm2), dtype=torch.float32).eval()
    tensors = {path: (0.2 * a, b, scale) for path, (a, b, scale) in adapter(module, 8, 1).items()}
    weights.add_adapter("a", tensors)
    ids, places = [1, 4093, 198, 1780, 314, 260, 3575], np.arange(7)
    run, cache = cpu.CpuRunner(weights, "exact"), cpu.PagedCache(weights, 64, "float32")
    got = run.step(ids, places, cache.view([(cache.sequence(), 7)]), places, ["a"])
    with torch.no_grad():
        for path, (a, b, scale) in tensors.items():
            module.get_submodule(path).weight.addmm_(b, a, alpha=scale)
        want = module(input_ids=torch.tensor([ids])).logits[0].numpy()
    base = run.step(ids, places, cache.view([(cache.sequence(), 7)]), places)
    close(got, want, 5e-5)
    assert np.abs(got - base).max() > 0.05 * np.abs(want).max()


def test_threads_change_nothing() -> None:
    module, results = model("gqa", torch.bfloat16), []
    for threads in (1, 2, 3):
        run, cache = runner(module, threads=threads)
        run.weights.add_adapter("a", adapter(module, 12, 1))
        results.append(batch(run, cache, [TEXTS[2]], ["a"]))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_more_tokens_than_one_call_takes() -> None:
    module = model("gqa")
    module.config.max_position_embeddings = 2048
    run, _ = runner(module)
    cache = cpu.PagedCache(run.weights, 2048, "float32")
    for i, name in enumerate("ab"):
        run.weights.add_adapter(name, adapter(module, 4, i))
    texts = [[i % 131 for i in range(n)] for n in (300, 10, 400)]
    got = batch(run, cache, texts, ["a", None, "b"])
    for row, name in enumerate(("a", None, "b")):
        close(got[row], batch(run, cache, [texts[row]], [name])[0], 1e-5)


def test_wrong_input_is_refused() -> None:
    module = model("gqa")
    run, cache = runner(module)
    good = adapter(module, 4, 1)
    path = "model.layers.1.mlp.up_proj"
    a, b, scale = good[path]
    add = run.weights.add_adapter
    for bad, error, said in [
        ({}, InputError, "without tensors"),
        ({"lm_head": (a, b, scale)}, InputError, "'lm_head' is no linear"),
        ({"model.layers.2.mlp.up_proj": (a, b, scale)}, MismatchError, "2 layers; it is for another model"),
        ({path: (a[:, :-1], b, scale)}, MismatchError, "4 x 95.*rank x 96 and 172 x rank expected"),
        ({path: (a[:3], b, scale)}, MismatchError, "A is 3 x 96 and B 172 x 4"),
        ({path: (a, b[:-1], scale)}, MismatchError, "B 171 x 4"),
        ({path: (a[:0], b[:, :0], scale)}, MismatchError, "a matrix is needed"),
        ({path: (a[0], b, scale)}, MismatchError, "a matrix is needed"),
        ({path: (a.double(), b, scale)}, InputError, "float64.*convert it first"),
        ({path: (a, b, float("nan"))}, MismatchError, "not a finite number"),
    ]:
        with pytest.raises(error, match=said):
            add("bad", bad)
    assert run.weights.adapters == []
    add("good", good)
    with pytest.raises(InputError, match="'good' already; remove_adapter"):
        add("good", good)
    with pytest.raises(InputError, match="no adapter 'gut'; there are: 'good'"):
        run.feed(cache.sequence(), [1], adapter="gut")
    with pytest.raises(InputError, match="each of the step's 1 sequences"):
        run.step([1], [0], cache.view([(cache.sequence(), 1)]), None, ["good", None])
    other, _ = runner(model("mha"))
    with pytest.raises(InputError, match="adapter was made for another model"):
        other.weights._adapters["good"] = run.weights.adapter("good")
        other.feed(cpu.PagedCache(other.weights, 16).sequence(), [1], adapter="good")
    run.weights.remove_adapter("good")
    with pytest.raises(InputError, match="there are: none"):
        run.weights.remove_adapter("good")
