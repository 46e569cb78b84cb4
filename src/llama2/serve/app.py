"""The application: a table of routes that need a key unless they say otherwise, and what surrounds each call."""

import time
from collections.abc import Awaitable, Callable
from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import llama2
from llama2.serve import embeddings, openai_chat, openai_completions, sagemaker, static, tgi
from llama2.serve.auth import Keys
from llama2.serve.errors import Dialect, Refusal
from llama2.serve.logs import logger
from llama2.serve.origin import check_host, check_kind
from llama2.serve.service import Gone, RouteCall, Service
from llama2.serve.sse import EventStream, refused
from llama2.serve.validation import Body

Handler = Callable[[RouteCall], Awaitable[Response]]
_INTERNAL = Refusal("internal", "the server failed on this request; its log has the reason under this request id")
MAX_HEADERS, MAX_HEADER_BYTES = 128, 16_384
PROBES = ("/health", "/ping", "/ready")
PART = 65_536  # bytes of an answer that are handed to the connection at once


def make_app(service: Service) -> FastAPI:
    """The application over a service, whose model may come later."""
    app = FastAPI(title="llama2", version=llama2.__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    _text_routes(app, service)
    _plain_routes(app, service)
    _page_routes(app)
    app.router.redirect_slashes = False
    app.add_exception_handler(
        404, lambda request, _: _unknown(request, "route", f"there is no {request.scope['path'][:200]}")
    )
    app.add_exception_handler(
        405, lambda request, _: _unknown(request, "method", f"{request.method[:20]} is not a method of this route")
    )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=service.policy.cors_origins,
        allow_methods=["GET", "POST", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "retry-after", "x-generated-tokens", "x-time-per-token"],
    )
    app.add_middleware(Envelope, service=service)
    return app


def _page_routes(app: FastAPI) -> None:
    """The chat page, open to all: it holds no secret, and asks for a key where the routes that it calls want one."""

    async def home(request: Request) -> Response:
        return RedirectResponse("ui/")  # relative: a proxy may have put a prefix before it

    async def file(request: Request) -> Response:
        found = static.asset(request.path_params["path"])
        if found is None:
            return _unknown(request, "route", f"there is no {request.scope['path'][:200]}")
        fresh = found.fresh(request.headers.get("if-none-match"))
        return Response(None if fresh else found.body, 304 if fresh else 200, found.headers)

    app.router.add_route("/ui", home)
    app.router.add_route("/ui/{path:path}", file)


def _text_routes(app: FastAPI, service: Service) -> None:
    def post(path: str, handler: Handler, model: type[Body], dialect: Dialect, told: str, counted: bool = True) -> None:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        app.add_api_route(
            path,
            _endpoint(service, handler, dialect, counted),
            methods=["POST"],
            summary=told,
            response_class=JSONResponse,
            openapi_extra={
                "requestBody": {"content": {"application/json": {"schema": _inline(schema)}}, "required": True}
            },
        )

    post("/v1/chat/completions", openai_chat.chat, openai_chat.ChatBody, "openai", "answer a conversation")
    body = openai_completions.CompletionBody
    post("/v1/completions", openai_completions.completions, body, "openai", "continue one prompt or several")
    post("/v1/embeddings", embeddings.embeddings, embeddings.EmbeddingBody, "openai", "a vector for each text", False)
    post("/", tgi.compat, tgi.GenerateBody, "tgi", "continue a prompt: /generate in a list, or its stream")
    post("/generate", tgi.generate, tgi.GenerateBody, "tgi", "continue a prompt")
    post("/generate_stream", tgi.generate_stream, tgi.GenerateBody, "tgi", "continue a prompt, token by token")
    post("/invocations", sagemaker.invocations, tgi.GenerateBody, "tgi", "any of the three bodies, for SageMaker")
    post("/tokenize", tgi.tokenize, tgi.GenerateBody, "tgi", "the ids of a text", False)
    post("/chat_tokenize", tgi.chat_tokenize, openai_chat.ChatBody, "tgi", "the ids of a conversation", False)
    post("/detokenize", tgi.detokenize, tgi.DetokenizeBody, "tgi", "the text of ids", False)


