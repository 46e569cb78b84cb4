"""The wrapper of every route: API key, body size, errors, and the count for a drain."""

import json
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llama2.serve.auth import Keys
from llama2.serve.dialect import Dialect, Route
from llama2.serve.errors import Refusal
from llama2.serve.logs import logger
from llama2.serve.origin import check_kind
from llama2.serve.service import Gone, RouteCall, Service
from llama2.serve.sse import EventStream

_INTERNAL = Refusal("internal", "the server failed on this request; its log has the reason under this request id")
MAX_WARNINGS = 4096  # characters in a header
KEY_HEADERS = ("x-api-key", "api-key")  # beside Authorization: what Anthropic's and Azure's clients send


def endpoint(service: Service, dialect: Dialect, route: Route) -> Callable[[Request], Awaitable[Response]]:
    """A route: the key first, then the body within its bound, then the handler; refusals in the route's dialect."""
    counted = route.counted
    open_to_all = route.access == "open" or (route.access == "metrics" and service.policy.public_metrics)
    keys = service.metrics_keys if route.access == "metrics" and service.metrics_keys.wanted else service.keys

    async def answer(request: Request) -> Response:
        call = RouteCall(service, request, b"", dialect, id=request.scope["state"].get("id", ""))
        request.scope["state"]["notes"] = call.notes
        inside = streams = False
        try:
            call.owner = "" if open_to_all else _owner(keys, request)
            request.scope["state"]["owner"] = call.owner
            if counted:
                service.metrics.count.add()
                service.life.check()
            if route.method != "GET":
                call.data = await _body(call, route.any_type)
            if counted:
                service.life.enter()
                inside = True
            response = await route.handler(call)
            response.headers.update(call.headers)
            if call.warnings:  # beside the field that some dialects have: others have no place for one
                response.headers["x-llama2-warnings"] = json.dumps(call.warnings)[:MAX_WARNINGS]
            if isinstance(response, EventStream):
                response.leave = partial(_leave, call, inside)
                streams = True
            return response
        except Refusal as refusal:
            call.notes["error"] = refusal.kind
            if counted:
                service.metrics.failed(refusal.kind)
            return call.dialect.refuse(refusal, call.id)
        except (Gone, ClientDisconnect):
            call.notes["error"] = "gone"
            service.metrics.failed("gone")
            return Response(status_code=499)
        except Exception:
            logger.exception("failed", extra={"fields": {"request_id": call.id, "path": request.scope["path"]}})
            service.metrics.failed("internal")
            return call.dialect.refuse(_INTERNAL, call.id)
        finally:
            call.forget()
            if not streams:
                _leave(call, inside)

    return answer


def _leave(call: RouteCall, counted: bool) -> None:
    """Ends a call: its model may go, and so may a server that drains."""
    call.release()
    if counted:
        call.service.life.leave()


def _owner(keys: Keys, request: Request) -> str:
    if not keys.wanted:
        return ""
    headers = request.headers
    given = [headers.get("authorization"), *(f"Bearer {headers[name]}" for name in KEY_HEADERS if name in headers)]
    owners = [owner for owner in map(keys.owner, given) if owner is not None]
    if not owners:
        raise Refusal("key", "this route needs an API key: send it as `Authorization: Bearer KEY`, or as x-api-key")
    return owners[0]


async def _body(call: RouteCall, any_type: bool) -> bytes:
    """The body, counted as it comes. Raises Refusal."""
    service, request = call.service, call.request
    check_kind(request.headers, service.policy.cors_origins, any_type)
    most, length = service.policy.payload_limit, request.headers.get("content-length", "0")
    told = f"the body is larger than {most} bytes (payload_limit); send less"
    if not length.isdecimal() or int(length[:20]) > most:
        raise Refusal("size", told)
    parts = []
    async with service.life.reading(service.policy.body_timeout):
        async for part in request.stream():
            if call.held + len(part) > most:
                raise Refusal("size", told)
            call.hold(len(part))
            parts.append(part)
    return b"".join(parts)
