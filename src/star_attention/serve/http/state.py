"""Whether a server lives, is ready, and what it is."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from star_attention._version import __version__
from star_attention.errors import quote
from star_attention.serve.http.events import ObjectResponse
from star_attention.serve.http.problems import Problem, unavailable
from star_attention.serve.service import Service


class StateRoutes:
    """`/health`, `/ready`, `/version`, `/metrics` and `/v1/models`."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        """Answer 200 unless the engine has ended or hangs."""
        engine, limit = self._service.engine, self._service.settings.engine_stall
        if not engine.alive:
            raise unavailable("the engine has ended; restart the server", "engine_ended")
        age = time.monotonic() - engine.beat
        if age > limit:
            raise unavailable(
                f"the engine has taken no step for {age:.0f} seconds, more than {limit:g}; restart"
                " the server",
                "engine_hangs",
            )
        return ObjectResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Answer 200 if requests are taken."""
        if self._service.draining:
            raise unavailable("the server is shutting down", "shutting_down")
        if not self._service.engine.is_warm and self._service.engine.alive:
            raise unavailable("the server is warming up; ask again in a moment", "warming_up")
        return await self.health(request)

    async def version(self, request: Request) -> Response:
        """Answer with the version."""
        return ObjectResponse({"version": __version__})

    async def metrics(self, request: Request) -> Response:
        """Answer with the metrics in Prometheus' format."""
        return Response(
            self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def models(self, request: Request) -> Response:
        """List the model, as clients of OpenAI's and of Anthropic's protocol read it."""
        name = self._service.name
        page = {"has_more": False, "first_id": name, "last_id": name}
        return ObjectResponse({"object": "list", "data": [self._model()], **page})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        check_model(self._service, request.path_params["name"])
        return ObjectResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        limit = service.star.runtime.positions.limit
        created_at = datetime.fromtimestamp(service.created, UTC)
        return {
            "id": service.name,
            "object": "model",
            "type": "model",
            "display_name": service.name,
            "created": service.created,
            "created_at": created_at.isoformat().replace("+00:00", "Z"),
            "owned_by": "star-attention",
            "max_model_len": limit,
            "context_length": limit,
        }


def check_model(service: Service, name: str | None) -> None:
    """Raise a 404 for another model than the one that is served."""
    if name is not None and name != service.name:
        raise Problem(
            404,
            f"there is no model {quote(name)} here; this server has {quote(service.name)}",
            code="model_not_found",
            param="model",
        )
