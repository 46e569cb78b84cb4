"""The interface of an HTTP API: its routes, and its error bodies.

Adding an API is one file that ends in a `Dialect`, and its row in `app.DIALECTS`. Its handlers turn a body into a
`GenerationRequest`, and its writer (`sse.Writer`) turns the engine's events into bytes. Keys, quotas, bounds, the
drain, metrics and the log are the same for every route: `endpoint.py`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from starlette.responses import JSONResponse, Response

from llama2.serve.errors import KINDS, Refusal
from llama2.serve.validation import Body

if TYPE_CHECKING:
    from llama2.serve.service import RouteCall

Handler = Callable[["RouteCall"], Awaitable[Response]]
Access = Literal["key", "open", "metrics"]


@dataclass(frozen=True)
class Route:
    """One path and method.

    body: documents what a POST takes. counted: the route generates text, so that its calls count as requests and a
    drain waits for them. access: the keys that open it: the server's, none, or those of /metrics. any_type: a body that
    does not say it is JSON is read as JSON, unless a web page of another origin sends it.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: Handler
    summary: str
    body: type[Body] | None = None
    counted: bool = False
    access: Access = "key"
    any_type: bool = False


def get(path: str, handler: Handler, summary: str, access: Access = "key") -> Route:
    """A route without a body; HEAD works where GET does."""
    return Route("GET", path, handler, summary, access=access)


def post(
    path: str, handler: Handler, body: type[Body] | None, summary: str, counted: bool = False, any_type: bool = False
) -> Route:
    """A route with a JSON body."""
    return Route("POST", path, handler, summary, body, counted, any_type=any_type)


class Dialect(Protocol):
    """One HTTP API. prefixes: paths below which it tells that there is no such route."""

    name: str
    prefixes: tuple[str, ...]
    routes: tuple[Route, ...]

    def error(self, refusal: Refusal, id: str = "") -> dict[str, Any]:
        """The body that tells a refusal; id: the request's."""

    def status(self, refusal: Refusal) -> int:
        """The HTTP status of a refusal."""
        return KINDS[refusal.kind].status

    def refuse(self, refusal: Refusal, id: str = "") -> JSONResponse:
        """A refusal as a response."""
        return JSONResponse(self.error(refusal, id), self.status(refusal), refusal.headers())
