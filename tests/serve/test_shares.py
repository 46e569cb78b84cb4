"""What one key may have: its share of a full house, its tokens per minute, and a true time to wait."""

import time
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")

from serve.conftest import Serve, Served
from wire import Reply, begin, call

from llama2.serve.auth import Keys
from llama2.serve.errors import Refusal
from llama2.serve.quota import Places, Rate

LONG: dict[str, Any] = {"prompt": "Hi", "max_tokens": 900, "ignore_eos": True, "stream": True}


def ask(served: Served, key: str, body: dict[str, Any]) -> Reply:
    return call(served.port, "POST", "/v1/completions", body, {"authorization": f"Bearer {key}"})


def opened(served: Served, key: str, body: dict[str, Any]) -> Any:
    return begin(served.port, "/v1/completions", body, authorization=f"Bearer {key}")


def test_a_full_house_lets_in_who_has_less_than_its_share() -> None:
    places = Places(8)
    for _ in range(8):
        places.take("greedy", lambda: 7)
    with pytest.raises(Refusal) as refused:
        places.take("greedy", lambda: 7)
    assert refused.value.retry_after == 7
    for _ in range(4):  # half of it, for one of two
        places.take("late", lambda: 7)
    with pytest.raises(Refusal):
        places.take("late", lambda: 7)
    for i in range(100):  # names cost an attacker nothing: the house has an end
        try:
            places.take(f"new {i}", lambda: 7)
        except Refusal:
            break
    assert places.count.total() <= 16
    for _ in range(4):
        places.leave("late")
    assert "late" not in places.count
    single = Places(8, of_one=2)
    single.take("a", lambda: 1)
    single.take("a", lambda: 1)
    with pytest.raises(Refusal, match="of this key"):
        single.take("a", lambda: 1)
    for _ in range(8):
        single.take("", lambda: 1) if single.count.total() < 8 else None  # without keys nobody is a single key


def test_tokens_a_minute_and_when_there_are_more() -> None:
    now = [100.0]
    rate = Rate(600, lambda: now[0])
    rate.check("a")
    rate.charge("a", 650)
    with pytest.raises(Refusal) as refused:
        rate.check("a")
    wait = refused.value.retry_after
    assert wait is not None and 5 <= wait <= 6  # 50 tokens of debt at 10 a second
    rate.check("b")
    now[0] += wait - 1.01
    with pytest.raises(Refusal):
        rate.check("a")
    now[0] += 1.01
    rate.check("a")  # it was true
    now[0] += 1000
    rate.charge("a", 599)
    rate.check("a")  # a bucket holds a minute and no more
    rate.charge("a", 2)
    with pytest.raises(Refusal):
        rate.check("a")
    rate.charge("", 10**9)
    rate.check("")
    Rate(None).charge("a", 10**9)


def test_one_key_cannot_starve_another(serve: Serve) -> None:
    served = serve(keys=Keys(["greedy", "late"]), engine={"width": 4, "waiting": 64}, pace=0.002)
    many = LONG | {"prompt": ["x"] * 8, "n": 4, "temperature": 1.0}
    socks = [opened(served, "greedy", many) for _ in range(2)]
    while served.engine.running < 4:
        time.sleep(0.005)
    done = served.engine.tokens_out
    reply = ask(served, "late", {"prompt": "y", "max_tokens": 20, "ignore_eos": True})
    assert reply.status == 200
    # By arrival it would have waited for 64 answers of 900 tokens; by share it had a place at once.
    assert served.engine.tokens_out - done < 2_000
    for sock in socks:
        sock.close()
    assert served.quiet()


def test_who_is_refused_is_told_when_to_come_back(serve: Serve) -> None:
    pace = 0.005  # no step is shorter, whatever the processor
    served = serve(keys=Keys(["a", "b"]), max_requests_per_key=2, tokens_per_minute=6000, pace=pace)
    socks = [opened(served, "a", LONG) for _ in range(2)]
    while served.engine.running < 2 or served.engine.tokens_out < 20:
        time.sleep(0.01)
    reply = ask(served, "a", LONG)
    left = min(sequence.limit - len(sequence.tokens) for sequence in list(served.engine.scheduler.running))
    assert reply.status == 429 and "of this key" in reply.json["error"]["message"]
    assert int(reply.headers["retry-after"]) >= int(left * pace) >= 1  # by then there is room
    assert ask(served, "b", {"prompt": "x", "max_tokens": 1}).status == 200
    for sock in socks:
        sock.close()
    assert served.quiet()
    served.service.rate.charge(next(iter(served.service.rate._held)), 60_000)
    refused = [ask(served, key, {"prompt": "x", "max_tokens": 1}) for key in ("a", "b")]
    late = next(reply for reply in refused if reply.status == 429)
    assert late.json["error"]["code"] == "rate_limit_exceeded" and int(late.headers["retry-after"]) > 100


def test_a_full_queue_of_one_key_is_no_full_queue_for_others(serve: Serve) -> None:
    served = serve(keys=Keys(["a", "b"]), engine={"width": 2, "waiting": 6}, pace=0.002)
    socks = [opened(served, "a", LONG) for _ in range(8)]
    while served.engine._count < 8:
        time.sleep(0.01)
    reply = ask(served, "a", LONG)
    assert reply.status == 429 and int(reply.headers["retry-after"]) >= 1
    assert ask(served, "b", {"prompt": "x", "max_tokens": 2}).status == 200
    for sock in socks:
        sock.close()
    assert served.quiet()
    assert not +served.engine._counts
