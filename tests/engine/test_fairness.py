"""Several owners on one engine: each gets its share of tokens, places and pages; one alone is not held up."""

import random
from collections import Counter

import pytest
from engine.test_scheduler import SIZE, Simulation, expected, following

from llama2.engine.fairness import Credits
from llama2.engine.scheduler import Sequence
from llama2.errors import InputError


def sequence(owner: str, prompt: int, new: int, seed: int = 0) -> Sequence:
    rng = random.Random(f"{owner} {seed}")
    return Sequence([rng.randrange(11) for _ in range(prompt)], prompt + new, owner.encode(), owner=owner)


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
    live: dict[Sequence, list[int]] = {}
    finished = 0
    while simulation.steps < 1200:
        if rng.random() < 0.5 and len(live) < 2 * width + 4:
            prompt = [rng.randrange(11) for _ in range(rng.randrange(1, 20))]
            limit = min(len(prompt) + rng.randrange(1, 13), pages * SIZE + 1)
            made = Sequence(list(prompt), limit, owner=rng.choice(["a", "a", "a", "b", "c"]))
            simulation.scheduler.submit(made)
            live[made] = prompt
        if live and rng.random() < 0.05:
            gone = rng.choice(list(live))
            simulation.scheduler.finish(gone)
            del live[gone]
        simulation.step(following)
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
            simulation.scheduler.submit(Sequence(prompt, len(prompt) + 5 + i % 7, owner=owner))
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
    assert len(late.tokens) == late.limit  # one token a step, as if it had been there first


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
