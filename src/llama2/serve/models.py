"""/v1/models: the names under which models and their adapters are asked for, as OpenAI and Anthropic tell them."""

from typing import Any

from starlette.responses import JSONResponse, Response

from llama2.serve.dialect import get
from llama2.serve.facts import Facts, timestamp
from llama2.serve.model_pool import Offer
from llama2.serve.openai import OpenAI
from llama2.serve.service import RouteCall, Service


def _card(service: Service, name: str, offer: Offer, facts: Facts) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "llama2",
        "max_model_len": facts.context,
        "type": "model",
        "display_name": name,
        "created_at": timestamp(service.created),
        "lifecycle": "active",
        "root": offer.name,
        "parent": None if name in offer.names else offer.name,
    }
    if not service.pool.fixed:  # as llama.cpp's router tells it
        found["status"] = {"value": _status(offer)}
    return found


def _status(offer: Offer) -> str:
    if offer.served is not None:
        return "loaded"
    return "unloaded" if offer.loading is None else "loading"


async def models(call: RouteCall) -> Response:
    """/v1/models."""
    service = call.service
    cards = [_card(service, *row) for row in await service.pool.listed()]
    names = [card["id"] for card in cards] or [None]
    ends = {"has_more": False, "first_id": names[0], "last_id": names[-1]}
    return JSONResponse({"object": "list", "data": cards, **ends})


async def model(call: RouteCall) -> Response:
    """/v1/models/{id}."""
    service, name = call.service, call.request.path_params["id"]
    offer = await service.pool.find(name)
    if offer.served is not None:
        offer.served.adapter(name)
    return JSONResponse(_card(service, name, offer, await service.pool.facts(offer)))


DIALECT = OpenAI(
    "openai models",
    *(get(f"{base}/models", models, "the models by name") for base in ("/v1", "")),
    *(get(f"{base}/models/{{id:path}}", model, "one of them") for base in ("/v1", "")),
    prefixes=("/v1/",),
)
