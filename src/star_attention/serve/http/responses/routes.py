"""`/v1/responses` and what belongs to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from star_attention.errors import quote
from star_attention.hf.text.template import reads
from star_attention.serve.http.answering import Answering
from star_attention.serve.http.asking import Asked, Asking
from star_attention.serve.http.body import Body
from star_attention.serve.http.events import ObjectResponse
from star_attention.serve.http.problems import Problem, bad_request
from star_attention.serve.http.responses.kept import KeptResponse
from star_attention.serve.http.responses.reading import Wanted, read_request
from star_attention.serve.http.responses.writing import CANCELLED, ResponseShape
from star_attention.serve.http.tools import Answer
from star_attention.serve.service import Service


class ResponseRoutes:
    """The routes of responses."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asking = Asking(service)
        self._kept = service.responses

    async def create(self, request: Request) -> Response:
        """Answer `/v1/responses`."""
        tenant = request.state.tenant

        async def read(body: Body) -> Asked:
            wanted = self._read(tenant, body)
            messages = self._messages(tenant, wanted)
            ask = self._asking.read(wanted.fields)
            prompt = wanted.instructions + messages
            plan = await self._asking.prompts.of_chat(tenant, prompt, ask)
            shape = ResponseShape(self._service.name, wanted.echo)
            if not wanted.keeps or not self._service.settings.max_responses:
                shape.response["store"] = False
                return Asked(ask=ask, plans=[plan], shape=shape)
            begin = self._keeping(tenant, shape, messages, ask.context)
            return Asked(ask=ask, plans=[plan], shape=shape, begin=begin)

        return await self._asking.answer(request, read)

    async def count(self, request: Request) -> Response:
        """Answer `/v1/responses/input_tokens`."""
        tenant = request.state.tenant

        def read(body: Body) -> tuple[list[Any], Body]:
            wanted = self._read(tenant, body)
            return wanted.instructions + self._messages(tenant, wanted), wanted.fields

        plan, _ = await self._asking.count(request, read)
        return ObjectResponse(
            {"object": "response.input_tokens", "input_tokens": plan.prompt_tokens}
        )

    async def get(self, request: Request) -> Response:
        """Return a response."""
        return ObjectResponse(self._kept.get(*_named(request)).response)

    async def delete(self, request: Request) -> Response:
        """Drop a response."""
        tenant, id = _named(request)
        self._kept.delete(tenant, id)
        return ObjectResponse({"id": id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """Stop a response that another connection waits for."""
        tenant, id = _named(request)
        kept = self._kept.get(tenant, id)
        if kept.answering is None:
            raise bad_request(
                f"the response {quote(id)} has ended, its status is {kept.response['status']};"
                " only one in progress can be canceled"
            )
        kept.answering.stop(Problem(409, "the response was canceled", code=CANCELLED))
        kept.response["status"] = "cancelled"
        return ObjectResponse(kept.response)

    def _read(self, tenant: str, body: Body) -> Wanted:
        tokenizer = self._service.star.tokenizer
        return read_request(
            body,
            lambda name: reads(tokenizer, name),
            lambda id: self._kept.item(tenant, id),
        )

    def _messages(self, tenant: str, wanted: Wanted) -> list[Any]:
        """Return the conversation of a request, which may be about an earlier one's context."""
        if wanted.previous is None:
            return wanted.messages
        previous = self._kept.conversation(tenant, wanted.previous)
        if previous.context is not None:
            wanted.fields.fields.setdefault("context", previous.context)
        return previous.messages + wanted.messages

    def _keeping(
        self, tenant: str, shape: ResponseShape, messages: list[Any], context: str | None
    ) -> Callable[[Answering], Callable[[], None]]:
        """Return what keeps a response from its beginning on."""

        def begin(answering: Answering) -> Callable[[], None]:
            kept = KeptResponse(
                tenant=tenant,
                response=shape.response,
                messages=messages,
                context=context,
                answering=answering,
            )

            def end(answer: Answer | None) -> None:
                kept.answering = None
                if answer is not None:
                    kept.messages = [*messages, answer.message]

            def leave() -> None:
                if kept.answering is not None:
                    # The client has left, or there was an error.
                    kept.answering = None
                    kept.response["status"] = "cancelled"

            shape.on_end = end
            self._kept.add(kept)
            return leave

        return begin


def _named(request: Request) -> tuple[str, str]:
    return request.state.tenant, request.path_params["id"]
