"""Where a request comes from: the names that this server answers to, and web pages of other origins.

A page anywhere can make a browser send requests to a server on the user's own machine. Its own name for that machine
betrays it where it rebinds its DNS name to 127.0.0.1; and what it sends without asking first is no JSON.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from llama2.serve.errors import Refusal

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def allowed_hosts(hosts: Sequence[str], host: str) -> tuple[str, ...]:
    """The names that are answered to; () for any. hosts: from the options; host: what the server listens on."""
    if "*" in hosts:
        return ()
    names = tuple(name.lower().rstrip(".") for name in hosts)
    if host in ("127.0.0.1", "localhost", "::1"):
        return (*names, *LOOPBACK)
    return names


def check_host(header: str | None, allowed: Sequence[str]) -> None:
    """Raises Refusal for a Host header that is not among the allowed; without a list any will do."""
    if not allowed:
        return
    name = (header or "").lower()
    if ":" in name and not name.endswith("]"):
        name = name.rpartition(":")[0]
    if name.rstrip(".") not in allowed:
        raise Refusal(
            "host", f"this server does not answer to the name {name[:100]!r}; --allowed-hosts adds names to its own"
        )


def check_kind(headers: Any, origins: Sequence[str], any_type: bool = False) -> None:
    """Raises Refusal for a body that is not JSON, or does not say so and comes from a web page of another origin.

    any_type: whatever else the body says it is passes for JSON where no other origin sends it, as curl's -d does.
    """
    given = headers.get("content-type")
    kind = (given or "").partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        return
    if (given is None or any_type) and _foreign(headers, origins):
        raise Refusal("media", "a request of another origin must say that its body is application/json")
    if given is not None and not any_type:
        raise Refusal("media", f"the body is {kind[:80]!r}; send it as application/json")


def _foreign(headers: Any, origins: Sequence[str]) -> bool:
    origin = headers.get("origin")
    if origin is None:
        return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
    if origin in origins or "*" in origins:
        return False
    try:
        own: str = urlsplit(origin).netloc
    except ValueError:
        return True
    return own.lower() != (headers.get("host") or "").lower()
