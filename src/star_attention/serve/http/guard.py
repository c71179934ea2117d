"""What every request passes before its route: who it is from, and what becomes of its errors."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote as percent
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Router

from star_attention.errors import quote
from star_attention.serve.http.events import ClientLeftError, encoded
from star_attention.serve.http.objects import new_id
from star_attention.serve.http.page import PATHS
from star_attention.serve.http.problems import Problem, anthropic_envelope, of_error
from star_attention.serve.keys import OPEN, Keys
from star_attention.serve.logs import log_failure
from star_attention.serve.settings import ServeSettings, is_loopback

_log = logging.getLogger(__name__)

_TOLD = {b"x-star-rule": "rule", b"x-star-cache": "cache"}
"""Headers of answers that are logged, and their names there."""
_MOST_PATH = 200
"""Characters of a path in the log."""
_POLLED = ("/health", "/ready", "/metrics")

PUBLIC = PATHS | {"/health", "/ready"}
"""Paths that need no key."""
_VERSION = "/v1"
"""What the paths of all protocols begin with, and OpenAI's base URL ends with."""
_ANTHROPIC = "/v1/messages"
"""The beginning of paths whose errors have Anthropic's form."""


class Guard:
    """The outermost layer of the app: keys, request ids, envelopes of errors, a line in the log.

    The log has no prompts, no keys and no query strings.

    Args:
        app: the app.
        settings: the server's.
        keys: its keys; None to serve everybody.
        on_error: called with the code of each error.
    """

    def __init__(
        self,
        app: Router,
        settings: ServeSettings,
        keys: Keys | None,
        on_error: Callable[[str], None],
    ) -> None:
        self._app, self._settings, self._keys, self._on_error = app, settings, keys, on_error
        self._public = PUBLIC | ({"/metrics"} if settings.public_metrics else set())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, started, status = new_id("req_"), time.monotonic(), 0
        told: dict[str, str] = {}

        async def named(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in message["headers"]:
                    if name in _TOLD:
                        told[_TOLD[name]] = value.decode()
                own = [(name, request_id.encode()) for name in names]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        is_anthropic = scope["path"].startswith(_ANTHROPIC)
        names = [b"x-request-id", *([b"request-id"] if is_anthropic else [])]
        scope.setdefault("state", {})["request_id"] = request_id
        # The router raises for a path that there is not, instead of answering in plain text.
        scope["app"] = self
        try:
            request = Request(scope)
            _check_length_is_clear(request)
            scope["state"]["tenant"] = self._tenant(request)
            await self._app(scope, receive, named)
        except ClientLeftError:
            # For the log: nobody reads an answer.
            status = status or 499
        except Exception as error:
            problem = self._problem(error, request_id, scope)
            self._on_error(problem.code or str(problem.status))
            told["code"] = problem.code or ""
            if status:
                # An answer that has begun cannot change its status.
                log_failure(f"request {request_id}, after its answer began,", error)
            else:
                envelope = problem.envelope
                if is_anthropic:
                    envelope = anthropic_envelope(problem, request_id)
                await _send(named, problem, envelope)
        finally:
            # What is polled would hide all else.
            level = logging.DEBUG if scope["path"] in _POLLED and status < 400 else logging.INFO
            _log_request(level, scope, status, time.monotonic() - started, request_id, told)

    def _problem(self, error: Exception, request_id: str, scope: Any) -> Problem:
        if isinstance(error, HTTPException):
            return _routing(error, scope, self._app.routes)
        problem = of_error(error, request_id=request_id)
        if problem.status >= 500 and not isinstance(error, Problem):
            log_failure(f"request {request_id}", error)
        return problem

    def _tenant(self, request: Request) -> str:
        """Return whose request it is.

        Raises:
            Problem: 401 without a key of this server, 403 for another site's script.
        """
        if self._keys is None:
            self._check_host(request)
            return OPEN
        if request.url.path in self._public:
            return ""
        header = request.headers.get("authorization", "")
        scheme, _, token = header.partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        tenant = self._keys.tenant(key) if key else None
        if tenant is None:
            wrong = "this server does not know the API key" if key else "the API key is missing"
            if header and not key:
                wrong = "the header Authorization has no key after the word Bearer"
            raise Problem(
                401,
                f"{wrong}; send a valid one as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return tenant

    def _check_host(self, request: Request) -> None:
        """Refuse scripts of other sites, which a browser on this machine would send here."""
        if self._settings.insecure:
            return
        origin = request.headers.get("origin")
        host = request.headers.get("host", "")
        names = [host and _hostname(f"//{host}")]
        names += [] if origin is None else [_hostname(origin)]
        for name in names:
            if name and not is_loopback(name) and name not in self._settings.allowed_hosts:
                raise Problem(
                    403,
                    f"Host and Origin: expected a name of this machine, got {quote(name)}; add it"
                    " with --allowed-hosts, or give the server --keys",
                    code="host_not_allowed",
                )


def _hostname(url: str) -> str:
    """Return the name in a URL; of what is none, all of it."""
    try:
        return urlsplit(url).hostname or url
    except ValueError:
        return url


def _check_length_is_clear(request: Request) -> None:
    """Refuse a body with two lengths, of which a proxy may have read the other one."""
    if "content-length" in request.headers and "transfer-encoding" in request.headers:
        raise Problem(
            400,
            "the body has a Content-Length and a Transfer-Encoding; send one of them",
            code="invalid_value",
            headers={"connection": "close"},
        )


def _log_request(
    level: int, scope: Any, status: int, spent_s: float, request_id: str, told: dict[str, str]
) -> None:
    # Line breaks and colors of a path would write lines of their own.
    path = percent(scope["path"][:_MOST_PATH])
    told = {"request_id": request_id, **told}
    _log.log(
        level,
        "%s %s %d %.3f s %s",
        scope["method"],
        path,
        status,
        spent_s,
        " ".join(told.values()),
        extra={
            "request": {
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(spent_s, 3),
                **told,
            }
        },
    )


def _routing(error: HTTPException, scope: Any, routes: Sequence[BaseRoute]) -> Problem:
    """Return the answer for a path or a method that there is not."""
    path, headers = quote(scope["path"]), dict(error.headers or {})
    if error.status_code == 404:
        meant = _meant(scope, routes)
        hint = f"; use {meant}: change the client's base URL" if meant else ""
        return Problem(404, f"there is no path {path} on this server{hint}", code="not_found")
    if error.status_code == 405:
        message = f"{path} does not take {scope['method']}; it takes {headers.get('Allow', '')}"
        return Problem(405, message, code="method_not_allowed", headers=headers)
    return Problem(error.status_code, str(error.detail), headers=headers)


def _meant(scope: Any, routes: Sequence[BaseRoute]) -> str | None:
    """Return the path of a request whose client has a base URL without /v1, or with it twice."""
    path: str = scope["path"]
    is_twice = path.startswith(_VERSION * 2)
    other = path.removeprefix(_VERSION) if is_twice else _VERSION + path
    matches = (route.matches({**scope, "path": other})[0] for route in routes)
    return other if Match.FULL in matches else None


async def _send(send: Any, problem: Problem, envelope: dict[str, Any]) -> None:
    headers = {"content-type": "application/json", **problem.headers}
    body = encoded(envelope)
    headers["content-length"] = str(len(body))
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
