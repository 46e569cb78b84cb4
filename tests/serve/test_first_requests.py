"""The first request of a client of another server is answered: its fields are obeyed, or told of, and never an error.

On Llama 2's own tokenizer, a byte-level one and SmolLM2's.
"""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from wire import call, post

pytest.importorskip("llguidance", reason="serving needs the extra `serve`")
pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")

from serve.conftest import Served

from llama2 import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from llama2.runners.native import NativeModel
from llama2.serve import validation
from llama2.serve.errors import Refusal
from llama2.serve.known_fields import OFF, WITHOUT_EFFECT
from llama2.serve.names import answers_to, names_of, short_name
from llama2.serve.openai_completions import CompletionBody
from llama2.serve.policy import Policy
from llama2.serve.roles import legal, merged
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, LlamaTokenizerFast

RAW: dict[str, Any] = {"prompt": "The sky", "max_tokens": 8, "seed": 3, "temperature": 1}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 3, "temperature": 1}


def llama2_folder(tokenizer_model: Path, folder: Path, **config: Any) -> Path:
    """A tiny random model with Llama 2's tokenizer and chat template."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 32000, "max_position_embeddings": 512} | config
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    LlamaTokenizerFast(tokenizer_model, chat_template=LLAMA2_CHAT_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama2(tokenizer_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_folder(tokenizer_model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=["llama", "bytes", "smollm2"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    names = {"llama": "llama2", "bytes": "tiny_folder", "smollm2": "smollm2"}
    place = request.getfixturevalue(names[request.param])
    gguf = request.param == "smollm2"
    model = NativeModel.from_gguf(place) if gguf else LlamaForCausalLM.from_pretrained(place).eval()
    found = Served(model, AutoTokenizer.from_pretrained(place), Policy(("tiny",)), None, {})
    yield found
    assert found.quiet()
    found.close()


def chat(served: Served, **more: Any) -> Any:
    return post(served.port, "/v1/chat/completions", CHAT | more)


def complete(served: Served, **more: Any) -> Any:
    return post(served.port, "/v1/completions", RAW | more)


def text(reply: Any) -> str:
    assert reply.status == 200, reply.json
    (choice,) = reply.json["choices"]
    found: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return found


# -- fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"n_predict": 3}, {"max_tokens": 3}),
        ({"options": {"num_predict": 3, "top_k": 5}}, {"max_tokens": 3, "top_k": 5}),
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"options": {"repeat_penalty": 1.5, "seed": 9}}, {"repetition_penalty": 1.5}),
        ({"typ_p": 0.5}, {"typical_p": 0.5}),
        ({"guided_regex": "[0-9]{3}"}, {"response_format": {"type": "regex", "value": "[0-9]{3}"}}),
        ({"structured_outputs": {"regex": "[ab]{2}"}}, {"response_format": {"type": "regex", "value": "[ab]{2}"}}),
        ({"grammar": 'root ::= "yes" | "no"'}, {"guided_choice": ["yes", "no"]}),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_grammar": 'start: "yes" | "no"'}),
        ({"mirostat": 0, "num_gpu": 1, "xtc_probability": 0.0, "user": "x", "dry_base": 2}, {}),
        ({"top_p": 0}, {"temperature": 0}),
        ({"logit_bias": [[70, 1e300]]}, {"logit_bias": {"70": 100}}),
        ({"logit_bias": {"70": -(10**400)}}, {"logit_bias": {"70": -100}}),
    ],
)
def test_their_names_do_what_ours_do(served: Served, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    body = {k: v for k, v in RAW.items() if not (k == "max_tokens" and "max_tokens" in ours)}
    given = post(served.port, "/v1/completions", body | theirs)
    assert text(given) == text(complete(served, **ours))
    assert "warnings" not in given.json


def test_unknown_fields_are_told_of(served: Served) -> None:
    for path, body in (("/v1/completions", RAW), ("/v1/chat/completions", CHAT)):
        reply = post(served.port, path, body | {"temperatur": 0.1, "smoothing_factor": 2})
        assert reply.status == 200
        first, second = reply.json["warnings"]
        assert "'temperatur' is not known" in first and "'temperature'" in first and "smoothing_factor is 2" in second
        events = post(served.port, path, body | {"foo": 1, "stream": True}).events[:-1]
        assert [i for i, event in enumerate(events) if "warnings" in event] == [0]
    reply = post(served.port, "/generate", {"inputs": "x", "parameters": {"max_new_tokens": 2, "foo": 1}})
    assert reply.status == 200 and "'foo'" in reply.json["warnings"][0]


def test_many_unknown_fields_are_counted_and_none_slips_through_where_they_are_refused() -> None:
    warnings: list[str] = []
    body = RAW | {f"foo{i}": 1 for i in range(100)}
    read = validation.read(CompletionBody, json.dumps(body).encode(), "warn", warnings)
    assert warnings[0].startswith("36 more fields") and len(read.model_extra or {}) == 64
    harmless = RAW | dict.fromkeys([*WITHOUT_EFFECT, *OFF])
    assert len(harmless) > validation.LOOKED_AT + len(RAW)
    validation.read(CompletionBody, json.dumps(harmless).encode(), "refuse")
    with pytest.raises(Refusal, match="'foo'"):
        validation.read(CompletionBody, json.dumps(harmless | {"foo": 1}).encode(), "refuse")


def test_lengths_are_fitted(served: Served) -> None:
    total = served.service.bounds.max_total_tokens
    stop = {"stop": ["e", "a", " ", "o"], "min_tokens": 2}  # short, whatever is asked for
    for wanted in (-1, -2, 2**31 - 1, total):
        reply = complete(served, max_tokens=wanted, **stop)
        assert reply.status == 200
        assert any("fit behind the prompt" in warning for warning in reply.json.get("warnings", [])) == (wanted > 0)
    body = {"prompt": [5] * 21, "num_ctx": 24, "ignore_eos": True}  # the default of 16 new tokens does not fit
    reply = post(served.port, "/v1/completions", body)
    assert reply.json["usage"]["completion_tokens"] == 3 and "warnings" not in reply.json
    assert complete(served, prompt=[5] * total).status == 400
    reply = complete(served, prompt=[5] * 20, num_ctx=24, max_tokens=-1, ignore_eos=True)
    assert reply.json["usage"] | {"prompt_tokens_details": 0} == {
        "prompt_tokens": 20, "completion_tokens": 4, "total_tokens": 24, "prompt_tokens_details": 0
    }  # fmt: skip
    assert complete(served, prompt=[5] * 30, num_ctx=24).status == 400
    reply = complete(served, prompt=[5] * 20 + [6], truncate_prompt_tokens=2, max_tokens=1)
    assert reply.json["usage"]["prompt_tokens"] == 2


def test_a_seed_of_minus_one_is_a_new_one(served: Served) -> None:
    found = {text(complete(served, seed=-1, max_tokens=30, temperature=2)) for _ in range(4)}
    assert len(found) > 1
    reply = post(served.port, "/generate", {"inputs": "x", "parameters": {"seed": -1, "max_new_tokens": 2}})
    assert reply.status == 200


def test_tokens_that_are_allowed_and_words_that_are_not(served: Served) -> None:
    tokenizer = served.engine.tokenizer
    ids = [tokenizer.encode_bytes(character)[0] for character in (b"a", b"b", b"7")]
    assert set(text(complete(served, allowed_token_ids=ids, max_tokens=20)).strip()) <= set("ab7")
    found = text(complete(served, allowed_token_ids=ids, bad_words=["a"], max_tokens=20)).strip()
    assert found and set(found) <= set("b7")
    assert complete(served, allowed_token_ids=[]).status == 400
    assert complete(served, allowed_token_ids=[10**6]).status == 400


def test_several_forms_exclude_each_other(served: Served) -> None:
    reply = complete(served, guided_regex="a", guided_choice=["b"])
    assert reply.status == 400 and "exclude each other" in reply.json["error"]["message"]
    assert complete(served, structured_outputs={}).status == 400
    assert complete(served, grammar="x ::= y").status == 400


def test_the_prefix_cache_can_be_left_out(served: Served) -> None:
    body = {"prompt": "x" * 200, "max_tokens": 1}
    cached = [complete(served, **body, **more).json["usage"]["prompt_tokens_details"]["cached_tokens"]
              for more in ({}, {}, {"cache_prompt": False})]  # fmt: skip
    assert cached[1] > 0 == cached[2]


def test_equal_answers_without_sampling(served: Served) -> None:
    reply = chat(served, n=3, temperature=0)
    assert len({choice["message"]["content"] for choice in reply.json["choices"]}) == 1 < len(reply.json["choices"])
    body = {"inputs": "x", "parameters": {"temperature": 0, "best_of": 2, "max_new_tokens": 3}}
    assert post(served.port, "/generate", body).status == 200


def test_stop_strings_wait_for_min_tokens(served: Served) -> None:
    whole = text(complete(served, max_tokens=12, ignore_eos=True))
    letters = sorted(set(whole))[:8]
    for least in (1, 5, 11):
        for stream in (False, True):
            reply = complete(served, max_tokens=12, ignore_eos=True, min_tokens=least, stop=letters, stream=stream,
                             stream_options={"include_usage": True} if stream else None)  # fmt: skip
            usage = reply.events[-2]["usage"] if stream else reply.json["usage"]
            assert usage["completion_tokens"] >= least
    ends = complete(served, max_tokens=12, min_tokens=0, stop=letters, ignore_eos=True).json["usage"]
    assert ends["completion_tokens"] < 12


# -- log-probabilities and places --------------------------------------------------------------------------------


def test_offsets_are_places_in_the_text(served: Served) -> None:
    tokenizer = served.engine.tokenizer
    prompt = "naïve 東京 🦙 x"
    for echo in (True, False):
        reply = complete(served, prompt=prompt, echo=echo, logprobs=0, max_tokens=20, ignore_eos=True, temperature=2)
        (choice,) = reply.json["choices"]
        rated = choice["logprobs"]
        assert len(rated["tokens"]) == len(rated["text_offset"]) == len(rated["top_logprobs"])
        assert rated["text_offset"] == sorted(rated["text_offset"])
        for token, at, following in zip(rated["tokens"], rated["text_offset"], [*rated["text_offset"][1:], None]):
            if "\ufffd" not in token and token not in tokenizer.special_contents and following is not None:
                assert choice["text"][at:following].lstrip(" ") == token.lstrip(" ")
        for logprob, top in zip(rated["token_logprobs"], rated["top_logprobs"], strict=True):
            assert top is None or list(top.values()) == [logprob]


def test_tokenize_tells_what_generation_uses(served: Served) -> None:
    bos = served.engine.tokenizer.bos_token or ""
    for words in ("Hello world", f"{bos}Hello", f" {bos} x", "é\n\n  東京"):
        found = post(served.port, "/tokenize", {"inputs": words}).json
        reply = complete(served, prompt=words, echo=True, logprobs=0, max_tokens=1)
        assert len(found) == reply.json["usage"]["prompt_tokens"]
        assert all(words[row["start"] : row["stop"]] in (row["text"], "") for row in found)


# -- HTTP --------------------------------------------------------------------------------------------------------


def test_heads_and_old_clients(served: Served) -> None:
    for path in ("/health", "/v1/models", "/version", "/"):
        assert call(served.port, "HEAD", path, None, {}).status == 200
    for stream in (False, True):
        with socket.create_connection(("127.0.0.1", served.port)) as sock:
            body = json.dumps(RAW | {"stream": stream}).encode()
            head = f"POST /v1/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
            sock.sendall(head.encode() + b"\r\n\r\n" + body)
            reply = http.client.HTTPResponse(sock)
            reply.begin()
            content = reply.read()
            assert reply.status == 200 and reply.getheader("transfer-encoding") is None
            assert content.endswith(b"data: [DONE]\n\n") if stream else json.loads(content)["choices"]
            assert sock.recv(1) == b""


# -- conversations -----------------------------------------------------------------------------------------------

ORDERS = ["au", "suasu", "us", "ssu", "uaau", "uu", "aus", "sau", "aaua", "suausau", "susu", "usua", "uuaauu"]


def turns(order: str) -> list[dict[str, Any]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[letter], "content": f"{letter}{i}"} for i, letter in enumerate(order)]


@pytest.mark.parametrize("order", ORDERS)
def test_conversations_are_merged_into_legal_ones(served: Served, order: str) -> None:
    reply = post(served.port, "/v1/chat/completions", CHAT | {"messages": turns(order)})
    assert reply.status == 200
    alternates = served.service.model.alternates
    assert (reply.headers.get("x-llama2-roles") == "merged") == alternates == bool(reply.json.get("warnings"))
    told = post(served.port, "/chat_tokenize", {"messages": turns(order)}).json["templated_text"]
    places = [told.index(f"{letter}{i}") for i, letter in enumerate(order)]
    assert places == sorted(places)  # nothing is lost, and all in its order
    assert legal(merged(turns(order)))


def test_a_system_message_alone_is_refused(served: Served) -> None:
    reply = chat(served, messages=turns("ss"))
    assert reply.status == 400 and "system messages only" in reply.json["error"]["message"]


def test_roles_can_be_strict(llama2: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama2).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama2)
    served = Served(model, tokenizer, Policy(("tiny",), strict_roles=True), None, {})
    try:
        for order in ORDERS:
            assert chat(served, messages=turns(order)).status == 400
        reply = chat(served, messages=turns("sua") + turns("u"))
        assert reply.status == 200 and "x-llama2-roles" not in reply.headers
        marker = chat(served, messages=[{"role": "user", "content": "What does [INST] mean, and </s>?"}])
        assert marker.status == 200
    finally:
        served.close()


def test_long_conversations_lose_their_oldest_turns(llama2: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama2).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama2)
    long = [{"role": "system", "content": "Be brief."}, *[m | {"content": m["content"] * 20} for m in turns("ua" * 20)]]
    long.append({"role": "user", "content": "The last one."})
    for overflow in ("refuse", "truncate"):
        served = Served(model, tokenizer, Policy(("tiny",), context_overflow=overflow), None, {})
        try:
            reply = chat(served, messages=long)
            assert reply.status == (400 if overflow == "refuse" else 200)
            raw = post(served.port, "/v1/completions", RAW | {"prompt": "x y " * 600})
            assert raw.status == reply.status
            if overflow == "truncate":
                assert "left out" in reply.json["warnings"][0] and "left out" in raw.json["warnings"][0]
                assert 256 < reply.json["usage"]["prompt_tokens"] <= 504 and raw.json["usage"]["prompt_tokens"] <= 504
        finally:
            served.close()


def test_answers_go_on_beyond_the_context_where_they_may(llama2: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama2).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama2)
    context = model.config.max_position_embeddings
    raw = {"prompt": "x y ", "temperature": 0, "ignore_eos": True}
    for overflow in ("refuse", "shift"):
        served = Served(model, tokenizer, Policy(("tiny",), context_overflow=overflow), None, {})
        try:
            plain = post(served.port, "/v1/completions", raw | {"max_tokens": 2 * context}).json
            fits = plain["usage"]["completion_tokens"]
            assert fits == 2 * context if overflow == "shift" else fits < context and plain["warnings"]
            own = raw | {"n_predict": context + 9, "n_keep": 2, "context_shift": True}
            reply = post(served.port, "/completion", own).json
            assert reply["tokens_predicted"] == context + 9 and reply["truncated"]
            assert not post(served.port, "/completion", own | {"n_predict": 3}).json["truncated"]
            off = post(served.port, "/completion", own | {"context_shift": False}).json
            assert off["tokens_predicted"] < context and not off["truncated"]
            smaller = post(
                served.port, "/v1/completions", raw | {"max_tokens": 90, "num_ctx": 32, "context_shift": True}
            )
            assert smaller.json["usage"]["completion_tokens"] == 90
            ollama = {"model": "tiny", "prompt": "x", "stream": False, "shift": True}
            told = post(served.port, "/api/generate", ollama | {"options": {"num_predict": context + 9, "num_keep": 4}})
            assert told.status == 200 and told.json["done"]
            long = post(served.port, "/v1/completions", raw | {"prompt": "x y " * 600, "max_tokens": 3}).status
            assert long == (200 if overflow == "shift" else 400)
        finally:
            served.close()


def test_variables_of_the_template(served: Served) -> None:
    assert chat(served, chat_template_kwargs={"enable_thinking": False, "date_string": "1 May"}).status == 200
    for wrong in ({"safe": False}, {"messages": []}, {"x": served.engine.tokenizer.eos_token}):
        assert chat(served, chat_template_kwargs=wrong).status == 400
    assert chat(served, chat_template="{{ x }}").status == 400


# -- forms, whole and streamed -----------------------------------------------------------------------------------

SCHEMA: dict[str, Any] = {  # no type: it names properties, so it is an object, and closed
    "properties": {
        "place": {"enum": ["Zürich", "東京", "naïve 🦙"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["place", "n"],
}  # fmt: skip
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
FORMS: dict[str, dict[str, Any]] = {
    "grammar": {"response_format": {"type": "grammar", "value": 'start: "yes" | "no" | "Zürich 東京"'}},
    "gbnf": {"grammar": 'root ::= "yes" | "no" | "Zürich 東京"'},
    "regex": {"response_format": {"type": "regex", "value": "[0-9]{3}-[a-f]{2} (ja|nein) ▁é"}},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "tools": {"tools": [WEATHER], "tool_choice": "required"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_whole_and_streamed(served: Served, form: str) -> None:
    for seed in range(12):
        body = CHAT | FORMS[form] | {"max_tokens": 120, "seed": seed}
        whole = post(served.port, "/v1/chat/completions", body)
        assert whole.status == 200, whole.json
        (choice,) = whole.json["choices"]
        events = post(served.port, "/v1/chat/completions", body | {"stream": True}).events[:-1]
        deltas = [event["choices"][0]["delta"] for event in events]
        words = "".join(delta.get("content") or "" for delta in deltas)
        made = [call["function"] for delta in deltas for call in delta.get("tool_calls", ())]
        arguments = "".join(call.get("arguments", "") for call in made)
        assert (choice["message"]["content"] or "") == words
        if form == "tools":
            (call,) = choice["message"]["tool_calls"]
            assert (call["function"]["name"], call["function"]["arguments"]) == ("weather", arguments)
            words = arguments
        if form in ("grammar", "gbnf"):
            assert words in ("yes", "no", "Zürich 東京")
        elif form == "regex":
            assert re.fullmatch("[0-9]{3}-[a-f]{2} (ja|nein) ▁é", words)
        else:
            assert set(json.loads(words)) == {"place", "n"} and json.loads(words)["place"] in SCHEMA["properties"][
                "place"]["enum"]  # fmt: skip


def test_what_cannot_be_held_is_told(served: Served) -> None:
    pairs = {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "maxItems": 2}
    data = {"type": "string", "format": "binary", "maxLength": 4}
    schema = {"properties": {"a": pairs, "b": data}, "required": ["a"]}
    for strict in (False, True):
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
        reply = chat(served, response_format=form, max_tokens=100)
        assert reply.status == (400 if strict else 200)
        if not strict:
            told = " ".join(reply.json["warnings"])
            assert "uniqueItems" in told and "binary" in told
            assert set(json.loads(text(reply))) <= {"a", "b"}


# -- names -------------------------------------------------------------------------------------------------------


def test_names_of_a_model(tmp_path: Path) -> None:
    file = tmp_path / "Tiny.Q4_0.gguf"
    file.touch()
    names, aliases = names_of(str(file))
    assert names == ("Tiny.Q4_0",) and "Tiny.Q4_0.gguf" in aliases
    assert names_of("org/name") == (("org/name",), ("name",))
    assert names_of(str(file), ("mine", "other"))[0] == ("mine", "other")
    assert short_name("/cache/models--org--name/snapshots/0123") == "org/name"
    for name in ("mine", "Mine", "mine:latest"):
        assert answers_to(name, ("mine",))
    assert not answers_to("yours", ("mine",)) and answers_to("yours", ("mine", "*"))


def test_a_model_answers_to_its_names(llama2: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(llama2).eval()
    names, aliases = names_of(str(llama2), ("shown",))
    served = Served(model, AutoTokenizer.from_pretrained(llama2), Policy(names, aliases=aliases), None, {})
    try:
        for name in ("shown", "SHOWN:latest", llama2.name, "tgi", ""):
            assert complete(served, model=name).status == 200, name
        reply = complete(served, model="gpt-9")
        assert reply.status == 404 and str(llama2.parent) not in reply.json["error"]["message"]
        assert str(llama2) not in call(served.port, "GET", "/v1/models", None, {}).content.decode()
    finally:
        served.close()
