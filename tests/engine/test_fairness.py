"""Several owners on one engine: each gets its share of tokens, places and pages; one alone is not held up."""

import random
from collections import Counter

import pytest
from engine.test_scheduler import SIZE, Simulation, expected, following

from llama2.engine.fairness import Credits, StepTimes
from llama2.engine.scheduler import Chunk, ScheduledSequence
from llama2.errors import InputError


def sequence(owner: str, prompt: int, new: int, seed: int = 0) -> ScheduledSequence:
    rng = random.Random(f"{owner} {seed}")
    return ScheduledSequence([rng.randrange(11) for _ in range(prompt)], prompt + new, owner.encode(), owner=owner)


def run(simulation: Simulation, steps: int) -> Counter[str]:
    """Tokens that were computed for each owner; what has reached its limit is finished."""
    found: Counter[str] = Counter()
    for _ in range(steps):
        for chunk in simulation.step(following):
            found[chunk.sequence.owner] += len(chunk.tokens)
        for done in [s for s in simulation.scheduler.running if len(s.tokens) == s.limit]:
            simulation.scheduler.finish(done)
    return found


@pytest.mark.parametrize(
    ("pages", "budget", "width", "remember"),
    [(12, 6, 4, True), (12, 64, 16, True), (40, 16, 8, True), (12, 6, 4, False), (9, 1, 1, True), (200, 512, 64, True)],
)
def test_random_steps_of_several_owners_keep_every_invariant(
    pages: int, budget: int, width: int, remember: bool
) -> None:
    rng = random.Random(pages * 1000 + budget)
    simulation = Simulation(pages, budget, width, remember)
    live: dict[ScheduledSequence, list[int]] = {}
    finished = 0
    while simulation.steps < 1200:
        if rng.random() < 0.5 and len(live) < 2 * width + 4:
            prompt = [rng.randrange(11) for _ in range(rng.randrange(1, 20))]
            limit = min(len(prompt) + rng.randrange(1, 13), pages * SIZE + 1)
            made = ScheduledSequence(list(prompt), limit, owner=rng.choice(["a", "a", "a", "b", "c"]))
            simulation.scheduler.submit(made)
            live[made] = prompt
        if live and rng.random() < 0.05:
            gone = rng.choice(list(live))
            simulation.scheduler.finish(gone)
            del live[gone]
        chunks = simulation.step(following)
        simulation.scheduler.ran(chunks, seconds(chunks) * rng.uniform(0.3, 3.0))
        for each, prompt in list(live.items()):
            assert each.tokens == expected(prompt, len(each.tokens))
            if len(each.tokens) == each.limit:
                simulation.scheduler.finish(each)
                del live[each]
                finished += 1
    assert finished > 50
    for _ in range(3000):
        if not live:
            break
        simulation.step(following)
        for each in [s for s in live if len(s.tokens) == s.limit]:
            simulation.scheduler.finish(each)
            del live[each]
    assert not live  # every sequence ends


def test_one_owner_is_served_as_if_there_were_none() -> None:
    plans = []
    for owner in ("", "alone"):
        simulation = Simulation(60, 16, 6)
        for i in range(20):
            rng = random.Random(i)
            prompt = [rng.randrange(11) for _ in range(rng.randrange(1, 30))]
            simulation.scheduler.submit(ScheduledSequence(prompt, len(prompt) + 5 + i % 7, owner=owner))
        plans.append([[(c.start, tuple(c.tokens)) for c in simulation.step(following)] for _ in range(60)])
    assert plans[0] == plans[1]


def test_a_newcomer_gets_a_place_though_another_holds_them_all() -> None:
    simulation = Simulation(400, 64, 8)
    for i in range(256):
        simulation.scheduler.submit(sequence("greedy", 4, 60, i))
    run(simulation, 10)
    assert len(simulation.scheduler.running) == 8
    late = sequence("late", 4, 20)
    simulation.scheduler.submit(late)
    run(simulation, 2)
    assert late in simulation.scheduler.running and len(simulation.scheduler.running) == 8
    run(simulation, 22)
    assert len(late.tokens) == late.limit  # one token per step, as if it had been there first


