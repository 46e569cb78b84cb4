"""/v1/models: the names under which the model and its adapters are asked for, as OpenAI and Anthropic tell them."""

from typing import Any

from starlette.responses import JSONResponse, Response

from llama2.serve.dialect import get
from llama2.serve.facts import timestamp
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
        "type": "model",
        "display_name": name,
        "created_at": timestamp(service.created),
        "lifecycle": "active",
        **more,
    }


async def models(call: RouteCall) -> Response:
    """/v1/models."""
    service = call.service
    names = (*service.policy.names, *service.model.adapters)
    cards = [_card(service, name) for name in names]
    ends = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    return JSONResponse({"object": "list", "data": cards, **ends})


async def model(call: RouteCall) -> Response:
    """/v1/models/{id}."""
    service, name = call.service, call.request.path_params["id"]
    service.model.adapter(name)
    return JSONResponse(_card(service, name))


DIALECT = OpenAI(
    "openai models",
    *(get(f"{base}/models", models, "the models by name") for base in ("/v1", "")),
    *(get(f"{base}/models/{{id:path}}", model, "one of them") for base in ("/v1", "")),
    prefixes=("/v1/",),
)
