"""`/v1/contexts`: documents that are encoded once, and kept as long as their client says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from star_attention.errors import quote
from star_attention.hf.text.tool_reader import given_twice
from star_attention.serve.contexts.entry import ContextView, Status
from star_attention.serve.contexts.store import UNCHANGED
from star_attention.serve.http.body import (
    Body,
    is_id,
    parsed,
    read_object,
    whole_number,
    wrong_type,
)
from star_attention.serve.http.events import DONE, EventStream, ObjectResponse, event, unless_left
from star_attention.serve.http.fields import MOST_TTL_S, read_template_kwargs, refuse_fields
from star_attention.serve.http.problems import about, bad_request, of_error
from star_attention.serve.http.tools import read_tools, reader_of
from star_attention.serve.http.uploads import is_form, read_upload
from star_attention.serve.prompts import Prompts
from star_attention.serve.reading import Source
from star_attention.serve.refusals import RefusalError
from star_attention.serve.service import Service
from star_attention.serve.texts import text_of

_LOOK_S = 0.05
"""Seconds between two looks at a context that is being encoded."""
_UNDER_WAY = (Status.QUEUED, Status.ENCODING)
_FORM_NUMBERS = ("ttl",)
_FORM_FLAGS = ("pin",)
_FORM_JSON = ("tools", "chat_template_kwargs")
_CHOICES = ("tool_choice", "parallel_tool_calls")

_KEPT = "a context that goes on keeps what it was made with; leave it out"
_ASKED = "requests on the context say what they call; leave it out"


class ContextRoutes:
    """The routes of contexts."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._prompts = Prompts(service)

    async def create(self, request: Request) -> Response:
        """Keep a document: from text, messages, token ids, or a file."""
        limit = self._service.settings.max_body
        with self._service.visit(request):
            if is_form(request):
                upload = await read_upload(request, limit, self._service.documents)
                body, file = _form(upload.fields), upload.text
                body.fields.setdefault("name", upload.name)
            else:
                body, file = await read_object(request, limit), None
            source = self._source(body, request.state.tenant, file)
            return await self._create(request, body, source)

    async def extend(self, request: Request) -> Response:
        """Keep a new context that continues another one, which stays as it is."""
        with self._service.visit(request):
            body = await read_object(request, self._service.settings.max_body)
            refuse_fields(body, dict.fromkeys((*_FORM_JSON, *_CHOICES), _KEPT))
            text = body.text("text")
            if not text:
                raise wrong_type("text", text, "a text that is not empty")
            old = self._service.store.content(*_named(request))
            return await self._create(request, body, Source(text=text, after=old))

    async def _create(self, request: Request, body: Body, source: Source) -> Response:
        service = self._service
        refuse_fields(body, {"pinned": "give pin"})
        service.check_queue(request.state.tenant)
        salt = body.text("cache_salt", "", most=1024) or ""
        ttl, pin = _ttl(body, None), body.flag("pin")
        name, waits = body.text("name", most=200), _waits(request)
        _ignore(service, body)
        with about(source.param):
            wanted = await self._prompts.of_document(request.state.tenant, salt, source, ttl)
        view, is_new = service.store.create(wanted, name=name, pin=pin)
        if "text/event-stream" in request.headers.get("accept", ""):
            headers = {"x-star-context": view.id}
            return EventStream(self._events(request, view.id), headers, on_end=lambda: None)
        if waits:
            view = await unless_left(request.receive, self._ended(request, view.id))
        status = 202 if view.status in _UNDER_WAY else 201 if is_new else 200
        return ObjectResponse(view.as_dict(), status_code=status)

    def _source(self, body: Body, tenant: str, file: str | None) -> Source:
        """Return what a context is made of: exactly one of four fields, or the text of a file."""
        names = ("text", "messages", "token_ids", "file_id")
        fields: dict[str, Any] = {name: body.take(name) for name in names} | {"file": file}
        given = [name for name, value in fields.items() if value is not None]
        if len(given) != 1:
            raise bad_request(
                f"the body has {', '.join(given) or 'no document'}; give exactly one of text,"
                " messages, token_ids and file_id, or upload a file",
                given[-1] if given else "text",
            )
        (name,) = given
        value: Any = fields[name]
        kwargs = self._template_kwargs(body)
        self._check_read(name, kwargs)
        is_list = name in ("messages", "token_ids")
        if is_list and not isinstance(value, list):
            raise wrong_type(name, value, "a list")
        if name == "token_ids" and not all(map(is_id, value)):
            raise wrong_type(name, value, "a list of integers")
        if not is_list and not isinstance(value, str):
            raise wrong_type(name, value, "a string")
        if name == "file_id":
            value = self._service.files.get(tenant, value).text
        made: dict[str, Any] = {"text" if name in ("file", "file_id") else name: value}
        return Source(**made, template_kwargs=kwargs)

    def _check_read(self, name: str, kwargs: dict[str, Any]) -> None:
        """Refuse what a chat template reads beside messages where none is rendered."""
        if name == "token_ids":
            why = "no chat template reads them; leave them out, or give messages"
        elif name != "messages" and not getattr(
            self._service.star.tokenizer, "chat_template", None
        ):
            why = "this model has no chat template; leave them out"
        else:
            return
        if kwargs:
            raise bad_request(
                f"{quote(list(kwargs))} have no effect on {name}: {why}", next(iter(kwargs))
            )

    def _template_kwargs(self, body: Body) -> dict[str, Any]:
        """Return what the chat template reads beside messages, with the tools of the context.

        They have the form that requests on it give them.
        """
        refuse_fields(body, dict.fromkeys(_CHOICES, _ASKED))
        kwargs, tools = read_template_kwargs(body), read_tools(body)
        if tools is None:
            return kwargs
        if "tools" in kwargs:
            raise bad_request(given_twice("as tools and in chat_template_kwargs"), "tools")
        reader_of(tools, self._service.star.tokenizer, "tools")
        return {**kwargs, "tools": tools.given}

    async def _ended(self, request: Request, id: str) -> ContextView:
        """Return a context once it is there, or has failed.

        Raises:
            RefusalError: somebody has deleted it.
        """
        while True:
            view = self._made(request, id)
            if view.status not in _UNDER_WAY or not self._service.engine.alive:
                return view
            await asyncio.sleep(_LOOK_S)

    def _made(self, request: Request, id: str) -> ContextView:
        """Return a context that a request waits for."""
        try:
            return self._service.store.get(request.state.tenant, id)
        except RefusalError:
            raise RefusalError(
                f"the context {id} was deleted before it was there; create it again",
                code="context_deleted",
                status=409,
            ) from None

    async def _events(self, request: Request, id: str) -> AsyncIterator[bytes]:
        """Yield a context whenever it has changed, until it is there or has failed."""
        last: ContextView | None = None
        while True:
            try:
                view = self._made(request, id)
            except RefusalError as error:
                if last is None:
                    raise
                yield event(of_error(error, request_id="").envelope)
                break
            if view != last:
                yield event(view.as_dict())
                last = view
            if view.status not in _UNDER_WAY or not self._service.engine.alive:
                break
            await asyncio.sleep(_LOOK_S)
        yield DONE

    async def list(self, request: Request) -> Response:
        """List the tenant's contexts, the newest first; `after` and `limit` turn pages."""
        views = self._service.store.list(request.state.tenant)
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise bad_request(f"order: expected asc or desc, got {quote(order)}", "order")
        if order == "asc":
            views = views[::-1]
        limit = whole_number(query.get("limit", "100")) or 0
        if not 1 <= limit <= 1000:
            wanted = quote(query["limit"])
            raise bad_request(f"limit: expected 1 to 1000, got {wanted}", "limit")
        after = query.get("after")
        if after is not None:
            ids = [view.id for view in views]
            if after not in ids:
                raise bad_request(
                    f"after: expected a context of this list, got {quote(after)}", "after"
                )
            views = views[ids.index(after) + 1 :]
        page = [view.as_dict() for view in views[:limit]]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        more = len(views) > len(page)
        return ObjectResponse({"object": "list", "data": page, "has_more": more, **ends})

    async def get(self, request: Request) -> Response:
        """Describe a context."""
        return ObjectResponse(self._service.store.get(*_named(request)).as_dict())

    async def text(self, request: Request) -> Response:
        """Return the text of a context, which places of sources are characters of."""
        content = self._service.store.content(*_named(request))
        size = len(content.text or "") or len(content)
        chats = self._service.chats
        text = await self._service.lanes.run(size, lambda star: text_of(chats, star, content))
        return PlainTextResponse(text, headers={"x-content-type-options": "nosniff"})

    async def update(self, request: Request) -> Response:
        """Change how long a context is kept, or its name."""
        body = await read_object(request, self._service.settings.max_body)
        # Null is a value here: no limit, and no name.
        changes: dict[str, Any] = {
            "ttl": None if "ttl" in body.nulls else _ttl(body, UNCHANGED),
            "pin": body.flag("pin") if "pin" in body.fields else UNCHANGED,
            "name": body.text("name", UNCHANGED, most=200) if "name" not in body.nulls else None,
        }
        if body.fields:
            field = next(iter(body.fields))[:80]
            raise bad_request(f"{field} cannot be changed; give ttl, pin or name", field)
        view = self._service.store.update(*_named(request), **changes)
        return ObjectResponse(view.as_dict())

    async def delete(self, request: Request) -> Response:
        """Drop a context; one in use, after its last user."""
        tenant, id = _named(request)
        self._service.store.delete(tenant, id)
        return ObjectResponse({"id": id, "object": "context.deleted", "deleted": True})


