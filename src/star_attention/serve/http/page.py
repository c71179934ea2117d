"""The page at `/`: a few files of this package, which load nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

_FOLDER = resources.files("star_attention.serve") / "page"
_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_FILES = {
    "/": "index.html",
    **{
        f"/page/{name}": name
        for name in (
            "api.js",
            "app.js",
            "documents.js",
            "dom.js",
            "icon.svg",
            "markdown.js",
            "parts.css",
            "reader.js",
            "requests.js",
            "style.css",
            "talk.js",
        )
    },
}
PATHS = frozenset(_FILES)
"""Paths of the page. They hold nothing of a client's, and need no key."""

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Texts of documents cannot become elements by mistake.
        "require-trusted-types-for 'script'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Or a page of an earlier version would meet a server of a later one.
    "cache-control": "no-cache",
}


class PageRoutes:
    """`/`, and the files that its page consists of."""

    def __init__(self) -> None:
        self._files = {path: (_FOLDER / name).read_bytes() for path, name in _FILES.items()}

    async def file(self, request: Request) -> Response:
        """Return one of the files."""
        path = request.scope["path"]
        kind = _TYPES[_FILES[path].rpartition(".")[2]]
        return Response(self._files[path], headers={"content-type": kind, **_HEADERS})
