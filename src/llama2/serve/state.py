"""Routes about the server itself: whether it lives, what it serves, its metrics."""

from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

import llama2
from llama2.serve import tgi
from llama2.serve.dialect import get
from llama2.serve.facts import device_type, dtype_name
from llama2.serve.service import RouteCall


async def root(call: RouteCall) -> Response:
    """/: the chat page in a browser, and for clients of Ollama the words that they look for."""
    if "text/html" in call.request.headers.get("accept", ""):
        return RedirectResponse("ui/", headers={"vary": "accept"})  # relative: a proxy may have put a prefix before it
    if not call.service.alive():
        return await health(call)
    return PlainTextResponse("Ollama is running", headers={"vary": "accept"})


async def health(call: RouteCall) -> Response:
    """/health: 503 where the engine has stopped."""
    if call.service.alive():
        return JSONResponse({"status": "ok"})
    return JSONResponse({"error": "unhealthy", "error_type": "healthcheck"}, 503)


async def ready(call: RouteCall) -> Response:
    """/ready: 503 while the model is being loaded, and from the begin of a drain."""
    service = call.service
    if service.life.ready and service.alive():
        return Response(status_code=200)
    state = service.life.state if service.alive() else "stuck"
    return JSONResponse({"error": f"not ready: {state}", "error_type": "healthcheck"}, 503, {"retry-after": "2"})


async def metrics(call: RouteCall) -> Response:
    """/metrics, in Prometheus's text form."""
    return PlainTextResponse(call.service.metrics.page(), media_type="text/plain; version=0.0.4")


async def info(call: RouteCall) -> Response:
    """/info, with TGI's names; of several models that of the query's `model`, or one that is loaded already."""
    pool, policy = call.service.pool, call.service.policy
    server = {
        "model_sha": policy.revision,
        "max_concurrent_requests": policy.max_concurrent_requests,
        "validation_workers": policy.workers,
        "router": "llama2",
        "version": llama2.__version__,
        "sha": None,
        "docker_label": None,
    }
    if not (pool.fixed or pool.loaded or "model" in call.request.query_params):
        return JSONResponse({"model_id": None, **server})
    model = await call.shown()
    engine, bounds = model.engine, model.bounds
    return JSONResponse(
        {
            "model_id": model.names[0],
            "model_pipeline_tag": "text-generation",
            "model_dtype": dtype_name(model),
            "model_device_type": device_type(model),
            "max_best_of": bounds.max_best_of,
            "max_stop_sequences": bounds.max_stop_sequences,
            "max_input_tokens": bounds.max_input_tokens,
            "max_total_tokens": bounds.max_total_tokens,
            "max_batch_total_tokens": engine.scheduler.capacity(),
            "max_top_n_tokens": bounds.max_top_n_tokens,
            "max_client_batch_size": bounds.max_client_batch_size,
            "adapters": model.adapters,
            "chat": model.tokenizer.chat_template is not None,
            **server,
        }
    )


async def version(call: RouteCall) -> Response:
    """/version."""
    return JSONResponse({"version": llama2.__version__})


DIALECT = tgi.TGI(
    "state",
    get("/", root, "the chat page, or whether the process works", "open"),
    *(get(path, health, "whether the process works", "open") for path in ("/health", "/v1/health")),
    get("/ready", ready, "whether requests should be sent here", "open"),
    get("/metrics", metrics, "Prometheus metrics", "metrics"),
    get("/info", info, "the model and the bounds"),
    get("/version", version, "the version of this package"),
)
