"""Requests made from the OpenAPI document, and constraints made from grammars: nothing is a failure of the server.

LLAMA2_FUZZ is how many requests (200; `make fuzz` sends 20,000, and a fifth as many constraints), LLAMA2_FUZZ_SEED
where they begin (0, so that a run can be repeated); a failure names the seed of its own request.
"""

import json
import os
import random
import time
from typing import Any

import peak
import pytest
from serve.conftest import Serve, Served
from wire import get, post

from llama2.errors import InputError

COUNT, SEED = int(os.environ.get("LLAMA2_FUZZ") or 200), int(os.environ.get("LLAMA2_FUZZ_SEED") or 0)
MOST, A_BYTE = 64 << 20, 256  # of memory that a request may take for a while, and so many times the bytes of its body
KEPT = 384 << 20  # what all of them may leave: constraints and prompts are kept, the first requests load what they use
FINE = {200, 400, 404, 408, 413, 415, 422, 424, 429, 501, 504}
TEXTS = ["", "x", "</s>", "<|end|>", "\0", "\u2028", "\x9b", "é" * 50, "a" * 5000, "[INST]", "{}", "🙂", "tiny", "auto"]
NUMBERS = [0, 1, -1, 2, 0.5, 1e-300, 3.5e38, 1e308, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, -0.0, 1e-45]


@pytest.fixture(scope="module")
def fuzzed(serve: Serve) -> Served:
    """A server that ends answers soon."""
    return serve(request_timeout=2.0, engine={"cache_tokens": 4096, "width": 8})


def value(schema: dict[str, Any], rng: random.Random, depth: int = 0) -> Any:
    """Something that mostly fits a JSON schema, at its bounds, and sometimes does not."""
    if rng.random() < 0.06:
        return anything(rng, depth)
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            return value(rng.choice(schema[name]), rng, depth + 1)
    if "const" in schema or "enum" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object":
        return members(schema, rng, depth)
    if kind == "array":
        return [value(schema.get("items", {}), rng, depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 3, 40)))]
    if kind in ("number", "integer"):
        bounds = [schema[k] for k in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if k in schema]
        near = [b + step for b in bounds for step in (-1, 0, 1)]
        return rng.choice([*near, *bounds, 1, 1, 2, rng.choice(NUMBERS)])
    if kind == "string":
        return rng.choice(TEXTS)
    return {"boolean": rng.random() < 0.5, "null": None}.get(kind, anything(rng, depth))


def members(schema: dict[str, Any], rng: random.Random, depth: int) -> dict[str, Any]:
    properties, needed = schema.get("properties", {}), schema.get("required", [])
    chosen = [name for name in properties if name in needed or rng.random() < 0.15]
    found = {name: value(properties[name], rng, depth + 1) for name in chosen if rng.random() < 0.98}
    if isinstance(schema.get("additionalProperties"), dict):
        more = schema["additionalProperties"]
        found |= {str(rng.choice((0, 5, 259, 260, "a"))): value(more, rng, depth + 1) for _ in range(rng.randrange(3))}
    elif rng.random() < 0.03:
        found[rng.choice(TEXTS)] = anything(rng, depth)
    return found


def anything(rng: random.Random, depth: int = 0) -> Any:
    if depth > 4 or rng.random() < 0.7:
        return rng.choice([None, True, False, rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(SCHEMAS)])
    if rng.random() < 0.5:
        return [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(TEXTS): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "integer"}}},
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"type": "string", "pattern": "(a{100}){100}"},
    {"enum": []},
    {"type": ["string", "null"], "minLength": 2**40},
    {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "number", "multipleOf": 1e-300}]},
]