def _plain_routes(app: FastAPI, service: Service) -> None:
    def get(
        path: str, handler: Handler, told: str, dialect: Dialect = "tgi", open: bool = False, keys: Keys | None = None
    ) -> None:
        endpoint = _endpoint(service, handler, dialect, False, open, keys)
        app.add_api_route(path, endpoint, methods=["GET"], summary=told, response_class=Response)

    async def document(call: RouteCall) -> Response:
        return JSONResponse(app.openapi())

    async def documentation(call: RouteCall) -> Response:
        return HTMLResponse(_documentation(app.openapi()), headers={"content-security-policy": "default-src 'none'"})

    for path in ("/", "/health"):
        get(path, _health, "whether the process works", open=True)
    get("/ready", _ready, "whether requests should be sent here", open=True)
    get("/ping", _ready, "the same, for SageMaker", open=True)
    keys = service.metrics_keys if service.metrics_keys.wanted else None
    get("/metrics", _metrics, "Prometheus metrics", open=service.policy.public_metrics, keys=keys)
    get("/info", _info, "the model and the bounds")
    get("/version", _version, "the version of this package")
    get("/v1/models", _models, "the models by name", "openai")
    get("/v1/models/{id:path}", _model, "one of them", "openai")
    get("/openapi.json", document, "this API, for machines", open=True)
    get("/docs", documentation, "this API, for people", open=True)


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose definitions stand in itself and not in the document's components."""
    definitions = schema.pop("$defs", {})

    def put(node: Any) -> Any:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            return put(definitions[name]) if name in definitions else {key: put(value) for key, value in node.items()}
        return [put(item) for item in node] if isinstance(node, list) else node

    found: dict[str, Any] = put(schema)
    return found


# -- around each call --------------------------------------------------------------------------------------------


def _endpoint(
    service: Service,
    handler: Handler,
    dialect: Dialect,
    counted: bool,
    open: bool = False,
    keys: Keys | None = None,
) -> Callable[[Request], Awaitable[Response]]:
    """A route: the key first, then the body within its bound, then the handler; refusals in the route's dialect.

    counted: it makes text, so it counts as a request and a drain waits for it. keys: those that open it, if not the
    server's.
    """

    async def endpoint(request: Request) -> Response:
        call = RouteCall(service, request, b"", id=request.scope["state"].get("id", ""))
        call.dialect = dialect
        request.scope["state"]["notes"] = call.notes
        inside = False
        try:
            call.owner = "" if open else _owner(keys or service.keys, request)
            request.scope["state"]["owner"] = call.owner
            if counted:
                service.metrics.count.add()
                service.life.check()
            if request.method == "POST":
                call.data = await _body(call)
            if counted:
                service.life.enter()
                inside = True
            response = await handler(call)
            if isinstance(response, EventStream):
                response.leave, inside = service.life.leave if counted else None, False
            return response
        except Refusal as refusal:
            call.notes["error"] = refusal.kind
            if counted:
                service.metrics.failed(refusal.kind)
            return refused(refusal, call.dialect)
        except (Gone, ClientDisconnect):
            call.notes["error"] = "gone"
            service.metrics.failed("gone")
            return Response(status_code=499)
        except Exception:
            logger.exception("failed", extra={"fields": {"request_id": call.id, "path": request.scope["path"]}})
            service.metrics.failed("internal")
            return refused(_INTERNAL, call.dialect)
        finally:
            call.forget()
            if inside:
                service.life.leave()

    return endpoint


def _owner(keys: Keys, request: Request) -> str:
    if not keys.wanted:
        return ""
    owner = keys.owner(request.headers.get("authorization"))
    if owner is None:
        raise Refusal("key", "this route needs an API key: send it as `Authorization: Bearer KEY`")
    return owner


async def _body(call: RouteCall) -> bytes:
    """The body, counted as it comes. Raises Refusal."""
    service, request = call.service, call.request
    check_kind(request.headers, service.policy.cors_origins)
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


def _unknown(request: Request, kind: str, message: str) -> Response:
    return refused(Refusal(kind, message), _dialect(request.scope))


def _dialect(scope: Scope) -> Dialect:
    return "openai" if scope["path"].startswith("/v1/") else "tgi"


