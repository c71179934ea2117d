"""The app: which path leads where."""

from __future__ import annotations

from typing import Any

from starlette.routing import Route, Router

from star_attention.serve.http.ask_routes import AskRoutes
from star_attention.serve.http.context_routes import ContextRoutes
from star_attention.serve.http.file_routes import FileRoutes
from star_attention.serve.http.guard import Guard
from star_attention.serve.http.messages.routes import MessageRoutes
from star_attention.serve.http.page import PATHS, PageRoutes
from star_attention.serve.http.responses.routes import ResponseRoutes
from star_attention.serve.http.state import StateRoutes
from star_attention.serve.keys import Keys
from star_attention.serve.service import Service


def make_app(service: Service, keys: Keys | None) -> Guard:
    """Return the ASGI app of a server.

    Args:
        service: its state.
        keys: its keys; None to serve everybody.
    """
    service.is_shared = keys is not None and len(keys.tenants) > 1
    asks, state = AskRoutes(service), StateRoutes(service)
    contexts, files = ContextRoutes(service), FileRoutes(service)
    messages, responses = MessageRoutes(service), ResponseRoutes(service)
    table: list[tuple[str, str, Any]] = [
        ("GET", "/health", state.health),
        ("GET", "/ready", state.ready),
        ("GET", "/version", state.version),
        ("GET", "/metrics", state.metrics),
        ("GET", "/v1/models", state.models),
        ("GET", "/v1/models/{name:path}", state.model),
        ("POST", "/v1/chat/completions", asks.chat),
        ("POST", "/v1/chat/completions/input_tokens", asks.count),
        ("POST", "/v1/completions", asks.complete),
        ("POST", "/v1/messages", messages.create),
        ("POST", "/v1/messages/count_tokens", messages.count),
        ("POST", "/v1/responses", responses.create),
        ("POST", "/v1/responses/input_tokens", responses.count),
        ("GET", "/v1/responses/{id}", responses.get),
        ("DELETE", "/v1/responses/{id}", responses.delete),
        ("POST", "/v1/responses/{id}/cancel", responses.cancel),
        ("POST", "/v1/contexts", contexts.create),
        ("GET", "/v1/contexts", contexts.list),
        ("GET", "/v1/contexts/{id}", contexts.get),
        ("POST", "/v1/contexts/{id}", contexts.update),
        ("DELETE", "/v1/contexts/{id}", contexts.delete),
        ("POST", "/v1/contexts/{id}/extend", contexts.extend),
        ("GET", "/v1/contexts/{id}/text", contexts.text),
        ("POST", "/v1/files", files.create),
        ("GET", "/v1/files", files.list),
        ("GET", "/v1/files/{id}", files.get),
        ("GET", "/v1/files/{id}/content", files.content),
        ("DELETE", "/v1/files/{id}", files.delete),
    ]
    page = PageRoutes()
    table += [("GET", path, page.file) for path in sorted(PATHS)]
    router = Router([_route(path, table) for path in dict.fromkeys(path for _, path, _ in table)])
    router.redirect_slashes = False

    def on_error(code: str) -> None:
        service.metrics.errors.labels(code).inc()

    return Guard(router, service.settings, keys, on_error)


def _route(path: str, table: list[tuple[str, str, Any]]) -> Route:
    """Return the route of a path, with all its methods."""
    endpoints = {method: endpoint for method, own, endpoint in table if own == path}

    async def endpoint(request: Any) -> Any:
        method = "GET" if request.method == "HEAD" else request.method
        return await endpoints[method](request)

    return Route(path, endpoint, methods=list(endpoints))
