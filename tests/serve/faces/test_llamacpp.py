"""The own routes of llama.cpp's server and of vLLM's, as their tests have them."""

import json
from typing import Any

import pytest
from serve.conftest import Served
from wire import get, post

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
GIVEN: dict[str, Any] = {"prompt": "Hi", "n_predict": 8, "seed": 1, "temperature": 1.5, "cache_prompt": True}


def test_completion_whole_and_streamed(face: Served) -> None:
    whole = post(face.port, "/completion", GIVEN | {"return_tokens": True}).json
    assert whole["stop"] is True and whole["stop_type"] == "limit" and whole["tokens_predicted"] == 8
    assert len(whole["tokens"]) == 8 and whole["prompt"] == "Hi" and whole["model"] == "tiny"
    assert whole["timings"]["predicted_n"] == 8 and whole["timings"]["predicted_per_second"] > 0
    timings = whole["timings"]
    assert timings["cache_n"] + timings["prompt_n"] == whole["tokens_evaluated"]
    assert whole["generation_settings"]["temperature"] == 1.5 and whole["generation_settings"]["seed"] == 1
    events = post(face.port, "/completions", GIVEN | {"stream": True, "timings_per_token": True}).events
    assert "".join(e["content"] for e in events) == whole["content"] and events[-1]["stop"] is True
    assert [t for e in events[:-1] for t in e["tokens"]] == whole["tokens"] and events[-1]["content"] == ""
    assert all("timings" in e for e in events) and not any(e["stop"] for e in events[:-1])


def test_stops_and_what_is_only_evaluated(face: Served) -> None:
    text = post(face.port, "/completion", GIVEN | {"n_predict": 30}).json["content"]
    stop = text[5:7]
    found = post(face.port, "/completion", GIVEN | {"n_predict": 30, "stop": ["\x00", stop]}).json
    assert (found["stop_type"], found["stopping_word"]) == ("word", stop)
    assert found["content"] == text[: text.index(stop)]
    none = post(face.port, "/completion", GIVEN | {"n_predict": 0}).json
    assert none["content"] == "" and none["tokens_predicted"] == 0 and none["tokens_evaluated"] > 0
    endless = post(face.port, "/completion", GIVEN | {"n_predict": -1, "prompt": "x" * 500}).json
    assert endless["stop_type"] in ("eos", "limit") and endless["tokens_predicted"] > 8


def test_prompts_in_every_form(face: Served) -> None:
    ids = post(face.port, "/tokenize", {"content": "Hi", "add_special": True}).json["tokens"]
    text = post(face.port, "/completion", GIVEN).json["content"]
    for prompt in (ids, {"prompt_string": "Hi"}):
        found = post(face.port, "/completion", GIVEN | {"prompt": prompt}).json
        assert found["content"] == text and found["prompt"] == prompt
    mixed = post(face.port, "/completion", GIVEN | {"prompt": ["Hi", *ids[-1:]]}).json
    assert mixed["tokens_evaluated"] == len(ids) + 1
    several = post(face.port, "/completion", GIVEN | {"prompt": ["Hi", ids]}).json
    assert [row["index"] for row in several] == [0, 1] and several[0]["content"] == text
    streams = post(face.port, "/completion", GIVEN | {"prompt": ["Hi", "Ho"], "stream": True}).events
    assert sorted(e["index"] for e in streams if e["stop"]) == [0, 1]
    many = post(face.port, "/completion", GIVEN | {"n_cmpl": 2}).json
    assert len(many) == 2 and many[0]["content"] == text != many[1]["content"]


def test_probabilities_biases_and_fields(face: Served) -> None:
    found = post(face.port, "/completion", GIVEN | {"n_probs": 3}).json["completion_probabilities"]
    assert len(found) == 8 and len(found[0]["top_logprobs"]) == 3 and isinstance(found[0]["bytes"], list)
    events = post(face.port, "/completion", GIVEN | {"n_probs": 3, "stream": True}).events
    assert [p for e in events for p in e.get("completion_probabilities", [])] == found
    (piece,) = post(face.port, "/tokenize", {"content": "a", "with_pieces": True}).json["tokens"][-1:]
    for bias in ([[piece["id"], 100]], {str(piece["id"]): 100}):
        forced = post(face.port, "/completion", GIVEN | {"logit_bias": bias, "return_tokens": True}).json
        assert set(forced["tokens"]) == {piece["id"]}
    never = post(face.port, "/completion", GIVEN | {"logit_bias": [["a", False], [10**8, 1]]})
    assert never.status == 200
    few = post(face.port, "/completion", GIVEN | {"response_fields": ["content", "timings/predicted_n", "no"]}).json
    assert few.keys() == {"content", "predicted_n"} and few["predicted_n"] == 8


