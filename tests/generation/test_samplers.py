"""llama.cpp's samplers, each beside a plain loop of its definition."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llama2.errors import InputError
from llama2.generation.samplers import (
    BREAKERS,
    ORDER,
    DryPenalty,
    DynamicTemperature,
    LastTokensPenalty,
    Mirostat,
    SamplerSettings,
    TopNSigma,
    Xtc,
    chain,
    ordered,
)

SEEDS = range(12)
VOCABULARY = 40
NO_TEXT: Callable[[int], bytes] = lambda token: b""  # noqa: E731


def logits(seed: int, spread: float = 3.0) -> np.ndarray:
    """Scores (1, V) float64, some of them forbidden."""
    random = np.random.default_rng(seed)
    found = random.normal(size=(1, VOCABULARY)) * spread
    found[0, random.integers(0, VOCABULARY, 5)] = -math.inf
    return found


def shares(scores: np.ndarray) -> list[float]:
    exps = [math.exp(x - max(scores[0])) for x in scores[0]]
    return [e / sum(exps) for e in exps]


def left(scores: np.ndarray) -> set[int]:
    return {i for i, x in enumerate(scores[0]) if x > -math.inf}


def dry_by_the_definition(ids: list[int], texts: list[bytes], s: SamplerSettings) -> dict[int, float]:
    """What each token loses, every length tried from the longest down."""
    ids = ids if s.dry_penalty_last_n < 0 else ids[-s.dry_penalty_last_n :]
    whole, ends = b"", []
    for token in ids:
        whole += texts[token]
        ends.append(len(whole))
    limit = len(ids) - 1
    for breaker in s.dry_sequence_breakers:
        at = whole.rfind(breaker.encode())
        if at >= 0:
            last = next(i for i, end in enumerate(ends) if end >= at + len(breaker.encode()))
            limit = min(limit, len(ids) - 1 - last)
    found: dict[int, float] = {}
    for i in range(len(ids) - 1):
        length = 0
        while length <= i and length < limit and ids[i - length] == ids[len(ids) - 1 - length]:
            length += 1
        if length >= max(s.dry_allowed_length, 1):
            loss = s.dry_multiplier * s.dry_base ** (length - s.dry_allowed_length)
            found[ids[i + 1]] = max(found.get(ids[i + 1], 0.0), loss)
    return found


@pytest.mark.parametrize("seed", range(40))
def test_dry(seed: int) -> None:
    random = np.random.default_rng(seed)
    texts = [b"ab", b"c", b"\n", b"d:", b"#", b"#x", b" "]
    ids = random.integers(0, 3 if seed % 2 else len(texts), 60).tolist()
    given: dict[str, Any] = {
        "dry_multiplier": 0.8,
        "dry_base": float(random.choice([1.0, 1.75, 3.0])),
        "dry_allowed_length": int(random.integers(0, 4)),
        "dry_penalty_last_n": int(random.choice([-1, 20, 2])),
        "dry_sequence_breakers": [(), BREAKERS, ("##",), ("b\n", "c")][seed % 4],
    }
    settings = SamplerSettings(**given)
    processor = DryPenalty(settings, lambda token: texts[token])
    scores = random.normal(size=(1, VOCABULARY))
    penalised = 0
    for size in range(1, len(ids) + 1):  # as a sequence grows
        found = scores - processor(np.array([ids[:size]]), scores)
        expected = np.zeros_like(scores)
        window = ids[:size]
        for token, loss in dry_by_the_definition(window, texts, settings).items():
            expected[0, token] = loss
        assert found == pytest.approx(expected, abs=1e-9), (size, window)
        penalised += bool(expected.any())
    assert penalised or given["dry_penalty_last_n"] == 2 or given["dry_sequence_breakers"] == ("b\n", "c")


def test_a_breaker_over_two_tokens_ends_a_repetition() -> None:
    texts = [b"a", b"b", b"x#", b"#y"]
    settings = SamplerSettings(dry_multiplier=1.0, dry_allowed_length=1, dry_sequence_breakers=("##",))
    scores = np.zeros((1, 4))
    free = DryPenalty(settings, lambda token: texts[token])(np.array([[0, 1, 2, 3, 0]]), scores)
    assert free.min() == pytest.approx(-1.0) and free.argmin() == 1  # "a" was there, "b" came behind it
    held = DryPenalty(settings, lambda token: texts[token])(np.array([[0, 1, 0, 2, 3]]), scores)
    assert held.min() == 0


def test_a_long_repetition_stays_finite() -> None:
    settings = SamplerSettings(dry_multiplier=5.0, dry_base=10.0, dry_sequence_breakers=())
    found = DryPenalty(settings, NO_TEXT)(np.zeros((1, 4000), np.int64), np.zeros((1, 3), np.float32))
    assert np.isfinite(found).all() and found[0, 0] < -9e29 and found[0, 1] == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_top_n_sigma(seed: int) -> None:
    scores = logits(seed)
    kept = [x for x in scores[0] if x > -math.inf]
    mean = sum(kept) / len(kept)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in kept) / len(kept))
    found = TopNSigma(1.3)(np.zeros((1, 1), np.int64), scores)
    assert left(found) == {i for i, x in enumerate(scores[0]) if x >= max(kept) - 1.3 * sigma} and len(left(found)) > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_xtc(seed: int) -> None:
    scores, ids = logits(seed), np.zeros((1, 1), np.int64)
    p = shares(scores)
    above = sorted((i for i in left(scores) if p[i] >= 0.05), key=lambda i: -p[i])
    found = Xtc(1.0, 0.05, 0, seed)(ids, scores)
    assert left(found) == left(scores) - set(above[:-1])
    assert left(Xtc(1.0, 0.05, VOCABULARY, seed)(ids, scores)) == left(scores)  # too few would be left
    sampler = Xtc(0.5, 0.05, 0, seed)
    times = sum(left(sampler(ids, scores)) != left(scores) for _ in range(400))
    assert (150 < times < 250) == (len(above) > 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_dynamic_temperature(seed: int) -> None:
    scores = logits(seed)
    p = [x for x in shares(scores) if x > 0]
    entropy = -sum(x * math.log(x) for x in p) / math.log(len(p))
    found = DynamicTemperature(1.0, 0.5, 2.0)(np.zeros((1, 1), np.int64), scores)
    finite = scores > -math.inf
    assert found[finite] == pytest.approx(scores[finite] / (0.5 + 1.0 * entropy**2))


def mirostat_by_the_definition(version: int, scores: np.ndarray, mu: float) -> list[int]:
    p = shares(scores)
    order = sorted((i for i in range(len(p)) if p[i] > 0), key=lambda i: -p[i])
    if version == 2:
        kept = [i for i in order if -math.log2(p[i]) <= mu]
        return kept or order[:1]
    products = squares = 0.0
    for i in range(min(100, len(order)) - 1):
        t, b = math.log((i + 2) / (i + 1)), math.log(p[order[i]] / p[order[i + 1]])
        products, squares = products + t * b, squares + t * t
    s = products / squares
    epsilon = s - 1
    k = (epsilon * 2**mu / (1 - len(p) ** -epsilon)) ** (1 / s)
    return order[: max(int(k), 1)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
def test_mirostat(version: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    sampler, mu, ids = Mirostat(version, 2.0, 0.3), 4.0, [0]
    sizes = set()
    for step in range(30):
        scores = logits(100 * seed + step, 2.0)
        kept = mirostat_by_the_definition(version, scores, mu)
        found = sampler(np.array([ids]), scores)
        assert left(found) == set(kept), step
        p = shares(found)
        ids.append(int(random.choice(VOCABULARY, p=p)))
        mu -= 0.3 * (-math.log2(p[ids[-1]]) - 2.0)
        assert found[0, kept] == pytest.approx(scores[0, kept])
        sizes.add(len(kept))
    assert len(sizes) > 3


def test_mirostat_holds_the_surprise_near_tau() -> None:
    random = np.random.default_rng(0)
    for version in (1, 2):
        sampler, ids, bits = Mirostat(version, 1.5, 0.1), [0], []
        for step in range(600):
            p = shares(sampler(np.array([ids]), logits(step % 50, 1.0)))
            ids.append(int(random.choice(VOCABULARY, p=p)))
            bits.append(-math.log2(p[ids[-1]]))
        assert sum(bits[100:]) / len(bits[100:]) == pytest.approx(1.5, abs=0.15)


@pytest.mark.parametrize("last_n", [-1, 1, 5])
def test_penalties_over_the_last_tokens(last_n: int) -> None:
    scores, ids = logits(1), [3, 4, 4, 7, 7, 7, 9, 3]
    window = ids if last_n < 0 else ids[-last_n:]
    found = LastTokensPenalty(1.3, 0.2, 0.5, last_n)(np.array([ids]), scores)
    for token in range(VOCABULARY):
        x, count = scores[0, token], window.count(token)
        if count:
            x = (x * 1.3 if x <= 0 else x / 1.3) - count * 0.2 - 0.5
        assert found[0, token] == pytest.approx(x)


def test_the_order_is_the_callers() -> None:
    given: dict[str, Any] = {"temperature": 5.0, "top_p": 0.8, "min_p": 0.1, "min_keep": 3}
    scores, ids = logits(2), np.zeros((1, 1), np.int64)

    def run(*names: str) -> np.ndarray:
        found = scores
        for processor in chain(SamplerSettings(**given, order=names or ORDER), 0, NO_TEXT):
            found = processor(ids, found)
        return found

    assert left(run()) < left(run("temperature", "top_p", "min_p"))  # a flatter distribution keeps more
    assert left(run("temperature")) == left(scores) and (run("top_p")[0].max() == scores.max())
    assert len(left(run("min_p"))) >= 3
    assert ordered(["top-k", "typical_p", "x", "nonsense", "temp"]) == (
        ("top_k", "typ_p", "xtc", "temperature"),
        ("nonsense",),
    )
    assert ordered("edskypmxt") == (ORDER, ())


def test_torch_gives_the_same() -> None:
    settings = SamplerSettings(
        temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, repeat_penalty=1.2, frequency_penalty=0.1, top_n_sigma=2.0,
        xtc_probability=0.7, xtc_threshold=0.1, dynatemp_range=0.3, dry_multiplier=1.0, dry_allowed_length=1,
    )  # fmt: skip
    for extra in ({}, {"mirostat": 1}, {"mirostat": 2}):
        both = [chain(SamplerSettings(**{**vars(settings), **extra}), 5, NO_TEXT) for _ in range(2)]
        ids = [1, 2, 1, 2, 1]
        for step in range(6):
            scores = logits(step)
            tensor, array = torch.from_numpy(scores.copy()), scores
            for numpy_one, torch_one in zip(*both, strict=True):
                array = numpy_one(np.array([ids]), array)
                tensor = torch_one(torch.tensor([ids]), tensor)
            assert np.allclose(tensor.numpy(), array) and len(left(array)) >= 1
            ids.append(int(array.argmax()))


@pytest.mark.parametrize(
    "given",
    [
        {"mirostat": 3},
        {"xtc_probability": 1.5},
        {"dry_multiplier": -1.0},
        {"dry_base": math.inf},
        {"penalty_last_n": -2},
    ],
)
def test_wrong_settings(given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(given))):
        SamplerSettings(**given)