def test_places_are_shared_by_owner_and_not_by_sequence() -> None:
    simulation = Simulation(2000, 64, 8)
    for i in range(200):
        simulation.scheduler.submit(sequence("greedy", 4, 40, i))
    for i in range(50):
        simulation.scheduler.submit(sequence("modest", 4, 40, i))
    run(simulation, 20)
    found = run(simulation, 200)
    assert 0.8 < found["modest"] / found["greedy"] < 1.25


def test_long_prompts_do_not_hold_up_short_ones() -> None:
    simulation = Simulation(4000, 32, 16)
    for i in range(4):
        simulation.scheduler.submit(sequence("long", 2000, 4, i))
    run(simulation, 3)
    short = sequence("short", 16, 1)
    simulation.scheduler.submit(short)
    run(simulation, 2)
    assert len(short.tokens) == short.limit


def test_pages_are_given_up_by_who_has_more_than_its_share() -> None:
    simulation = Simulation(40, 64, 16)
    for i in range(8):
        simulation.scheduler.submit(sequence("greedy", 16, 40, i))
    run(simulation, 8)
    assert simulation.pool.free < 12
    late = sequence("late", 40, 8)
    simulation.scheduler.submit(late)
    run(simulation, 30)
    assert len(late.tokens) == late.limit


def test_bounds_of_one_owner() -> None:
    simulation = Simulation(40, 64, 16)
    simulation.scheduler.each_running, simulation.scheduler.each_pages = 3, 10
    for i in range(12):
        simulation.scheduler.submit(sequence("a", 8, 20, i))
        simulation.scheduler.submit(sequence("b", 8, 20, i))
    for _ in range(150):
        run(simulation, 1)
        running = Counter(s.owner for s in simulation.scheduler.running)
        assert all(count <= 3 for count in running.values())
        assert all(count <= 10 for count in simulation.scheduler._held().values())
    assert simulation.scheduler.idle
    with pytest.raises(InputError, match="do not fit the cache of 40"):
        simulation.scheduler.submit(sequence("a", 8, 60))


def test_credit_is_tokens_and_rounds_give_the_same_to_all() -> None:
    credits = Credits(quantum=10)
    credits.keep(["a", "b"])
    assert credits.first(["a", "b"]) == "a"
    credits.charge("a", 8)
    assert credits.first(["a", "b"]) == "b"
    credits.charge("b", 25)
    assert credits.first(["b", "a"]) == "a"
    credits.charge("a", 30)  # what it had and more
    assert credits.first(["a", "b"]) == "b"
    credits.keep(["b"])
    assert credits.first(["b"]) == "b"
    credits.keep(["b", "c"])  # a newcomer is no better off than the best of the others
    assert credits._left["c"] == min(credits._left["b"], 10)


class Unchecked(Simulation):
    """Many pages: what each holds is not looked at after every step."""

    def check(self) -> None:
        pass


def seconds(chunks: list[Chunk]) -> float:
    """A machine on which a step takes 8 ms, a decoding sequence 1 ms and a token of a prompt half a millisecond."""
    rows = sum(c.sampled and len(c.tokens) == 1 for c in chunks)
    return 0.008 + 0.001 * rows + 0.0005 * (sum(len(c.tokens) for c in chunks) - rows)


def test_times_of_steps_are_told_apart() -> None:
    rng, times = random.Random(0), StepTimes()
    for _ in range(7):
        times.observe(3, 0, 0.011)
    assert times.fit() is None and times.room(2, 2.0) is None
    for _ in range(300):
        rows, tokens = rng.randrange(1, 64), rng.choice([0, 0, rng.randrange(128)])
        times.observe(rows, tokens, (0.008 + 0.001 * rows + 0.0005 * tokens) * rng.uniform(0.9, 1.1))
    assert times.fit() == pytest.approx((0.008, 0.001, 0.0005), rel=0.15)
    assert times.room(4, 2.0) == pytest.approx((2 * 0.012 - 0.008, 0.001, 0.0005), rel=0.15)


def test_times_of_one_kind_of_step_bound_nothing_below_equal_shares() -> None:
    times = StepTimes()
    for _ in range(50):
        times.observe(10, 0, 0.02)
    room = times.room(10, 2.0)
    assert room is not None and room[0] >= 10 * room[1]