def test_forms(face: Served) -> None:
    for seed in range(4):
        body = GIVEN | {"json_schema": SCHEMA, "n_predict": 60, "seed": seed}
        found = post(face.port, "/completion", body).json
        assert json.loads(found["content"])["a"] in range(10) and found["stop_type"] == "eos"
        assert (
            "".join(e["content"] for e in post(face.port, "/completion", body | {"stream": True}).events)
            == (found["content"])
        )


def test_completions_is_decided_by_its_body(face: Served) -> None:
    theirs = post(face.port, "/completions", {"model": "tiny", "prompt": "Hi", "max_tokens": 4}).json
    assert theirs["object"] == "text_completion"
    assert "content" in post(face.port, "/completions", {"prompt": "Hi", "n_predict": 4}).json
    refused = post(face.port, "/completions", {"model": "no", "prompt": "Hi"})
    assert refused.status == 404 and refused.json["error"]["code"] == "model_not_found"
    vectors = post(face.port, "/embeddings", {"model": "tiny", "input": "a"}).json
    assert vectors["object"] == "list" and len(vectors["data"][0]["embedding"]) == 32
    native = post(face.port, "/embedding", {"content": ["a", "b"]}).json
    assert [row["index"] for row in native] == [0, 1] and len(native[0]["embedding"][0]) == 32