class Envelope:
    """Outermost: bounds on headers, a request id, a line in the log, and headers that every response has."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state: dict[str, Any] = scope.setdefault("state", {})
        headers = scope["headers"]
        state["id"], state["notes"] = _request_id(headers), {}
        stamp = (b"x-request-id", state["id"].encode()), (b"x-content-type-options", b"nosniff")
        began, status = time.monotonic(), 0

        start: Message | None = None  # sent with the first part of the body: until then it may become a refusal

        async def stamped(message: Message) -> None:
            nonlocal status, start
            if message["type"] == "http.response.start":
                start = {**message, "headers": [*message.get("headers", ()), *stamp]}
                return
            if start is not None:
                status, first, start = start["status"], start, None
                await send(first)
            await send(message)

        async def bounded(message: Message) -> None:
            """Answers of one large part, which nothing else holds back."""
            body = message.get("body", b"")
            if len(body) <= PART:
                await stamped(message)
                return
            try:
                self.service.unread.take(state.get("owner", ""), len(body))
            except Refusal as refusal:
                await refused(refusal, _dialect(scope))(scope, receive, stamped)
                return
            try:
                for at in range(0, len(body), PART):
                    more = message.get("more_body", False) or at + PART < len(body)
                    await stamped({"type": "http.response.body", "body": body[at : at + PART], "more_body": more})
            finally:
                self.service.unread.give_back(state.get("owner", ""), len(body))

        try:
            if len(headers) > MAX_HEADERS or sum(len(k) + len(v) for k, v in headers) > MAX_HEADER_BYTES:
                raise Refusal("headers", "the headers are too many or too long")
            if scope["path"] not in PROBES:  # whoever watches a server knows it by its address
                host = next((value.decode("latin-1") for name, value in headers if name == b"host"), None)
                check_host(host, self.service.policy.allowed_hosts)
        except Refusal as refusal:
            await refused(refusal, _dialect(scope))(scope, receive, bounded)
        else:
            await self.app(scope, receive, bounded)
        self._log(scope, status, time.monotonic() - began)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        state = scope["state"]
        level = 10 if scope["path"] in (*PROBES, "/metrics") and status == 200 else 20
        if logger.isEnabledFor(level):
            fields = {
                "request_id": state["id"],
                "method": scope["method"],
                "path": scope["path"][:200],
                "status": status,
                "seconds": round(seconds, 4),
                **state["notes"],
            }
            logger.log(level, "request", extra={"fields": fields})


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's own id where it is a plain one, else a new one. SageMaker lets its Inference-Id through only."""
    found = {name: value for name, value in headers if name in (b"x-request-id", b"x-amzn-sagemaker-inference-id")}
    for value in found.values():
        text = value.decode("latin-1")
        if 0 < len(text) <= 128 and text.isascii() and all(c.isalnum() or c in "-_.:" for c in text):
            return text
    return RouteCall.new_id()


# -- routes without a body ---------------------------------------------------------------------------------------


async def _health(call: RouteCall) -> Response:
    if call.service.alive():
        return Response(status_code=200)
    return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)


async def _ready(call: RouteCall) -> Response:
    service = call.service
    if service.life.ready and service.alive():
        return Response(status_code=200)
    state = service.life.state if service.alive() else "stuck"
    return JSONResponse({"error": f"not ready: {state}", "error_type": "healthcheck"}, 503, {"retry-after": "2"})


async def _metrics(call: RouteCall) -> Response:
    return PlainTextResponse(call.service.metrics.page(), media_type="text/plain; version=0.0.4")


async def _info(call: RouteCall) -> Response:
    service, policy = call.service, call.service.policy
    engine, bounds = service.engine, service.bounds
    return JSONResponse(
        {
            "model_id": policy.names[0],
            "model_sha": policy.revision,
            "model_pipeline_tag": "text-generation",
            "model_dtype": str(engine.model.dtype).removeprefix("torch."),
            "model_device_type": engine.model.device.type,
            "max_concurrent_requests": policy.max_concurrent_requests,
            "max_best_of": bounds.max_best_of,
            "max_stop_sequences": bounds.max_stop_sequences,
            "max_input_tokens": bounds.max_input_tokens,
            "max_total_tokens": bounds.max_total_tokens,
            "max_batch_total_tokens": engine.scheduler.capacity(),
            "max_top_n_tokens": bounds.max_top_n_tokens,
            "validation_workers": policy.workers,
            "max_client_batch_size": bounds.max_client_batch_size,
            "router": "llama2",
            "version": llama2.__version__,
            "sha": None,
            "docker_label": None,
            "adapters": service.model.adapters,
            "chat": service.tokenizer.chat_template is not None,
        }
    )


async def _version(call: RouteCall) -> Response:
    return JSONResponse({"version": llama2.__version__})


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


async def _models(call: RouteCall) -> Response:
    service = call.service
    names = (*service.policy.names, *service.model.adapters)
    return JSONResponse({"object": "list", "data": [_card(service, name) for name in names]})


async def _model(call: RouteCall) -> Response:
    service, name = call.service, call.request.path_params["id"]
    service.model.adapter(name)
    return JSONResponse(_card(service, name))


def _documentation(document: dict[str, Any]) -> str:
    rows = []
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            schema = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            fields = ", ".join(f"<code>{escape(name)}</code>" for name in schema.get("properties", {}))
            told = escape(route["summary"]) + (f"<br><small>{fields}</small>" if fields else "")
            rows.append(f"<tr><td>{method.upper()}</td><td><code>{escape(path)}</code></td><td>{told}</td></tr>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>llama2</title><h1>llama2</h1>"
        f"<p>For machines: <a href=openapi.json>openapi.json</a></p><table>{''.join(rows)}</table></html>"
    )