def test_no_request_is_a_failure_of_the_server(fuzzed: Served) -> None:
    document = get(fuzzed.port, "/openapi.json").json
    routes = [
        (path, methods["post"]["requestBody"]["content"]["application/json"]["schema"])
        for path, methods in document["paths"].items()
        if "requestBody" in methods.get("post", {})
    ]
    began_with, most = peak.begin(), 0
    for i in range(COUNT):
        rng = random.Random(f"{SEED}/{i}")
        path, schema = routes[i % len(routes)]
        body = members(schema, rng, 0)
        for name in (
            "max_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "n_predict",
        ):  # not every answer is to be a long one
            if rng.random() < 0.95 and name in schema["properties"]:
                body[name] = 2
        if "parameters" in schema["properties"] and rng.random() < 0.95:
            given = body.get("parameters")
            body["parameters"] = {**(given if isinstance(given, dict) else {}), "max_new_tokens": 2}
        if "options" in schema["properties"] and rng.random() < 0.95:
            body["options"] = {"num_predict": 2}
        began, before, sent = time.monotonic(), peak.begin(), json.dumps(body).encode()
        reply = post(fuzzed.port, path, sent)
        grown = peak.peak() - before
        most = max(most, grown)
        assert grown < MOST + A_BYTE * len(sent), (f"{SEED}/{i}", path, body, grown >> 20)
        assert reply.status in FINE, (f"{SEED}/{i}", path, body, reply.content[:500])
        assert time.monotonic() - began < 60, (f"{SEED}/{i}", path, body)
        if "event-stream" in (reply.headers["content-type"] or ""):
            errors = [e for e in reply.events if isinstance(e, dict) and "error" in e]
            assert not [e for e in errors if "internal" in json.dumps(e)], (f"{SEED}/{i}", path, body, errors)
    assert fuzzed.quiet()
    kept = peak.begin() - began_with
    print(f"{COUNT} requests: {most >> 20} MB at most for one, {kept >> 20} MB left")
    assert kept < KEPT


def grammar(rng: random.Random) -> tuple[str, str]:
    """A constraint: rules that name each other at random, groups and repeats, or a schema of both."""
    kind = rng.choice(("lark", "regex", "json"))
    if kind == "lark":
        count = rng.choice((1, 5, 50, 400))
        lines = []
        for i in range(count):
            parts = []
            for _ in range(rng.randrange(1, 4)):
                name = rng.choice((f"r{rng.randrange(count)}", f'"{rng.choice("abc")}"', f"/{regex(rng)}/", f"T{i}"))
                parts.append(name + rng.choice(("", "", "?", "*", "+", "{1,3}", "~5")))
            lines.append(f"r{i}: {rng.choice((' ', ' | ')).join(parts)}")
            lines.append(f"T{i}: /{regex(rng)}/")
        return kind, "start: r0\n" + "\n".join(lines)
    if kind == "regex":
        return kind, regex(rng)
    count = rng.choice((1, 5, 50))
    names = [f"d{i}" for i in range(count)]
    definitions = {
        name: rng.choice([
            {"$ref": f"#/$defs/{rng.choice(names)}"},
            {"type": "array", "items": {"$ref": f"#/$defs/{rng.choice(names)}"}},
            {"anyOf": [{"$ref": f"#/$defs/{rng.choice(names)}"}, {"type": "null"}]},
            {"type": "string", "pattern": regex(rng)}, {"allOf": [{"$ref": f"#/$defs/{n}"} for n in names[:5]]},
            {"type": "object", "properties": {n: {"$ref": f"#/$defs/{n}"} for n in names[:6]}}, rng.choice(SCHEMAS),
        ])
        for name in names
    }  # fmt: skip
    return kind, json.dumps({"$ref": f"#/$defs/{names[0]}", "$defs": definitions})


def regex(rng: random.Random, depth: int = 0) -> str:
    found = ""
    for _ in range(rng.randrange(1, 4)):
        atom = rng.choice(("a", "[^b]", ".", r"\d", r"\p{L}", "(?i:x)", "(", "é"))
        if depth < 5 and rng.random() < 0.4:
            atom = f"({regex(rng, depth + 1)})"
        found += atom + rng.choice(("", "", "*", "+", "?", "{3}", "{1,200}", "{1000}", "|"))
    return found


def test_no_constraint_is_a_failure_of_the_server(tiny_parts: tuple[Any, Any]) -> None:
    pytest.importorskip("llguidance", reason="serving needs the extra `serve`")
    from llama2.serve.constraint import Compiler, Constraint

    compiler, good = Compiler(tiny_parts[1], 260, [0]), 0
    for i in range(max(COUNT // 5, 20)):
        kind, source = grammar(random.Random(f"{SEED}/{i}"))
        began = time.monotonic()
        try:
            compiler(Constraint(kind, source), 1)  # type: ignore[arg-type]
            good += 1
        except InputError as error:
            assert str(error), (f"{SEED}/{i}", source)
        assert time.monotonic() - began < 60, (f"{SEED}/{i}", source)
    compiler.close()
    assert good