def _named(request: Request) -> tuple[str, str]:
    return request.state.tenant, request.path_params["id"]


def _waits(request: Request) -> bool:
    return request.query_params.get("wait", "false").lower() in ("true", "1")


def _ttl(body: Body, default: Any) -> Any:
    """Return the seconds that a context is kept without use."""
    given = body.fields.get("ttl")
    if isinstance(given, str):
        # Marks of chats take such as 1h.
        raise wrong_type("ttl", given, "a number of seconds")
    seconds = body.number("ttl", least=1, most=MOST_TTL_S)
    return default if seconds is None else float(seconds)


def _ignore(service: Service, body: Body) -> None:
    for _ in body.fields:
        service.metrics.ignored.labels("other").inc()


def _form(fields: dict[str, str]) -> Body:
    """Return the fields of a form, numbers and flags as such, and JSON as what it is."""
    values: dict[str, Any] = dict(fields)
    for name in (*_FORM_NUMBERS, *_FORM_FLAGS):
        if name in values:
            try:
                values[name] = json.loads(values[name].lower())
            except (ValueError, RecursionError):
                expected = "a number of seconds" if name in _FORM_NUMBERS else "true or false"
                raise wrong_type(name, values[name], expected) from None
    for name in _FORM_JSON:
        if name in values:
            values[name] = parsed(values[name].encode(), name)
    return Body(values)
