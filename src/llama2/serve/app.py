"""The application: one row for each API that is spoken, the chat page, and the document of all routes."""

from html import escape
from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

import llama2
from llama2.serve import (
    anthropic,
    embeddings,
    llamacpp,
    models,
    ollama,
    openai_chat,
    openai_completions,
    openai_responses,
    sagemaker,
    state,
    static,
    tgi,
    tokenization,
    vllm,
)
from llama2.serve.dialect import Dialect, Route, get
from llama2.serve.endpoint import endpoint
from llama2.serve.envelope import Envelope
from llama2.serve.errors import Refusal
from llama2.serve.service import RouteCall, Service

DIALECTS: tuple[Dialect, ...] = (
    openai_chat.DIALECT,
    openai_completions.DIALECT,
    openai_responses.DIALECT,
    embeddings.DIALECT,
    models.DIALECT,
    anthropic.DIALECT,
    ollama.DIALECT,
    llamacpp.DIALECT,
    vllm.DIALECT,
    tokenization.DIALECT,
    tgi.DIALECT,
    sagemaker.DIALECT,
    state.DIALECT,
)


def dialect_at(path: str) -> Dialect:
    """Returns the dialect of a path's errors: that of its route, else of the longest prefix."""
    for dialect in DIALECTS:
        if any(route.path == path for route in dialect.routes):
            return dialect
    fits = ((len(prefix), dialect) for dialect in DIALECTS for prefix in dialect.prefixes if path.startswith(prefix))
    return max(fits, key=lambda row: row[0], default=(0, tgi.DIALECT))[1]


def make_app(service: Service) -> FastAPI:
    """The application over a service, whose model may come later."""
    app = FastAPI(title="llama2", version=llama2.__version__, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.service = service
    for dialect in DIALECTS:
        for route in dialect.routes:
            _add(app, service, dialect, route)
    _document_routes(app, service)
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
        allow_methods=["GET", "POST", "DELETE", "OPTIONS"],
        allow_headers=["*"],
        expose_headers=["x-request-id", "request-id", "retry-after", "x-generated-tokens", "x-time-per-token"],
    )
    app.add_middleware(Envelope, service=service, dialect_at=dialect_at)
    return app


def _add(app: FastAPI, service: Service, dialect: Dialect, route: Route) -> None:
    handler = endpoint(service, dialect, route)
    more: dict[str, Any] = {}
    if route.body is not None:
        schema = _inline(route.body.model_json_schema(ref_template="#/components/schemas/{model}"))
        more["requestBody"] = {"content": {"application/json": {"schema": schema}}, "required": True}
    app.add_api_route(
        route.path,
        handler,
        methods=[route.method],
        summary=route.summary,
        response_class=Response if route.method == "GET" else JSONResponse,
        openapi_extra=more,
    )
    if route.method == "GET":
        app.router.add_route(route.path, handler, methods=["HEAD"], include_in_schema=False)


def _document_routes(app: FastAPI, service: Service) -> None:
    async def document(call: RouteCall) -> Response:
        return JSONResponse(app.openapi())

    async def documentation(call: RouteCall) -> Response:
        return HTMLResponse(_documentation(app.openapi()), headers={"content-security-policy": "default-src 'none'"})

    for route in (
        get("/openapi.json", document, "this API, for machines", "open"),
        get("/docs", documentation, "this API, for people", "open"),
    ):
        _add(app, service, state.DIALECT, route)


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


def _unknown(request: Request, kind: str, message: str) -> Response:
    path, id = request.scope["path"], request.scope["state"].get("id", "")
    return dialect_at(path).refuse(Refusal(kind, message), id)


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
