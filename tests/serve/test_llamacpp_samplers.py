"""llama.cpp's samplers in requests of every API: obeyed, told of, the same whole and streamed, refused where wrong."""

from itertools import pairwise
from typing import Any

import pytest
from serve.conftest import Served
from wire import post

TEXT = {"prompt": "abcabcab", "max_tokens": 40, "temperature": 1.5, "seed": 3, "ignore_eos": True}
ON: list[dict[str, Any]] = [
    {"mirostat": 2, "mirostat_tau": 1.0, "mirostat_eta": 0.5},
    {"mirostat": 1, "mirostat_tau": 1.0},
    {"dry_multiplier": 50.0, "dry_allowed_length": 1, "dry_sequence_breakers": []},
    {"xtc_probability": 1.0, "xtc_threshold": 0.01},
    {"top_n_sigma": 0.5},
    {"dynatemp_range": 0.9, "dynatemp_exponent": 2.0},
    {"repeat_penalty": 5.0, "repeat_last_n": 4},
    {"samplers": ["top_k"], "top_k": 3},
    {"samplers": "pt", "top_p": 0.7},
    {"min_keep": 5, "min_p": 0.9},
]


def text(served: Served, body: dict[str, Any]) -> str:
    reply = post(served.port, "/v1/completions", body)
    assert reply.status == 200 and "warnings" not in reply.json, reply.content
    found: str = reply.json["choices"][0]["text"]
    return found


@pytest.mark.parametrize("given", ON, ids=lambda given: "-".join(given))
def test_each_changes_the_answer_the_same_way_whole_and_streamed(served: Served, given: dict[str, Any]) -> None:
    base = text(served, TEXT | {name: value for name, value in given.items() if name in ("top_k", "top_p", "min_p")})
    found = text(served, TEXT | given)
    assert found != base and found == text(served, TEXT | given)
    events = post(served.port, "/v1/completions", TEXT | given | {"stream": True}).events
    assert "".join(e["choices"][0]["text"] for e in events if e != "[DONE]" and e["choices"]) == found
    both = post(served.port, "/v1/completions", TEXT | given | {"n": 2}).json["choices"]
    assert both[0]["text"] == found != both[1]["text"]  # each answer has a state of its own


def test_what_is_off_changes_nothing(served: Served) -> None:
    off = {
        "mirostat": 0, "mirostat_tau": 5.0, "dry_multiplier": 0.0, "dry_base": 1.75, "xtc_probability": 0.0,
        "xtc_threshold": 0.1, "top_n_sigma": -1, "dynatemp_range": 0.0, "min_keep": 0, "repeat_last_n": 64,
        "dry_sequence_breakers": ["\n"], "typical_p": 1.0,
    }  # fmt: skip
    assert text(served, TEXT | off) == text(served, TEXT)


def test_a_small_sigma_is_greedy_and_dry_repeats_nothing(served: Served) -> None:
    greedy = text(served, TEXT | {"temperature": 0})
    assert text(served, TEXT | {"top_n_sigma": 1e-9}) == greedy
    given = {"dry_multiplier": 100.0, "dry_allowed_length": 1, "dry_sequence_breakers": [], "temperature": 0}
    reply = post(served.port, "/completion", TEXT | given | {"return_tokens": True, "n_predict": 60})
    ids = reply.json["tokens"]
    pairs = list(pairwise(ids))
    assert len(set(pairs)) == len(pairs)


def test_other_apis_have_them_too(served: Served) -> None:
    messages = [{"role": "user", "content": "abc"}]
    chat = {"messages": messages, "max_tokens": 20, "seed": 1, "temperature": 1.0}
    told = [post(served.port, "/v1/chat/completions", chat | more).json["choices"] for more in ({}, ON[0], ON[3])]
    assert len({str(choices) for choices in told}) == 3
    options = {"seed": 1, "num_predict": 20, "temperature": 1.0}
    said = []
    for more in ({}, ON[0], ON[3]):
        body = {"model": "tiny", "messages": messages, "stream": False, "options": options | more}
        reply = post(served.port, "/api/chat", body)
        assert reply.status == 200 and "x-llama2-warnings" not in reply.headers
        said.append(reply.json["message"]["content"])
    assert len(set(said)) == 3
    reply = post(
        served.port,
        "/completion",
        {"prompt": "a", "n_predict": 3, "seed": 1, **ON[2], "samplers": ["dry", "temperature"]},
    )
    settings = reply.json["generation_settings"]
    assert settings["dry_multiplier"] == 50.0 and settings["samplers"] == ["dry", "temperature"]
    assert settings["mirostat"] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"mirostat": 3}, "mirostat"),
        ({"xtc_probability": 2}, "xtc_probability"),
        ({"dry_multiplier": -1}, "dry_multiplier"),
        ({"dry_base": 1e9}, "dry_base"),
        ({"samplers": ["nonsense"]}, "samplers"),
        ({"dry_sequence_breakers": ["x" * 100]}, "dry_sequence_breakers"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
        ({"repeat_last_n": 1.5}, "repeat_last_n"),
    ],
)
def test_wrong_values_are_refused_by_name(served: Served, given: dict[str, Any], told: str) -> None:
    reply = post(served.port, "/v1/completions", TEXT | given)
    assert reply.status == 400 and told in reply.json["error"]["message"]


def test_a_form_holds_beside_them(served: Served) -> None:
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["ab", "cd"]}}}}
    for given in ON[:5]:
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 20, **form, **given}
        reply = post(served.port, "/v1/chat/completions", body)
        assert reply.json["choices"][0]["message"]["content"] in ('"ab"', '"cd"')