def test_the_three_bodies_of_tokenize(face: Served) -> None:
    for text in ("Hi", "a b\n", "é𝄞", " x"):
        ids = post(face.port, "/tokenize", {"content": text, "add_special": True}).json["tokens"]
        theirs = post(face.port, "/tokenize", {"prompt": text, "return_token_strs": True, "model": "tiny"}).json
        assert theirs["tokens"] == ids and theirs["count"] == len(ids) == len(theirs["token_strs"])
        assert [row["id"] for row in post(face.port, "/tokenize", {"inputs": text}).json] == ids
        bare = post(face.port, "/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]
        assert bare == post(face.port, "/tokenize", {"content": text}).json["tokens"] == ids[len(ids) - len(bare) :]
        back = post(face.port, "/detokenize", {"tokens": bare}).json
        assert back["prompt"] == back["content"] == text
    pieces = post(face.port, "/tokenize", {"content": "é𝄞", "with_pieces": True}).json["tokens"]
    joined = b"".join(p["piece"].encode() if isinstance(p["piece"], str) else bytes(p["piece"]) for p in pieces)
    assert joined.decode().strip() == "é𝄞"
    said = [{"role": "user", "content": "Hi"}]
    chat = post(face.port, "/tokenize", {"messages": said}).json
    whole = post(face.port, "/v1/chat/completions", {"messages": said, "max_tokens": 1}).json
    assert chat["count"] == whole["usage"]["prompt_tokens"] and chat["max_model_len"] == 1024
    prompt = post(face.port, "/apply-template", {"messages": said}).json["prompt"]
    assert "Hi" in prompt and len(prompt) > 2
    nothing = post(face.port, "/tokenize", {"other": 1})
    assert nothing.status == 422 and "content" in nothing.json["error"]


def test_what_is_served(face: Served) -> None:
    props = get(face.port, "/props").json
    assert props["default_generation_settings"]["n_ctx"] == 1024 and props["chat_template"] and props["total_slots"]
    assert "/" not in props["model_path"]
    slots = get(face.port, "/slots").json
    assert len(slots) == props["total_slots"] and not any(slot["is_processing"] for slot in slots)
    assert get(face.port, "/slots?fail_on_no_slot=1").status == 200
    info = get(face.port, "/tokenizer_info").json
    assert isinstance(info["eos_token"], str) and info["chat_template"]
    for path in ("/health", "/v1/health"):
        assert get(face.port, path).json == {"status": "ok"}
    assert get(face.port, "/load").json == {"server_load": 0} and get(face.port, "/lora-adapters").json == []
    assert post(face.port, "/ping", {}).status == get(face.port, "/ping").status == 200


def test_scores_and_ranks(face: Served) -> None:
    documents = ["alpha", "b", "query"]
    found = post(face.port, "/v1/rerank", {"model": "tiny", "query": "query", "documents": documents}).json
    assert found["results"][0]["index"] == 2
    assert found["results"][0]["relevance_score"] == pytest.approx(1, abs=1e-4)
    assert found["results"][0]["document"] == {"text": "query"} and found["usage"]["total_tokens"] > 0
    scores = [row["relevance_score"] for row in found["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(post(face.port, "/rerank", {"query": "q", "documents": documents, "top_n": 1}).json["results"]) == 1
    tei = post(face.port, "/rerank", {"query": "query", "texts": documents, "return_text": True}).json
    assert tei[0]["text"] == "query" and tei[0]["index"] == 2
    for body in (
        {"text_1": "query", "text_2": documents},
        {"queries": ["query"] * 3, "documents": documents},
        {"data_1": "query", "data_2": documents},
    ):
        data = post(face.port, "/score", body).json["data"]
        by_place = {row["index"]: row["relevance_score"] for row in found["results"]}
        assert [row["score"] for row in data] == pytest.approx([by_place[i] for i in range(3)])
    assert post(face.port, "/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}).status == 400
    assert post(face.port, "/rerank", {"query": "a", "documents": []}).status == 400


REFUSED = [
    ("/completion", {}, 400, "prompt"),
    ("/completion", {"prompt": []}, 400, "prompt"),
    ("/completion", {"prompt": [1, 1.5]}, 400, "1.5"),
    ("/completion", {"prompt": "x", "n_predict": "a"}, 400, "n_predict"),
    ("/completion", {"prompt": "x", "logit_bias": 3}, 400, "logit_bias"),
    ("/completion", {"prompt": "x", "lora": [{"id": 3, "scale": 1}]}, 400, "lora"),
    ("/completion", {"prompt": "x", "post_sampling_probs": True}, 501, "post_sampling_probs"),
    ("/completion", b"{", 400, "JSON"),
    ("/infill", {"input_prefix": "a", "input_suffix": "b"}, 501, "PRE"),
    ("/infill", {"input_prefix": "a"}, 400, "input_suffix"),
    ("/slots/0?action=save", {}, 501, "chosen"),
]


@pytest.mark.parametrize(("path", "body", "status", "text"), REFUSED)
def test_refusals(face: Served, path: str, body: Any, status: int, text: str) -> None:
    reply = post(face.port, path, body)
    assert reply.status == status and text in reply.json["error"]["message"] and reply.json["error"]["code"] == status


def test_a_prompt_that_is_too_long(face: Served) -> None:
    error = post(face.port, "/completion", {"prompt": "long " * 2000, "n_predict": 4}).json["error"]
    assert (error["code"], error["type"]) == (400, "exceed_context_size_error")


def test_a_gap_is_filled_where_the_tokenizer_has_its_marks() -> None:
    from llama2.serve.llamacpp import InfillBody, _gap

    class Tokenizer:
        bos_token_id, unk_token_id = 1, 0

        def convert_tokens_to_ids(self, name: str) -> int:
            return {"▁<PRE>": 7, "▁<SUF>": 8, "▁<MID>": 9}.get(name, 0)

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [100 + byte for byte in text.encode()]}

    class Model:
        tokenizer = Tokenizer()

    body = InfillBody.model_validate({"input_prefix": "a", "input_suffix": "b", "prompt": "c"})
    assert _gap(Model, body) == [1, 7, 197, 8, 198, 9, 199]  # type: ignore[arg-type]


def test_a_grammar_in_gbnf(face: Served) -> None:
    source = 'root ::= ("yes" | "no") " " [0-9]+'
    for seed in range(4):
        found = post(face.port, "/completion", GIVEN | {"grammar": source, "n_predict": 40, "seed": seed}).json
        word, _, number = found["content"].partition(" ")
        assert word in ("yes", "no") and (number.isdecimal() or found["stop_type"] == "limit")
    assert post(face.port, "/completion", GIVEN | {"grammar": "root ::= missing"}).status == 400


def test_what_is_not_obeyed_is_told(face: Served) -> None:
    reply = post(face.port, "/completion", GIVEN | {"surprise": 1})
    assert reply.status == 200 and "surprise" in reply.headers["x-llama2-warnings"]
    ollama = {"model": "tiny", "prompt": "x", "stream": False, "options": {"num_predict": 2, "surprise": 1}}
    assert "surprise" in post(face.port, "/api/generate", ollama).headers["x-llama2-warnings"]
