"""`/v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from star_attention.hf.text.template import reads
from star_attention.serve.http.asking import Asked, Asking
from star_attention.serve.http.body import Body
from star_attention.serve.http.events import ObjectResponse
from star_attention.serve.http.messages.reading import read_chat
from star_attention.serve.http.messages.writing import MessageShape
from star_attention.serve.service import Service

_LONG_S = 3600
"""Seconds of a mark from which on its context counts as kept for an hour."""


class MessageRoutes:
    """The routes of Anthropic's protocol."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asking = Asking(service)

    async def create(self, request: Request) -> Response:
        """Answer `/v1/messages`."""

        async def read(body: Body) -> Asked:
            messages, fields = self._chat(body)
            ask = self._asking.read(fields)
            plan = await self._asking.prompts.of_chat(request.state.tenant, messages, ask)
            ttl = None if plan.wanted is None else plan.wanted.ttl
            shape = MessageShape(self._service.name, long_lived=(ttl or 0) >= _LONG_S)
            return Asked(ask=ask, plans=[plan], shape=shape)

        return await self._asking.answer(request, read)

    async def count(self, request: Request) -> Response:
        """Answer `/v1/messages/count_tokens`."""
        plan, _ = await self._asking.count(request, self._chat)
        return ObjectResponse({"input_tokens": plan.prompt_tokens})

    def _chat(self, body: Body) -> tuple[list[Any], Body]:
        tokenizer = self._service.star.tokenizer
        return read_chat(body, lambda name: reads(tokenizer, name))
