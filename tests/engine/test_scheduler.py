"""The scheduler against a simulated cache: what every page holds is known, so sharing it wrongly is seen."""

import pickle
import random
from typing import Any

import pytest

from llama2.engine.blocks import BlockPool
from llama2.engine.scheduler import Chunk, ScheduledSequence, Scheduler
from llama2.errors import ContextLengthError, InputError

SIZE = 4


class Simulation:
    """Runs plans on a cache whose slots hold the text up to themselves, and checks everything after each step."""

    def __init__(self, pages: int, budget: int, width: int, remember: bool = True) -> None:
        self.pool = BlockPool(pages, SIZE, remember)
        self.scheduler = Scheduler(self.pool, budget, width)
        self.slots: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.steps = self.computed = 0

    def step(self, choose: Any) -> list[Chunk]:
        """One plan run and committed; choose(text) is the next token after a text."""
        plan = self.scheduler.plan()
        assert plan or self.scheduler.idle, "there are sequences but nothing is planned"
        assert sum(len(c.tokens) for c in plan) <= self.scheduler.budget
        assert len({id(c.sequence) for c in plan}) == len(plan) <= self.scheduler.width
        for chunk in plan:
            self.write(chunk)
        self.check()
        for chunk in plan:
            self.scheduler.commit(chunk, self.sample(chunk, choose) if chunk.sampled else ())
        self.check()
        self.steps += 1
        self.computed += sum(len(c.tokens) for c in plan)
        return plan

    def write(self, chunk: Chunk) -> None:
        sequence, text = chunk.sequence, chunk.sequence.tokens[: chunk.start] + chunk.tokens
        for position in range(chunk.start, chunk.start + len(chunk.tokens)):
            page = sequence.pages[position // SIZE]
            assert self.pool.owners(page) == 1, "a shared page is written to"
            self.slots[page, position % SIZE] = (sequence.salt, *text[: position + 1])

    def sample(self, chunk: Chunk, choose: Any) -> list[int]:
        text = list(chunk.sequence.tokens)
        new = [choose(text)]
        for guess in chunk.tokens[len(chunk.tokens) - chunk.drafted :]:
            if guess != new[-1]:
                break
            new.append(choose(text + new))
        return new

    def check(self) -> None:
        held = [page for sequence in self.scheduler.running for page in sequence.pages]
        for page in range(self.pool.count):
            assert self.pool.owners(page) == held.count(page)
        assert self.pool.free == self.pool.count - len(set(held))
        assert all(not s.pages and not s.computed for s in self.scheduler.waiting)
        for sequence in self.scheduler.running:
            assert sequence.computed <= len(sequence.pages) * SIZE
            for position in range(sequence.computed):
                slot = self.slots[sequence.pages[position // SIZE], position % SIZE]
                assert slot == (sequence.salt, *sequence.tokens[: position + 1])


def following(text: list[int]) -> int:
    return (sum(text[-3:]) * 7 + len(text)) % 11


def expected(prompt: list[int], limit: int) -> list[int]:
    text = list(prompt)
    while len(text) < limit:
        text.append(following(text))
    return text


@pytest.mark.parametrize(
    ("pages", "budget", "width", "remember"),
    [(12, 6, 4, True), (12, 64, 16, True), (40, 16, 8, True), (12, 6, 4, False), (9, 1, 1, True), (200, 512, 64, True)],
)
def test_random_steps_keep_every_invariant(pages: int, budget: int, width: int, remember: bool) -> None:
    rng = random.Random(pages * 1000 + budget)
    simulation = Simulation(pages, budget, width, remember)
    prompts = [[rng.randrange(11) for _ in range(rng.randrange(1, 20))] for _ in range(6)]
    live: dict[ScheduledSequence, list[int]] = {}
    finished = cancelled = 0
    while simulation.steps < 1700:
        if rng.random() < 0.4 and len(live) < 2 * width + 4:
            prompt = rng.choice(prompts)[: rng.randrange(1, 20)] + [rng.randrange(11) for _ in range(rng.randrange(3))]
            limit = len(prompt) + rng.randrange(1, 13)
            sequence = ScheduledSequence(list(prompt), min(limit, pages * SIZE + 1), rng.choice([b"", b"", b"tenant"]))
            simulation.scheduler.submit(sequence)
            live[sequence] = prompt
        if live and rng.random() < 0.05:
            sequence = rng.choice(list(live))
            simulation.scheduler.finish(sequence)
            del live[sequence]
            cancelled += 1
        for sequence in live:
            if rng.random() < 0.3:  # guesses, some of which hold
                truth = expected(sequence.tokens, len(sequence.tokens) + 3)[len(sequence.tokens) :]
                sequence.draft = [token if rng.random() < 0.7 else rng.randrange(11) for token in truth]
        simulation.step(following)
        for sequence, prompt in list(live.items()):
            assert sequence.tokens == expected(prompt, len(sequence.tokens))
            assert len(sequence.tokens) <= sequence.limit
            if len(sequence.tokens) == sequence.limit:
                simulation.scheduler.finish(sequence)
                del live[sequence]
                finished += 1
    assert finished > 100 and cancelled > 10
    while live:
        simulation.step(following)
        for sequence in [s for s in live if len(s.tokens) == s.limit]:
            simulation.scheduler.finish(sequence)
            del live[sequence]
    assert simulation.scheduler.idle and simulation.pool.free == pages


def run(simulation: Simulation, *sequences: ScheduledSequence) -> None:
    for sequence in sequences:
        simulation.scheduler.submit(sequence)
    while not simulation.scheduler.idle:
        simulation.step(following)
        for sequence in list(simulation.scheduler.running):
            if len(sequence.tokens) == sequence.limit:
                simulation.scheduler.finish(sequence)


def test_a_beginning_is_computed_once() -> None:
    simulation, prompt = Simulation(50, 64, 8), list(range(10)) * 2
    run(simulation, ScheduledSequence([*prompt, 1], 24))
    before = simulation.computed
    second = ScheduledSequence([*prompt, 2], 24)
    run(simulation, second)
    assert second.reused == 20 and simulation.computed - before == 21 + 2 - 20
    other = ScheduledSequence([*prompt, 2], 24, salt=b"another tenant")
    run(simulation, other)
    assert other.reused == 0


def test_who_comes_together_shares_too() -> None:
    simulation, prompt = Simulation(50, 64, 8), list(range(10)) * 2
    sequences = [ScheduledSequence([*prompt, i], 23) for i in range(4)]
    run(simulation, *sequences)
    assert [s.reused for s in sequences] == [0, 20, 20, 20]


def test_the_last_token_always_runs() -> None:
    simulation = Simulation(50, 64, 8)
    run(simulation, ScheduledSequence(list(range(8)), 12))
    again = ScheduledSequence(list(range(8)), 12)
    run(simulation, again)
    assert again.reused == 4


def test_decoding_does_not_wait_for_a_long_prompt() -> None:
    simulation = Simulation(50, 6, 8)
    talking = ScheduledSequence([1, 2], 30)
    simulation.scheduler.submit(talking)
    simulation.step(following)
    simulation.scheduler.submit(ScheduledSequence(list(range(11)) * 4, 50))
    for _ in range(8):
        before = len(talking.tokens)
        plan = simulation.step(following)
        assert len(talking.tokens) == before + 1
        assert sum(len(c.tokens) for c in plan) == 6


def test_the_youngest_makes_room_and_loses_nothing() -> None:
    simulation = Simulation(8, 32, 8)
    old, young = ScheduledSequence(list(range(10)), 26), ScheduledSequence([5] * 9, 26)
    run(simulation, old, young)
    assert young.preemptions > 0 and old.preemptions == 0
    assert young.tokens == expected([5] * 9, 26) and old.tokens == expected(list(range(10)), 26)


def test_pages_are_forgotten_end_first_and_oldest_first() -> None:
    pool = BlockPool(4, SIZE)
    keys = pool.keys(list(range(12)), b"")
    pages = [pool.take() for _ in range(3)]
    for i, page in enumerate(pages):
        pool.remember(page, keys[i], range(4 * i, 4 * i + 4))
    pool.give_back(pages)
    pool.take()  # the page that was never used
    assert [pool.find(key, range(4 * i, 4 * i + 4)) is not None for i, key in enumerate(keys)] == [True, True, True]
    pool.take()
    assert [pool.find(key, range(4 * i, 4 * i + 4)) is not None for i, key in enumerate(keys)] == [True, True, False]


def test_a_key_alone_is_not_believed() -> None:
    pool = BlockPool(2, SIZE)
    key = pool.keys([1, 2, 3, 4], b"")[0]
    pool.remember(pool.take(), key, [1, 2, 3, 4])
    assert pool.find(key, [1, 2, 3, 4]) == 0
    assert pool.find(key, [1, 2, 3, 5]) is None


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (ScheduledSequence([], 5), "at least one token"),
        (ScheduledSequence([1, 2], 2), "leaves no room behind a prompt of 2"),
        (ScheduledSequence([1], 18), "18 tokens do not fit the cache of 16"),
    ],
)
def test_refused_at_the_door(sequence: ScheduledSequence, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Scheduler(BlockPool(4, SIZE)).submit(sequence)


def test_wrong_commit() -> None:
    scheduler = Scheduler(BlockPool(4, SIZE))
    scheduler.submit(ScheduledSequence([1, 2], 9))
    (chunk,) = scheduler.plan()
    with pytest.raises(InputError, match="0 new tokens for a chunk with 0 guesses"):
        scheduler.commit(chunk)


def test_sizes_that_hold_nothing() -> None:
    with pytest.raises(InputError, match="holds nothing"):
        BlockPool(0, 4)
    with pytest.raises(InputError, match="does nothing"):
        Scheduler(BlockPool(1, 4), budget=0)


def test_a_long_prompt_runs_in_small_parts_while_others_decode() -> None:
    scheduler = Scheduler(BlockPool(100, SIZE), budget=64, beside=6)
    first, second = ScheduledSequence([1] * 30, 60), ScheduledSequence([2] * 40, 60)
    scheduler.submit(first)
    (chunk,) = scheduler.plan()
    assert len(chunk.tokens) == 30  # nobody waits for it
    scheduler.commit(chunk, [5])
    scheduler.submit(second)
    sizes = []
    while second.pending > 1:
        plan = scheduler.plan()
        assert plan[0].sequence is first and len(plan[0].tokens) == 1
        sizes.append(len(plan[1].tokens))
        for chunk in plan:
            scheduler.commit(chunk, [5] if chunk.sampled else ())
    assert sizes == [6] * 6 + [4]


def test_what_cannot_fit_says_how_much_is_needed_and_how_much_fits() -> None:
    scheduler = Scheduler(BlockPool(4, SIZE))
    with pytest.raises(ContextLengthError) as error:
        scheduler.check(ScheduledSequence([1, 2, 3], 30))
    assert (error.value.needed, error.value.limit) == (30, 4 * SIZE + 1)
    scheduler.check(ScheduledSequence([1, 2, 3], error.value.limit))  # the bound itself fits
    again = pickle.loads(pickle.dumps(error.value))
    assert (str(again), again.needed, again.limit) == (str(error.value), 30, 4 * SIZE + 1)
