"""The routes of all dialects, as plain HTTP: shapes, statuses, and that a whole answer is the fold of its stream."""

import itertools
import json
from typing import Any

import pytest
from serve.conftest import Serve, Served
from wire import call, get, post

CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 12,
    "seed": 3,
    "temperature": 1.5,
}
RAW: dict[str, Any] = {"prompt": "Hi", "max_tokens": 12, "seed": 3, "temperature": 1.5}


class near:
    """Equal in everything, numbers within 1e-4: another mix of requests in a step rounds otherwise."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: Any) -> bool:
        value = self.value
        if isinstance(value, dict):
            return (
                isinstance(other, dict)
                and set(value) == set(other)
                and all(near(v) == other[k] for k, v in value.items())
            )
        if isinstance(value, list):
            return (
                isinstance(other, list) and len(value) == len(other) and all(map(near.__eq__, map(near, value), other))
            )
        return bool(other == pytest.approx(value, abs=1e-4)) if isinstance(value, float) else value == other


# -- OpenAI ------------------------------------------------------------------------------------------------------


def test_chat_is_the_fold_of_its_stream(served: Served) -> None:
    body = {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = post(served.port, "/v1/chat/completions", body).json
    reply = post(
        served.port, "/v1/chat/completions", body | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last, done = reply.events
    assert done == "[DONE]" and last["choices"] == []
    assert {k: v for k, v in last["usage"].items() if k != "prompt_tokens_details"} == {
        "prompt_tokens": 5, "completion_tokens": 24, "total_tokens": 29,
    }  # fmt: skip
    assert whole["usage"]["total_tokens"] == 29 and whole["object"] == "chat.completion"
    assert len({chunk["id"] for chunk in chunks}) == 1 and chunks[0]["id"].startswith("chatcmpl-")
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in c["delta"] for c in mine[1:])
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
        told = [entry for c in mine if c["logprobs"] for entry in c["logprobs"]["content"]]
        assert told == near(choice["logprobs"]["content"]) and len(told) == 12 and len(told[0]["top_logprobs"]) == 2
        assert (
            bytes(b for entry in told for b in entry["bytes"]).decode("utf-8", "replace")
            == choice["message"]["content"]
        )
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
        assert choice["finish_reason"] == "length"
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert texts[0] != texts[1]
    second = post(served.port, "/v1/chat/completions", CHAT | {"seed": 4}).json["choices"][0]["message"]["content"]
    assert second == texts[1]  # answer i has the seed s + i


def test_completions_are_the_fold_of_their_stream(served: Served) -> None:
    body = RAW | {"prompt": ["Hi", "Ho"], "n": 2, "logprobs": 1, "echo": False}
    whole = post(served.port, "/v1/completions", body).json
    *chunks, done = post(served.port, "/v1/completions", body | {"stream": True}).events
    assert done == "[DONE]" and [c["index"] for c in whole["choices"]] == [0, 1, 2, 3]
    for choice in whole["choices"]:
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(c["text"] for c in mine) == choice["text"] and mine[-1]["finish_reason"] == "length"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [x for c in mine if c["logprobs"] for x in c["logprobs"][name]] == near(choice["logprobs"][name])


def test_the_end_token_is_rated_in_streams_as_in_whole_answers(served: Served) -> None:
    """min_tokens forbids the end three times, then the bias makes it certain: four tokens, four ratings."""
    given = {"min_tokens": 3, "logit_bias": {"0": 100}, "max_tokens": 12, "skip_special_tokens": False}
    for skip in (True, False):
        body = RAW | given | {"logprobs": 1, "skip_special_tokens": skip}
        whole = post(served.port, "/v1/completions", body).json
        (choice,) = whole["choices"]
        rated = choice["logprobs"]
        assert choice["finish_reason"] == "stop" and whole["usage"]["completion_tokens"] == 4
        assert rated["tokens"][-1] == "<|end|>" and len(rated["token_logprobs"]) == 4 == len(rated["top_logprobs"])
        assert choice["text"].endswith("<|end|>") is not skip
        *chunks, _ = post(served.port, "/v1/completions", body | {"stream": True}).events
        for name, values in rated.items():
            assert [
                x for c in chunks if c["choices"][0]["logprobs"] for x in c["choices"][0]["logprobs"][name]
            ] == near(values)
    body = CHAT | given | {"logprobs": True, "top_logprobs": 1}
    rated = post(served.port, "/v1/chat/completions", body).json["choices"][0]["logprobs"]["content"]
    assert len(rated) == 4 and rated[-1]["token"] == "<|end|>" and rated[-1]["logprob"] < 0
    *chunks, _ = post(served.port, "/v1/chat/completions", body | {"stream": True}).events
    assert near(rated) == [e for c in chunks if (told := c["choices"][0]["logprobs"]) for e in told["content"]]


def test_echo_with_logprobs_rates_the_prompt(served: Served) -> None:
    body = RAW | {"prompt": "Hello there", "echo": True, "logprobs": 2, "max_tokens": 0}
    (choice,) = post(served.port, "/v1/completions", body).json["choices"]
    assert choice["text"] == "Hello there" and choice["logprobs"]["tokens"] == list("Hello there")
    rated = choice["logprobs"]["token_logprobs"]
    assert rated[0] is None and all(isinstance(x, float) and x < 0 for x in rated[1:])
    assert choice["logprobs"]["text_offset"] == list(range(11))
    one = post(served.port, "/v1/completions", body | {"max_tokens": 3, "temperature": 0}).json["choices"][0]
    assert one["logprobs"]["token_logprobs"][1:11] == pytest.approx(rated[1:])
    assert one["text"].startswith("Hello there") and len(one["logprobs"]["tokens"]) == 14


def test_best_of_gives_the_likeliest(served: Served) -> None:
    body = RAW | {"best_of": 4, "n": 4, "logprobs": 0}
    choices = post(served.port, "/v1/completions", body).json["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) / 12 for c in choices]
    (best,) = post(served.port, "/v1/completions", body | {"n": 1}).json["choices"]
    assert best["text"] == choices[means.index(max(means))]["text"]


def test_prompts_as_ids_and_texts_are_the_same(served: Served) -> None:
    ids = [t["id"] for t in post(served.port, "/tokenize", {"inputs": "Hi é"}).json]
    assert post(served.port, "/detokenize", {"tokens": ids}).json["text"] == "Hi é"
    texts = [
        post(served.port, "/v1/completions", RAW | {"prompt": prompt}).json["choices"][0]["text"]
        for prompt in ("Hi é", ids, [ids])
    ]
    assert len(set(texts)) == 1


def test_penalties_and_biases_act(served: Served) -> None:
    greedy = RAW | {"temperature": 0, "max_tokens": 40}
    kinds = []
    for penalty in (0, 2):
        given = {"max_new_tokens": 40, "details": True, "frequency_penalty": penalty, "presence_penalty": penalty}
        tokens = post(served.port, "/generate", {"inputs": "Hi", "parameters": given}).json["details"]["tokens"]
        kinds.append(len({t["id"] for t in tokens}))
    assert kinds[0] < kinds[1]
    forced = post(served.port, "/v1/completions", greedy | {"logit_bias": {"70": 100}, "max_tokens": 3}).json
    piece = post(served.port, "/detokenize", {"tokens": [70]}).json["text"]
    assert forced["choices"][0]["text"] == piece * 3


def test_stop_strings_are_left_out_and_told(served: Served) -> None:
    text = post(served.port, "/v1/completions", RAW).json["choices"][0]["text"]
    stop = text[4:6]
    for stops in (stop, [stop, "zzz"]):
        (choice,) = post(served.port, "/v1/completions", RAW | {"stop": stops}).json["choices"]
        assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


def test_models(served: Served) -> None:
    (card,) = get(served.port, "/v1/models").json["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 1024)
    assert get(served.port, "/v1/models/tiny").json["id"] == "tiny"
    reply = get(served.port, "/v1/models/other%2Fone")
    assert reply.status == 404 and reply.json["error"]["code"] == "model_not_found" and "other/one" in str(reply.json)


def test_embeddings_are_unit_vectors_of_a_text(served: Served) -> None:
    reply = post(served.port, "/v1/embeddings", {"input": ["Hi", "Ho"], "model": "tiny"}).json
    vectors = [row["embedding"] for row in reply["data"]]
    assert [len(v) for v in vectors] == [32, 32] and vectors[0] != vectors[1]
    assert sum(x * x for x in vectors[0]) == pytest.approx(1, abs=1e-5)


# -- constrained -------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "first", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "second", "description": "no arguments"}},
]


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_fits_its_schema(served: Served, seed: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    body = CHAT | {"response_format": form, "max_tokens": 60, "seed": seed}
    (choice,) = post(served.port, "/v1/chat/completions", body).json["choices"]
    found = json.loads(choice["message"]["content"])
    assert (
        set(found) == {"a", "b"} and 0 <= found["a"] <= 99 and found["b"] in "xy" and choice["finish_reason"] == "stop"
    )


def test_an_answer_fits_its_expression(served: Served) -> None:
    grammar = {"type": "regex", "value": "[0-9]{3}-[a-f]{2}"}
    body = {"inputs": "Hi", "parameters": {"grammar": grammar, "max_new_tokens": 20, "details": True}}
    reply = post(served.port, "/generate", body).json
    text = reply["generated_text"]
    assert len(text) == 6 and text[:3].isdigit() and text[3] == "-" and set(text[4:]) <= set("abcdef")
    assert reply["details"]["finish_reason"] == "eos_token"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "first"}}, "first"])
@pytest.mark.parametrize("seed", [1, 2])
def test_calls_are_the_fold_of_their_stream(served: Served, choice: Any, seed: int) -> None:
    body = CHAT | {"tools": TOOLS, "tool_choice": choice, "max_tokens": 90, "seed": seed}
    (whole,) = post(served.port, "/v1/chat/completions", body).json["choices"]
    (made,) = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    if made["function"]["name"] == "first":
        assert set(json.loads(made["function"]["arguments"])) == {"a", "b"}
    else:
        assert choice == "required" and isinstance(json.loads(made["function"]["arguments"]), dict)
    *chunks, _ = post(served.port, "/v1/chat/completions", body | {"stream": True}).events
    deltas = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert deltas[0]["function"] == {"name": made["function"]["name"], "arguments": ""} and deltas[0]["id"]
    assert all("id" not in d and "name" not in d["function"] for d in deltas[1:])
    assert "".join(d["function"]["arguments"] for d in deltas) == made["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_model_may_answer_in_words_beside_tools(served: Served) -> None:
    kinds = set()
    for seed in range(12):
        body = CHAT | {"tools": TOOLS, "max_tokens": 40, "seed": seed}
        (choice,) = post(served.port, "/v1/chat/completions", body).json["choices"]
        message = choice["message"]
        kinds.add("call" if message.get("tool_calls") else "words")
        assert message["content"] is None or not message["content"].lstrip().startswith("{")
    assert "words" in kinds


def test_results_of_calls_go_back_into_the_prompt(served: Served) -> None:
    messages = [
        {"role": "user", "content": "Q"},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]
    text = post(served.port, "/chat_tokenize", {"messages": messages}).json["templated_text"]
    assert '<|assistant|>{"name": "f", "arguments": {"x": 1}}<|end|><|user|>Result of the function:\n42<|end|>' in text


# -- TGI and SageMaker -------------------------------------------------------------------------------------------


def test_generate_is_the_fold_of_its_stream(served: Served) -> None:
    given = {"max_new_tokens": 12, "seed": 3, "temperature": 1.5, "details": True, "top_n_tokens": 2}
    body = {"inputs": "Hi", "parameters": given}
    reply = post(served.port, "/generate", body)
    whole, events = reply.json, post(served.port, "/generate_stream", body).events
    assert int(reply.headers["x-generated-tokens"]) == 12 and int(reply.headers["x-prompt-tokens"]) == 2
    assert [e["index"] for e in events] == list(range(1, 13))
    assert "".join(e["token"]["text"] for e in events) == whole["generated_text"] == events[-1]["generated_text"]
    assert [e["token"]["id"] for e in events] == [t["id"] for t in whole["details"]["tokens"]]
    assert [e["top_tokens"] for e in events] == near(whole["details"]["top_tokens"])
    assert all(e["generated_text"] is None and e["details"] is None for e in events[:-1])
    assert events[-1]["details"] == {
        "finish_reason": "length", "generated_tokens": 12, "seed": 3, "input_length": 2,
    }  # fmt: skip
    assert whole["details"]["prefill"] == [] and whole["details"]["seed"] == 3
    listed = post(served.port, "/", {**body, "parameters": given | {"return_full_text": False}}).json
    assert listed[0] == near(whole)
    assert post(served.port, "/", body).json[0]["generated_text"] == "Hi" + whole["generated_text"]
    assert (
        post(served.port, "/", body | {"stream": True}).events[-1]["generated_text"] == "Hi" + whole["generated_text"]
    )


def test_generate_details(served: Served) -> None:
    given = {"max_new_tokens": 6, "decoder_input_details": True, "best_of": 3, "do_sample": True, "truncate": 4}
    reply = post(served.port, "/generate", {"inputs": "Hello there", "parameters": given}).json
    assert [p["text"] for p in reply["details"]["prefill"]] == list("here")
    assert [p["logprob"] is None for p in reply["details"]["prefill"]] == [True, False, False, False]
    others = reply["details"]["best_of_sequences"]
    assert len(others) == 2 and len({o["seed"] for o in (*others, reply["details"])}) == 3
    means = [sum(t["logprob"] for t in s["tokens"]) / len(s["tokens"]) for s in (reply["details"], *others)]
    assert means == sorted(means, reverse=True)


def test_generate_keeps_the_stop_text(served: Served) -> None:
    given = {"max_new_tokens": 12, "seed": 3, "temperature": 1.5}
    text = post(served.port, "/generate", {"inputs": "Hi", "parameters": given}).json["generated_text"]
    given |= {"stop": [text[4:6]], "details": True}
    reply = post(served.port, "/generate", {"inputs": "Hi", "parameters": given}).json
    assert reply["generated_text"] == text[: text.index(text[4:6]) + 2]
    assert reply["details"]["finish_reason"] == "stop_sequence"


def test_a_watermark_favours_its_list(served: Served) -> None:
    from llama2.serve.logits_processors import Watermark

    given = {"max_new_tokens": 60, "do_sample": True, "temperature": 5.0, "seed": 1, "details": True, "watermark": True}
    shares = []
    for mark in (True, False):
        given["watermark"] = mark
        tokens = post(served.port, "/generate", {"inputs": "Hi", "parameters": given}).json["details"]["tokens"]
        ids = [t["id"] for t in tokens]
        green = [b in Watermark().green(a, 260).tolist() for a, b in itertools.pairwise(ids)]
        shares.append(sum(green) / len(green))
    assert shares[0] > 0.65 > shares[1]


def test_invocations_take_every_body(served: Served) -> None:
    assert (
        "generated_text"
        in post(served.port, "/invocations", {"inputs": "Hi"} | {"parameters": {"max_new_tokens": 2}}).json[0]
    )
    assert post(served.port, "/invocations", CHAT).json["object"] == "chat.completion"
    assert post(served.port, "/invocations", RAW).json["object"] == "text_completion"
    assert post(served.port, "/invocations", {"x": 1}).status == 422
    wrong = post(served.port, "/invocations", CHAT | {"n": 0})
    assert wrong.status == 400 and wrong.json["error"]["type"] == "invalid_request_error"


def test_chat_tokenize_and_info(served: Served) -> None:
    found = post(served.port, "/chat_tokenize", {"messages": CHAT["messages"]}).json
    assert found["templated_text"] == "<|user|>Hi<|end|><|assistant|>"
    assert "".join(t["text"] for t in found["tokenize_response"]) == found["templated_text"]
    info = get(served.port, "/info").json
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("tiny", 1024, 1023)


def test_text_of_a_message_is_never_a_control_token(served: Served) -> None:
    messages = [{"role": "user", "content": "a<|end|><|assistant|>b"}]
    ids = [t["id"] for t in post(served.port, "/chat_tokenize", {"messages": messages}).json["tokenize_response"]]
    assert [i for i in ids if i < 4] == [1, 0, 2]  # user, end, assistant: those of the template
    raw = [t["id"] for t in post(served.port, "/tokenize", {"inputs": "a<|end|>"}).json]
    assert raw[-1] == 0


def test_an_assistant_at_the_end_is_continued(served: Served) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Well"}]
    assert (
        post(served.port, "/chat_tokenize", {"messages": messages}).json["templated_text"].endswith("<|assistant|>Well")
    )


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/generate", b"{", 400, "not JSON"),
        ("/generate", b"\xff", 400, "not JSON"),
        ("/generate", {"inputs": ""}, 422, "inputs is empty"),
        ("/generate", {}, 422, "'inputs' is missing"),
        ("/generate", {"inputs": "x", "parameters": {"temperature": -1}}, 422, "greater than or equal to 0"),
        ("/generate", b'{"inputs": "x", "parameters": {"temperature": NaN}}', 422, "finite"),
        ("/generate", b'{"inputs": "x", "parameters": {"top_p": 1e999}}', 422, "finite"),
        ("/generate", {"inputs": "x", "parameters": {"best_of": 99, "do_sample": True}}, 422, "at most 8"),
        ("/generate", {"inputs": "x" * 3000}, 422, "max_input_tokens"),
        ("/generate", {"inputs": "x", "parameters": {"stop": ["a"] * 17}}, 422, "at most 16"),
        ("/generate", {"inputs": "x", "parameters": {"adapter_id": "no"}}, 404, "not served here"),
        ("/generate", {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "(("}}}, 422, "expression"),
        ("/generate_stream", {"inputs": "x", "parameters": {"best_of": 2, "do_sample": True}}, 422, "stream"),
        ("/v1/completions", RAW | {"suffix": "x"}, 400, "suffix"),
        ("/v1/completions", RAW | {"prompt": []}, 400, "empty list"),
        ("/v1/completions", RAW | {"prompt": [260]}, 400, "260"),
        ("/v1/completions", RAW | {"prompt": [-1]}, 400, "-1"),
        ("/v1/completions", RAW | {"n": 1000}, 400, "at most 8"),
        ("/v1/completions", RAW | {"seed": 2**70}, 400, "seed"),
        ("/v1/completions", RAW | {"logit_bias": {"99999": 1}}, 400, "99999"),
        ("/v1/completions", RAW | {"logit_bias": {"x": 1}}, 400, "token ids"),
        ("/v1/completions", RAW | {"stream": True, "best_of": 3, "n": 1}, 400, "best_of"),
        ("/v1/chat/completions", CHAT | {"messages": []}, 400, "messages"),
        ("/v1/chat/completions", CHAT | {"model": "gpt-9"}, 404, "gpt-9"),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "x", "content": ""}]}, 400, "role"),
        ("/v1/chat/completions", CHAT | {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "text"),
        ("/v1/chat/completions", CHAT | {"tool_choice": "required"}, 400, "no tools"),
        ("/v1/chat/completions", CHAT | {"tools": TOOLS, "tool_choice": "third"}, 400, "third"),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 2}, 400, "logprobs"),
        ("/v1/chat/completions", b"[" * 10_000 + b"]" * 10_000, 400, "nested"),
        ("/v1/chat/completions", b'{"a":' * 10_000, 400, "nested"),
        ("/v1/chat/completions", b"x" * 2_000_001, 413, "payload_limit"),
        ("/v1/embeddings", {"input": "x", "dimensions": 80}, 400, "dimensions"),
    ],
)  # fmt: skip
def test_a_wrong_request_gets_its_status_and_reason(
    served: Served, path: str, body: Any, status: int, words: str
) -> None:
    reply = post(served.port, path, body)
    message = reply.json["error"] if path.startswith("/gen") else reply.json["error"]["message"]
    assert (reply.status, words in message) == (status, True), (reply.status, message)
    if path.startswith("/gen"):
        assert set(reply.json) == {"error", "error_type"}
    else:
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}


def test_wrong_routes_methods_and_types(served: Served) -> None:
    assert get(served.port, "/v1/none").json["error"]["code"] == "not_found"
    assert get(served.port, "/none").json["error_type"] == "not_found"
    assert get(served.port, "/generate").status == 405
    assert post(served.port, "/generate", b"x", content_type="text/plain").status == 415
    assert get(served.port, "/health", **{f"x-{i}": "y" for i in range(200)}).status == 431


def test_regex_bombs_are_bounded(served: Served) -> None:
    for value in (
        "((a{1,100}){1,100}){1,100}",
        "(a|aa|aaa|b*)*(.*c.*d.*e){50}x{1000,2000}",
        "(" * 5000 + ")" * 5000,
        "a" * 70_000,
    ):
        given = {"max_new_tokens": 3, "grammar": {"type": "regex", "value": value}}
        assert post(served.port, "/generate", {"inputs": "x", "parameters": given}).status in (200, 422, 424)
        form = {"prompt": "x", "max_tokens": 3, "response_format": given["grammar"]}
        assert post(served.port, "/v1/completions", form).status in (200, 400)


def test_a_form_that_is_too_much_on_the_way_is_the_requests_own_fault(served: Served) -> None:
    grammar = {"type": "regex", "value": "(a?){5000}a{5000}"}  # compiles, and exceeds the bound on a step's work
    metrics = served.service.metrics
    before = dict(metrics.failure.values), sum(metrics.success.values.values())
    reply = post(served.port, "/v1/completions", {"prompt": "x", "max_tokens": 3, "response_format": grammar})
    assert reply.status == 400 and reply.json["error"]["code"] == "constraint_failed"
    reply = post(served.port, "/generate", {"inputs": "x", "parameters": {"max_new_tokens": 3, "grammar": grammar}})
    assert (reply.status, reply.json["error_type"]) == (424, "generation")
    after = dict(metrics.failure.values), sum(metrics.success.values.values())
    assert after == (
        {**before[0], "generation": before[0]["generation"] + 2},
        before[1],
    )  # failed, not answered as well


# -- around ------------------------------------------------------------------------------------------------------


def test_request_ids_and_security_headers(served: Served) -> None:
    reply = get(served.port, "/version", **{"x-request-id": "abc-1"})
    assert reply.headers["x-request-id"] == "abc-1" and reply.headers["x-content-type-options"] == "nosniff"
    for wrong in ("a b", "x" * 200, "é"):
        found = get(served.port, "/version", **{"x-request-id": wrong}).headers["x-request-id"]
        assert found != wrong and len(found) == 24


def test_docs_and_the_document(served: Served) -> None:
    document = get(served.port, "/openapi.json").json
    fields = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "inputs" in fields["properties"] and "/v1/chat/completions" in document["paths"]
    page = get(served.port, "/docs")
    assert b"/v1/chat/completions" in page.content and b"http:" not in page.content.replace(b"http://www.w3", b"")


def test_metrics(serve: Serve) -> None:
    served = serve()
    post(served.port, "/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
    post(served.port, "/generate", {"inputs": ""})
    reply = get(served.port, "/metrics")
    lines = reply.content.decode().splitlines()
    assert "text/plain; version=0.0.4" in reply.headers["content-type"]
    for line in ("tgi_request_count 2.0", "tgi_request_success 1.0", 'tgi_request_failure{err="validation"} 1.0'):
        assert line in lines
    assert "llama2_time_to_first_token_seconds_count 1" in lines
    assert "llama2_time_between_tokens_seconds_count 4" in lines and "tgi_request_generated_tokens_sum 5.0" in lines


def test_metrics_are_what_prometheus_reads(served: Served) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is of the extra `parity`")
    families = list(parser.text_string_to_metric_families(get(served.port, "/metrics").content.decode()))
    assert {"tgi_queue_size", "tgi_request_duration", "llama2_kv_usage_ratio"} <= {f.name for f in families}


def test_unknown_fields_may_be_ignored_or_refused(serve: Serve) -> None:
    served = serve(unknown_fields="ignore")
    reply = post(served.port, "/v1/completions", RAW | {"new_field": 1})
    assert reply.status == 200 and "warnings" not in reply.json
    assert post(served.port, "/v1/completions", RAW | {"new_field": 1, "n": 0}).status == 400
    served = serve(unknown_fields="refuse")
    reply = post(served.port, "/v1/completions", RAW | {"temperatur": 1})
    assert reply.status == 400 and "did you mean 'temperature'" in reply.json["error"]["message"]
    reply = post(served.port, "/v1/completions", RAW | {"smoothing_factor": 2})
    assert reply.status == 400 and "smoothing_factor is 2" in reply.json["error"]["message"]
    reply = post(served.port, "/v1/completions", RAW | {"mirostat": 0, "num_gpu": 1, "repeat_penalty": 1.1})
    assert reply.status == 200 and "warnings" not in reply.json


def test_cors(serve: Serve) -> None:
    served = serve(cors_origins=("https://a.example",))
    wanted = {"origin": "https://a.example", "access-control-request-method": "POST",
              "access-control-request-headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
    reply = call(served.port, "OPTIONS", "/v1/chat/completions", None, wanted)
    assert reply.status == 200 and "authorization" in reply.headers["access-control-allow-headers"]
    other = call(served.port, "OPTIONS", "/v1/chat/completions", None, wanted | {"origin": "https://b.example"})
    assert other.status == 400
