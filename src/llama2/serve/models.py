"""/v1/models: the names under which the model and its adapters are asked for."""

from typing import Any

from starlette.responses import JSONResponse, Response

from llama2.serve.dialect import get
from llama2.serve.openai import OpenAI
from llama2.serve.service import RouteCall, Service


def _card(service: Service, name: str) -> dict[str, Any]:
    root = service.policy.names[0]
    more = {"root": root, "parent": None if name in service.policy.names else root}
    length = service.bounds.max_total_tokens
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "llama2",
        "max_model_len": length,
        **more,
    }


async def models(call: RouteCall) -> Response:
    """/v1/models."""
    service = call.service
    names = (*service.policy.names, *service.model.adapters)
    return JSONResponse({"object": "list", "data": [_card(service, name) for name in names]})


async def model(call: RouteCall) -> Response:
    """/v1/models/{id}."""
    service, name = call.service, call.request.path_params["id"]
    service.model.adapter(name)
    return JSONResponse(_card(service, name))


DIALECT = OpenAI(
    "openai models",
    get("/v1/models", models, "the models by name"),
    get("/v1/models/{id:path}", model, "one of them"),
    prefixes=("/v1/",),
)