def crowd(stretch: float, others: int) -> tuple[list[float], Counter[str]]:
    """Seconds between the tokens of one sequence beside another owner's 60, and tokens of both; `others` more owners
    have one sequence each."""
    simulation = Unchecked(4000, 512, 64)
    simulation.scheduler.stretch = stretch
    for i in range(60):
        simulation.scheduler.submit(sequence("greedy", 3, 400, i))
    for i in range(others):
        simulation.scheduler.submit(sequence(f"other {i}", 3, 400))
    good, gaps, gap = sequence("good", 3, 400), [], 0.0
    simulation.scheduler.submit(good)
    found: Counter[str] = Counter()
    for _ in range(150):
        chunks = simulation.step(following)
        simulation.scheduler.ran(chunks, seconds(chunks))
        gap += seconds(chunks)
        if any(c.sequence is good and c.sampled for c in chunks):
            gaps.append(gap)
            gap = 0.0
        for chunk in chunks:
            found[chunk.sequence.owner] += len(chunk.tokens)
        for done in [s for s in simulation.scheduler.running if len(s.tokens) == s.limit]:
            simulation.scheduler.finish(done)
    return gaps[30:], found


@pytest.mark.parametrize("others", [0, 6])
def test_a_step_is_no_longer_than_twice_what_equal_shares_take(others: int) -> None:
    fair = 0.008 + 0.001 * (2 + others)
    wide, _ = crowd(0, others)
    assert max(wide) > 0.06  # the width alone slows the one down
    bounded, found = crowd(2.0, others)
    assert len(bounded) > 100 and max(bounded) < 2.2 * fair
    assert found["greedy"] > 6 * found["good"]  # what is left goes to whoever has use for it
    assert all(found[f"other {i}"] >= found["good"] - 5 for i in range(others))


def test_every_sequence_of_an_owner_gets_on_in_a_bounded_step() -> None:
    simulation = Unchecked(4000, 512, 64)
    greedy = [sequence("greedy", 3, 400, i) for i in range(40)]
    for each in (*greedy, sequence("good", 3, 400)):
        simulation.scheduler.submit(each)
    for _ in range(120):
        chunks = simulation.step(following)
        simulation.scheduler.ran(chunks, seconds(chunks))
    lengths = [len(s.tokens) for s in greedy]
    assert max(lengths) - min(lengths) <= 6 and min(lengths) > 30


def test_a_long_prompt_beside_a_decoding_owner_runs_in_pieces_that_fit() -> None:
    simulation = Unchecked(4000, 512, 64)
    simulation.scheduler.submit(sequence("good", 3, 900))
    for i in range(12):
        simulation.scheduler.submit(sequence("writer", 250, 2, i))
    times = []
    for _ in range(140):
        chunks = simulation.step(following)
        simulation.scheduler.ran(chunks, seconds(chunks))
        times.append(seconds(chunks))
        for done in [s for s in simulation.scheduler.running if len(s.tokens) == s.limit]:
            simulation.scheduler.finish(done)
    assert max(times[40:]) < 2.3 * 0.010
    assert sum(s.owner == "writer" for s in simulation.scheduler.waiting) < 9  # and they end


def test_one_owner_is_not_bounded() -> None:
    simulation = Unchecked(4000, 512, 64)
    for i in range(60):
        simulation.scheduler.submit(sequence("alone", 3, 400, i))
    for _ in range(30):
        chunks = simulation.step(following)
        simulation.scheduler.ran(chunks, seconds(chunks))
    assert len(chunks) == 60


def test_the_step_in_which_a_newcomer_begins_is_bounded_too() -> None:
    simulation = Unchecked(4000, 512, 64)
    for i in range(60):
        simulation.scheduler.submit(sequence("greedy", 3, 400, i))
    for _ in range(40):  # alone: all at once, and narrow steps while they begin, from which the times are learnt
        chunks = simulation.step(following)
        simulation.scheduler.ran(chunks, seconds(chunks))
    assert len(chunks) == 60
    for rows in (1, 2, 4, 8, 16):
        simulation.scheduler.times.observe(rows, 0, 0.008 + 0.001 * rows)
    simulation.scheduler.submit(sequence("late", 3, 400))
    chunks = simulation.step(following)
    assert "late" in {chunk.sequence.owner for chunk in chunks}
    assert seconds(chunks) < 2.2 * 0.010
