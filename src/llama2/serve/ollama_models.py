"""The part of Ollama's API that makes no text: which models there are, and vectors."""

import json
import math
import time
from typing import Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llama2.serve import embeddings, openai_completions
from llama2.serve.errors import Refusal
from llama2.serve.facts import Facts, timestamp
from llama2.serve.numbers import Dimensions, KeepAlive
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.validation import Body, Text, Texts

FOREVER_IS = "2999-12-31T00:00:00Z"  # when a model expires that stays
VERSION = "0.12.0"  # of the API that is spoken: clients read each part as a number
LINES = "application/x-ndjson"


class Named(Body):
    """A body that names a model; old clients say `name`."""

    model: str | None = Field(None, max_length=512)
    name: str | None = Field(None, max_length=512)
    stream: bool | None = None
    verbose: bool | None = None
    insecure: bool | None = None

    @property
    def asked(self) -> str:
        """The model's name without the tag that stands for no tag. Raises Refusal."""
        found = self.model or self.name
        if not found:
            raise Refusal("validation", "model is required", "model")
        return found.removesuffix(":latest")

    @property
    def asked_model(self) -> str | None:
        """The name of the model that it asks for. Raises Refusal."""
        return self.asked


class NamedOnly(Named):
    """A body that asks about a model, which need not be loaded for it."""

    @property
    def needs_model(self) -> bool:
        """It is told of as its files have it."""
        return False


class EmbedBody(Named):
    """The body of /api/embed."""

    input: Text | Texts
    truncate: bool | None = None
    dimensions: Dimensions | None = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive | None = None


class OldEmbedBody(Named):
    """The body of /api/embeddings."""

    prompt: Text | None = None
    options: dict[str, Any] | None = None
    keep_alive: KeepAlive | None = None


def json_line(content: dict[str, Any]) -> bytes:
    """A line of a stream: no blank line may come, and no event names."""
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


# -- vectors -----------------------------------------------------------------------------------------------------


async def embed(call: RouteCall) -> Response:
    """/api/embed: a vector of length 1 for each text, cut to `dimensions`."""
    body = await call.read(EmbedBody)
    texts = [body.input] if isinstance(body.input, str) else list(body.input)
    vectors, tokens = await _vectors(call, body.asked, texts, body.truncate is not False)
    if body.dimensions:
        vectors = [_unit(vector[: body.dimensions]) for vector in vectors]
    total = int((time.monotonic() - call.times.came) * 1e9)
    told = {"model": body.model or body.name, "embeddings": vectors, "total_duration": total, "load_duration": 0}
    return JSONResponse(told | {"prompt_eval_count": tokens})


async def old_embed(call: RouteCall) -> Response:
    """/api/embeddings: one text, one vector."""
    body = await call.read(OldEmbedBody)
    if not body.prompt:
        return JSONResponse({"embedding": []})
    vectors, _ = await _vectors(call, body.asked, [body.prompt], True)
    return JSONResponse({"embedding": vectors[0]})


async def _vectors(call: RouteCall, name: str, texts: list[str], cut: bool) -> tuple[list[list[float]], int]:
    if not texts:
        return [], 0
    body = await call.translate(_embedding_fields, call.model, name, texts, cut, to=embeddings.EmbeddingBody)
    found = await call.service.embedded(call.owner, embeddings.embed, call.model, body)
    return [row["embedding"] for row in found["data"]], found["usage"]["prompt_tokens"]


def _embedding_fields(model: TextModel, name: str, texts: list[str], cut: bool) -> dict[str, Any]:
    most = model.bounds.max_input_tokens if cut else None
    return {"model": name, "input": [openai_completions.encode(model.tokenizer, text, False)[:most] for text in texts]}


def _unit(vector: list[float]) -> list[float]:
    size = sum(value * value for value in vector) ** 0.5
    return [value / size for value in vector] if size else vector


# -- models ------------------------------------------------------------------------------------------------------


def _details(facts: Facts) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": facts.format,
        "family": "llama",
        "families": ["llama"],
        "parameter_size": facts.parameter_size,
        "quantization_level": facts.weight_type,
    }


def _capabilities(facts: Facts) -> list[str]:
    return ["completion", *(["tools"] if facts.tools else [])]


def _row(call: RouteCall, name: str, facts: Facts) -> dict[str, Any]:
    tagged = name if ":" in name else f"{name}:latest"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": timestamp(facts.modified),
        "size": facts.bytes,
        "digest": facts.digest(name, call.service.policy.revision),
        "details": _details(facts),
        "capabilities": _capabilities(facts),
    }


async def tags(call: RouteCall) -> Response:
    """/api/tags: the models that can be asked for; those whose files cannot be read are left out."""
    rows = [_row(call, name, facts) for name, _, facts in await call.service.pool.listed()]
    return JSONResponse({"models": rows})


async def ps(call: RouteCall) -> Response:
    """/api/ps: those that are loaded."""
    rows, pool = [], call.service.pool
    if pool.fixed:
        await pool.find(None)
    for offer in pool.loaded:
        facts = await pool.facts(offer)
        row = _row(call, offer.name, facts)
        del row["modified_at"], row["capabilities"]
        until = FOREVER_IS if math.isinf(offer.expires) else timestamp(time.time() + offer.expires)
        more = {"expires_at": until, "size_vram": row["size"] if facts.on_device else 0}
        rows.append({**row, **more, "context_length": facts.context})
    return JSONResponse({"models": rows})


async def show(call: RouteCall) -> Response:
    """/api/show: one model, which is not loaded for it."""
    body = await call.read(NamedOnly)
    pool, name = call.service.pool, body.asked
    offer = await pool.find(name)
    if offer.served is not None:
        offer.served.adapter(name)
    facts = await pool.facts(offer)
    config = facts.config
    return JSONResponse(
        {
            "modelfile": f"FROM {name}\n",
            "parameters": "\n".join(f"{k} {value}" for k, value in facts.settings.items()),
            "template": facts.template or "{{ .Prompt }}",
            "license": "",
            "details": _details(facts),
            "model_info": {
                "general.architecture": "llama",
                "general.basename": name,
                "general.parameter_count": config.num_parameters,
                "llama.context_length": facts.context,
                "llama.embedding_length": config.hidden_size,
                "llama.block_count": config.num_hidden_layers,
                "llama.feed_forward_length": config.intermediate_size,
                "llama.vocab_size": config.vocab_size,
                "llama.attention.head_count": config.num_attention_heads,
                "llama.attention.head_count_kv": config.num_key_value_heads,
            },
            "capabilities": _capabilities(facts),
            "modified_at": timestamp(facts.modified),
        }
    )


async def pull(call: RouteCall) -> Response:
    """/api/pull: a model that is served is there already; nothing is fetched."""
    body = await call.read(NamedOnly)
    offer = await call.service.pool.find(body.asked)
    if offer.served is not None:
        offer.served.adapter(body.asked)
    if body.stream is False:
        return JSONResponse({"status": "success"})
    lines = b"".join(json_line({"status": status}) for status in ("pulling manifest", "success"))
    return Response(lines, media_type=LINES)


async def version(call: RouteCall) -> Response:
    """/api/version."""
    return JSONResponse({"version": VERSION})


async def refuse_management(call: RouteCall) -> Response:
    """/api/create, /api/copy, /api/delete, /api/push."""
    raise Refusal("unable", "models are chosen when this server starts; requests do not make, copy or delete any")
