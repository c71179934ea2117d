"""`/v1/files`: texts that clients upload once, and name in their messages."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from star_attention.errors import quote
from star_attention.serve.http.body import whole_number
from star_attention.serve.http.events import ObjectResponse
from star_attention.serve.http.fields import MOST_TTL_S
from star_attention.serve.http.problems import bad_request
from star_attention.serve.http.uploads import read_upload
from star_attention.serve.service import Service


class FileRoutes:
    """The routes of files."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        """Keep an uploaded text."""
        with self._service.visit(request):
            limit, documents = self._service.settings.max_body, self._service.documents
            upload = await read_upload(request, limit, documents)
        file = self._service.files.add(
            request.state.tenant,
            upload.name,
            upload.text,
            nbytes=upload.nbytes,
            purpose=upload.fields.get("purpose", "user_data")[:64],
            ttl=_ttl(upload.fields.get("expires_after[seconds]")),
        )
        return ObjectResponse(file.as_dict())

    async def list(self, request: Request) -> Response:
        """List the tenant's files."""
        data = [file.as_dict() for file in self._service.files.of_tenant(request.state.tenant)]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return ObjectResponse({"object": "list", "data": data, "has_more": False, **ends})

    async def get(self, request: Request) -> Response:
        """Describe a file."""
        return ObjectResponse(self._service.files.get(*_named(request)).as_dict())

    async def content(self, request: Request) -> Response:
        """Return a file's text."""
        return PlainTextResponse(self._service.files.get(*_named(request)).text)

    async def delete(self, request: Request) -> Response:
        """Drop a file."""
        tenant, id = _named(request)
        self._service.files.delete(tenant, id)
        return ObjectResponse({"id": id, "object": "file", "deleted": True})


def _named(request: Request) -> tuple[str, str]:
    return request.state.tenant, request.path_params["id"]


def _ttl(seconds: str | None) -> float | None:
    if seconds is None:
        return None
    number = whole_number(seconds) or 0
    if not 1 <= number <= MOST_TTL_S:
        raise bad_request(
            f"expires_after[seconds]: expected 1 to {MOST_TTL_S} seconds, got {quote(seconds)}",
            "expires_after",
        )
    return float(number)
