"""The short way to a sampled token beside the filters and the sampler, which define it."""

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_model
from torch import Tensor

from llama2 import cpu
from llama2.generation.fast_sampling import Shortlist, split, whole_draw
from llama2.generation.filters import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from llama2.generation.loop import generate
from llama2.generation.processors import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from llama2.generation.sampler import Sampler
from llama2.generation.seeded import SeededSampler

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the native engine is not built")
V = 6400  # 100 blocks of 64
SETTINGS = [(0.6, 50, 0.9), (1.3, 7, 0.5), (None, 1, None), (0.1, 50, 0.0), (2.0, 40, None), (None, 20, 0.95)]


def chain(temperature: float | None, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    """The filters in their order."""
    out = LogitsProcessorList()
    if temperature is not None:
        out.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        out.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        out.append(TopPLogitsWarper(top_p))
    return out


def samplers(seeded: bool) -> tuple[Sampler, Sampler]:
    if seeded:
        return Sampler(True, seeds=[3, 4, 5]), Sampler(True, seeds=[3, 4, 5])
    a, b = (torch.Generator().manual_seed(6) for _ in range(2))
    return Sampler(True, a), Sampler(True, b)


def scores(step: int) -> Tensor:
    return 4 * torch.randn(3, V, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_same_tokens_as_the_filters_and_the_sampler(setting: tuple[Any, ...], seeded: bool) -> None:
    one, other = samplers(seeded)
    filters = chain(*setting)
    before, rest, shortlist = split(filters, other)
    assert shortlist is not None and not before and rest == filters
    answered = 0
    for step in range(150):
        x = scores(step)
        want = one(filters(torch.zeros(3, 1, dtype=torch.long), x))[0]
        got = shortlist(x)
        answered += got is not None
        assert (other.draw(filters(None, x).softmax(-1)).tolist() if got is None else got) == want.tolist()  # type: ignore[arg-type]
    assert answered > 140
    if not seeded:
        assert torch.equal(one.generator.get_state(), other.generator.get_state())  # type: ignore[union-attr]


@pytest.mark.parametrize("seeded", [True, False])
def test_an_unsure_draw_leaves_its_numbers_to_the_sampler(seeded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = samplers(seeded)
    filters = chain(0.6, 50, 0.9)
    shortlist = split(filters, other)[2]
    assert shortlist is not None
    refused = 0
    for step in range(60):
        monkeypatch.setattr(cpu, "shortlist_margin", lambda count, step=step: 0.4 if step % 2 else 1e-6)
        x = scores(step)
        kept = filters(torch.zeros(3, 1, dtype=torch.long), x)
        got = shortlist(x)
        refused += got is None
        assert (got or other(kept)[0].tolist()) == one(kept)[0].tolist()
    assert refused > 20


def test_what_is_left_of_a_row() -> None:
    x = torch.full((1, 70), -20.0)
    x[0, [3, 9, 69]] = torch.tensor([0.5, 0.25, 0.25]).log()
    # Blocks of 64: two of them, so top_k may be 2 here; the third ties with the second.
    ((ids, p),) = cpu.shortlists(x.numpy(), 1.0, 2, 1.0, 1)  # type: ignore[misc]
    assert ids == [3, 9, 69]
    assert p == pytest.approx([0.5, 0.25, 0.25], abs=1e-7)
    # Rising with stable ties: 9 and 69 have 0.25 and 0.5 of the sum; top_p = 0.7 drops what is within 0.3.
    ((ids, p),) = cpu.shortlists(x.numpy(), 1.0, 2, 0.7, 1)  # type: ignore[misc]
    assert ids == [3, 69]
    assert p == pytest.approx([2 / 3, 1 / 3], abs=1e-7)
    assert cpu.shortlists(x.numpy(), 1.0, 2, 0.75, 1) == [None]  # 0.25 of the sum or just above?
    ((ids, p),) = cpu.shortlists(x.numpy(), 1.0, 2, 0.0, 2)  # type: ignore[misc]
    assert ids == [3, 69]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 64, 1500, V - 1])
def test_no_answer_for_broken_rows(bad: float, place: int) -> None:
    x = scores(0)
    x[1, place] = bad
    found = cpu.shortlists(x.numpy(), 0.6, 5, 0.9, 1)
    assert [row is None for row in found] == [False, True, False]


def test_no_answer_for_too_few_or_too_many() -> None:
    few = torch.full((1, V), -math.inf)
    few[0, 5:9] = 1.0
    assert cpu.shortlists(few.numpy(), 1.0, 5, 0.9, 1) == [None]
    assert cpu.shortlists(few.numpy(), 1.0, 4, 1.0, 1) == [None]  # in one block: fewer blocks than top_k have any
    assert cpu.shortlists(torch.zeros(1, V).numpy(), 1.0, 5, 0.9, 1) == [None]  # all are equal
    with pytest.raises(ValueError, match="positive"):
        cpu.shortlists(few.numpy(), 0.0, 5, 0.9, 1)


def test_scores_that_the_temperature_makes_equal_are_kept() -> None:
    # Two neighbours in float32 with one quotient: top-k keeps both, as the filter does.
    x = torch.full((1, 640), -30.0)
    x[0, 100] = 1.0
    x[0, 500] = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    for temperature in (0.3, 0.7, 1.7, 3.0, 7.0):
        want = chain(temperature, 1, None)(torch.zeros(1, 1, dtype=torch.long), x).isfinite()[0].nonzero().flatten()
        ((ids, _),) = cpu.shortlists(x.numpy(), temperature, 1, 1.0, 1)  # type: ignore[misc]
        assert ids == want.tolist()


def test_split() -> None:
    sampler = Sampler(True, seeds=[1])
    penalty = RepetitionPenaltyLogitsProcessor(1.1)
    filters = chain(0.7, 5, 0.9)
    before, rest, shortlist = split(LogitsProcessorList([penalty, *filters]), sampler)
    assert before == [penalty] and rest == filters and shortlist is not None
    odd = TopKLogitsWarper(5, filter_value=-1e9)
    reversed_ = LogitsProcessorList(filters[::-1])
    for processors in (
        LogitsProcessorList([*filters, MinPLogitsWarper(0.1)]),
        LogitsProcessorList([filters[0], filters[2]]),
        LogitsProcessorList([odd]),
        reversed_,
    ):
        assert split(processors, sampler) == (processors, [], None)
    assert split(filters, Sampler(False)) == (filters, [], None)


@pytest.mark.parametrize("seed", [None, 8])
def test_generate_says_the_same_with_and_without(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(torch.float32, vocab_size=1000)
    texts: list[Any] = []
    answers: list[Any] = []
    short = Shortlist.__call__
    monkeypatch.setattr(Shortlist, "__call__", lambda self, x: answers.append(short(self, x)) or answers[-1])
    for within in (True, False):
        if not within:
            monkeypatch.setattr(
                "llama2.generation.loop.split", lambda processors, sampler: (processors, LogitsProcessorList(), None)
            )
        torch.manual_seed(4)
        kwargs = {"do_sample": True, "top_k": 12, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.2}
        texts.append(generate(model, tiny_ids(2, 6), max_new_tokens=25, seed=seed, **kwargs).tolist())
    assert texts[0] == texts[1]
    assert len(answers) == 25 and sum(answer is not None for answer in answers) > 20


def test_one_openmp_thread_is_this_threads_only() -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError), cpu.OneOpenMpThread():
            seen.append(torch.get_num_threads())
            other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            other.start()
            other.join()
            raise KeyError
        assert seen == [1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_the_draw_of_a_whole_row_is_that_of_the_sampler(temperature: float) -> None:
    """Draw for draw, with the log-probability of the distribution that is drawn from."""
    processors = LogitsProcessorList([] if temperature == 1 else [TemperatureLogitsWarper(temperature)])
    short, long = SeededSampler(True, [5]), SeededSampler(True, [5])
    draw = whole_draw(processors, short)
    assert draw is not None
    random, ids, missed = np.random.default_rng(1), np.zeros((1, 1), np.int64), 0
    for i in range(400):
        row = (random.normal(size=1000 + i % 70) * 3).astype(np.float32)
        row[i % 9] = -math.inf
        scores = processors(ids, row[None])
        wanted = int(long(scores)[0][0])
        log = float(torch.from_numpy(scores[0]).log_softmax(-1)[wanted])
        found = draw(row)
        if found is None:
            missed += 1
            found = (int(short(scores)[0][0]), log)
        assert found[0] == wanted
        assert found[1] == pytest.approx(log, abs=1e-5)
    assert missed < 40  # tokens that are as rare as the margin
    assert draw(np.full(100, math.nan, np.float32)) is None and draw(np.full(100, -math.inf, np.float32)) is None
    assert whole_draw(LogitsProcessorList([TopKLogitsWarper(3)]), short) is None
    assert whole_draw(processors, SeededSampler(False, [1])) is None
