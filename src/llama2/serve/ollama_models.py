"""The part of Ollama's API that makes no text: which models there are, and vectors."""

import json
import time
from typing import Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llama2.serve import embeddings, openai_completions
from llama2.serve.errors import Refusal
from llama2.serve.facts import digest, parameter_size, timestamp, weight_bytes, weight_type
from llama2.serve.numbers import Dimensions, KeepAlive
from llama2.serve.served_model import ServedModel
from llama2.serve.service import RouteCall
from llama2.serve.validation import Body, Text, Texts

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


def _embedding_fields(model: ServedModel, name: str, texts: list[str], cut: bool) -> dict[str, Any]:
    most = model.bounds.max_input_tokens if cut else None
    return {"model": name, "input": [openai_completions.encode(model.tokenizer, text, False)[:most] for text in texts]}


def _unit(vector: list[float]) -> list[float]:
    size = sum(value * value for value in vector) ** 0.5
    return [value / size for value in vector] if size else vector


# -- models ------------------------------------------------------------------------------------------------------


def _details(model: ServedModel) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf" if weight_type(model).startswith("Q") else "safetensors",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": parameter_size(model),
        "quantization_level": weight_type(model),
    }


def _capabilities(model: ServedModel) -> list[str]:
    chats = model.tokenizer.chat_template is not None and model.compiler is not None
    return ["completion", *(["tools"] if chats else [])]


def _row(call: RouteCall, name: str) -> dict[str, Any]:
    model = call.model
    tagged = name if ":" in name else f"{name}:latest"
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": timestamp(call.service.created),
        "size": weight_bytes(model),
        "digest": digest(model, name),
        "details": _details(model),
        "capabilities": _capabilities(model),
    }


async def tags(call: RouteCall) -> Response:
    """/api/tags: the models that can be asked for."""
    return JSONResponse({"models": [_row(call, name) for name in (*call.model.names, *call.model.adapters)]})


async def ps(call: RouteCall) -> Response:
    """/api/ps: those that are loaded."""
    row = _row(call, call.model.names[0])
    del row["modified_at"], row["capabilities"]
    on_device = call.model.engine.model.device.type != "cpu"
    more = {"expires_at": "2999-12-31T00:00:00Z", "size_vram": row["size"] if on_device else 0}
    return JSONResponse({"models": [{**row, **more, "context_length": call.model.bounds.max_total_tokens}]})


async def show(call: RouteCall) -> Response:
    """/api/show: one model."""
    body = await call.read(Named)
    model, name = call.model, body.asked
    model.adapter(name)
    config, settings = model.engine.model.config, model.engine.model.generation_config
    parameters = [f"{k} {settings.value(k)}" for k in ("temperature", "top_k", "top_p") if settings.is_set(k)]
    return JSONResponse(
        {
            "modelfile": f"FROM {name}\n",
            "parameters": "\n".join(parameters),
            "template": model.tokenizer.chat_template or "{{ .Prompt }}",
            "license": "",
            "details": _details(model),
            "model_info": {
                "general.architecture": "llama",
                "general.basename": name,
                "general.parameter_count": config.num_parameters,
                "llama.context_length": model.bounds.max_total_tokens,
                "llama.embedding_length": config.hidden_size,
                "llama.block_count": config.num_hidden_layers,
                "llama.feed_forward_length": config.intermediate_size,
                "llama.vocab_size": config.vocab_size,
                "llama.attention.head_count": config.num_attention_heads,
                "llama.attention.head_count_kv": config.num_key_value_heads,
            },
            "capabilities": _capabilities(model),
            "modified_at": timestamp(call.service.created),
        }
    )


async def pull(call: RouteCall) -> Response:
    """/api/pull: a model that is served is there already; nothing is fetched."""
    body = await call.read(Named)
    call.model.adapter(body.asked)
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
