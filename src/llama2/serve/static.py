"""The chat page at /ui: the files of web/ and the headers that are theirs alone. Standard library only."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Own table: the platform's own may call a .js file text/plain, and then no browser runs it as a module.
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing but this server's own files runs, and nothing but this server is spoken to.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cache-Control": "no-cache",  # asked for again, answered 304 by its tag: an upgrade shows at once
}


@dataclass(frozen=True)
class Asset:
    """One file of the page: its bytes, and every header of its answer but the length."""

    body: bytes
    headers: dict[str, str]

    def fresh(self, if_none_match: str | None) -> bool:
        """Whether the client's copy is this one (its If-None-Match header): 304 instead of the body."""
        tags = (if_none_match or "").split(",")
        return any(tag.strip().removeprefix("W/") == self.headers["ETag"] for tag in tags)


@cache
def assets() -> dict[str, Asset]:
    """Every file of the page by its name below /ui/: what is not here does not exist, whatever a path looks like."""
    folder = Path(__file__).parent / "web"
    return {file.name: read(file) for file in sorted(folder.iterdir()) if file.suffix in TYPES}


def read(file: Path) -> Asset:
    body = file.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    return Asset(body, {**HEADERS, "Content-Type": TYPES[file.suffix], "ETag": tag})


def asset(path: str) -> Asset | None:
    """The file at `path` below /ui/ (the empty path is the page itself), or None. /ui must redirect to /ui/: its
    addresses are relative, so that a proxy may serve it below a prefix.
    """
    return assets().get(path or "index.html")
