"""The page: files that are served as they are, to anybody, since they say nothing of runs."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from .problems import HttpProblem

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: Only its own scripts and styles run, nothing is loaded from elsewhere, no other page holds it
#: in a frame, and text is never taken for HTML.
POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "img", "connect")),
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


class PageFiles:
    """Read once."""

    def __init__(self) -> None:
        self._by_path: dict[str, Response] = {}
        for file in files(__package__).joinpath("page").iterdir():
            kind = TYPES.get(f".{file.name.rpartition('.')[2]}")
            if kind is not None:
                path = "/" if file.name == "index.html" else f"/page/{file.name}"
                headers = {**HEADERS, "content-type": kind}
                self._by_path[path] = Response(file.read_bytes(), headers=headers)

    def find(self, request: Request) -> Response | None:
        """The answer to a request for one of them. Raises HttpProblem."""
        found = self._by_path.get(request.scope["path"])
        if found is not None and request.method not in ("GET", "HEAD"):
            raise HttpProblem(405, "bad-request", "allowed here: GET, HEAD", {"allow": "GET, HEAD"})
        return found
