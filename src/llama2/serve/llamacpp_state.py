"""The routes of llama.cpp's server that make no text: what is served, places, templates, vectors."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

import llama2
from llama2.generation.samplers import SamplerSettings
from llama2.serve import embeddings, openai_chat
from llama2.serve.chat import prompt_ids
from llama2.serve.errors import Refusal
from llama2.serve.numbers import Ids
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.validation import Body, Text, Texts

DEFAULTS: Mapping[str, float] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


class NativeEmbeddingBody(Body):
    """The body of /embedding and /embeddings."""

    model: str | None = Field(None, max_length=512)
    content: Text | Texts | None = None
    input: Text | Texts | Ids | list[Ids] | None = None
    embd_normalize: Annotated[int, Field(ge=-1, le=100)] | None = None


def chain_settings(chain: SamplerSettings | None) -> dict[str, Any]:
    """llama.cpp's own samplers, as its /props names them."""
    known = asdict(chain or SamplerSettings())
    names = [name for name in known if name.startswith(("dry_", "xtc_", "dynatemp_", "mirostat", "top_n_", "min_keep"))]
    last_n = {} if chain is None or not chain.penalty_last_n else {"repeat_last_n": chain.penalty_last_n}
    return {name: known[name] for name in names} | {"samplers": list(known["order"])} | last_n


def default_settings() -> dict[str, Any]:
    """How tokens are chosen where a request says nothing."""
    return {
        "n_predict": -1,
        "max_tokens": -1,
        "seed": 4294967295,  # a new one
        **DEFAULTS,
        "typical_p": 1.0,
        "repeat_last_n": -1,
        "repeat_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **chain_settings(None),
        "stop": [],
        "ignore_eos": False,
        "stream": True,
        "n_probs": 0,
        "grammar": "",
    }


async def props(call: RouteCall) -> Response:
    """/props: the model, its template and the defaults."""
    model = await call.shown()
    tokenizer = model.tokenizer
    return JSONResponse(
        {
            "default_generation_settings": {
                "n_ctx": model.bounds.max_total_tokens,
                "params": default_settings(),
                "is_processing": model.engine.running > 0,
            },
            "total_slots": model.engine.scheduler.width,
            "model_alias": model.names[0],
            "model_path": model.names[0],
            "chat_template": tokenizer.chat_template or "",
            "chat_template_caps": {"supports_tools": "tools" in (tokenizer.chat_template or "")},
            "modalities": {"vision": False, "audio": False},
            "bos_token": tokenizer.bos_token or "",
            "eos_token": tokenizer.eos_token or "",
            "build_info": f"llama2-{llama2.__version__}",
            "is_sleeping": False,
        }
    )


async def slots(call: RouteCall) -> Response:
    """/slots: the places of a step; with fail_on_no_slot=1, 503 where none is free."""
    engine = (await call.shown()).engine
    busy, width = min(engine.running, engine.scheduler.width), engine.scheduler.width
    if call.request.query_params.get("fail_on_no_slot") == "1" and busy >= width:
        raise Refusal("busy", f"all {width} slots are in use", retry_after=1)
    n_ctx = call.model.bounds.max_total_tokens
    return JSONResponse([{"id": i, "id_task": -1, "n_ctx": n_ctx, "is_processing": i < busy} for i in range(width)])


async def apply_template(call: RouteCall) -> Response:
    """/apply-template: the text of a rendered conversation."""
    body = await call.read(openai_chat.ChatBody)
    return JSONResponse({"prompt": await call.parse(_rendered, call.model, body)})


def _rendered(model: TextModel, body: openai_chat.ChatBody) -> str:
    ids = prompt_ids(model, body.messages, body.offered(model), body.continues)
    text: str = model.tokenizer.decode(list(ids))
    return text


async def embedding(call: RouteCall) -> Response:
    """/embedding, /embeddings: vectors of texts; /embeddings with `model` is OpenAI's."""
    if call.request.scope["path"] == "/embeddings" and "model" in await call.peek():
        call.dialect = embeddings.DIALECT
        return await embeddings.embeddings(call)
    body = await call.read(NativeEmbeddingBody)
    given = body.content if body.content is not None else body.input
    if given is None:
        raise Refusal("validation", "content is missing; give a text or several", "content")
    if body.embd_normalize not in (None, 2):
        raise Refusal("unable", f"embd_normalize is {body.embd_normalize}; vectors have the length 1, which is 2")
    read = await call.translate(_as_input, given, to=embeddings.EmbeddingBody)
    found = await call.service.embedded(call.owner, embeddings.embed, call.model, read)
    return JSONResponse([{"index": row["index"], "embedding": [row["embedding"]]} for row in found["data"]])


def _as_input(given: Any) -> dict[str, Any]:
    return {"input": given}


async def lora_adapters(call: RouteCall) -> Response:
    """/lora-adapters: those that a request can choose, by their place."""
    return JSONResponse([{"id": i, "path": name, "scale": 0.0} for i, name in enumerate((await call.shown()).adapters)])


async def no_change(call: RouteCall) -> Response:
    """Refuses requests that change the server itself."""
    raise Refusal("unable", "settings of the server are chosen when it starts; requests do not change them")
