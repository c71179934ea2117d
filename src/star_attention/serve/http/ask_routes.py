"""`/v1/chat/completions` and `/v1/completions`: from a body to answers."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from star_attention.serve.http.asking import Asked, Asking
from star_attention.serve.http.body import Body, is_id, missing, wrong_type
from star_attention.serve.http.events import ObjectResponse
from star_attention.serve.http.fields import read_messages
from star_attention.serve.http.objects import ChatShape, TextShape
from star_attention.serve.http.problems import bad_request
from star_attention.serve.service import Service


class AskRoutes:
    """The routes of chats and completions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asking = Asking(service)

    async def chat(self, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""

        async def read(body: Body) -> Asked:
            messages = read_messages(body)
            ask = self._asking.read(body)
            plan = await self._asking.prompts.of_chat(request.state.tenant, messages, ask)
            shape = ChatShape.new(self._service.name, ask.include_usage)
            return Asked(ask=ask, plans=[plan], shape=shape)

        return await self._asking.answer(request, read)

    async def complete(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        tenant, most = request.state.tenant, self._service.settings.max_answers

        async def read(body: Body) -> Asked:
            prompts = _prompts(body)
            ask = self._asking.read(body, chat=False)
            if len(prompts) * ask.answers > most:
                raise bad_request(
                    f"prompt has {len(prompts)} prompts, of {ask.answers} answers each; ask for at"
                    f" most {most} answers at once",
                    "prompt",
                )
            plans = [await self._asking.prompts.of_text(tenant, each, ask) for each in prompts]
            shape = TextShape.new(self._service.name, ask.include_usage)
            return Asked(ask=ask, plans=plans, shape=shape)

        return await self._asking.answer(request, read)

    async def count(self, request: Request) -> Response:
        """Answer `/v1/chat/completions/input_tokens`: tokens, and what is kept of them."""
        plan, cached = await self._asking.count(request, _chat)
        return ObjectResponse(
            {
                "object": "response.input_tokens",
                "input_tokens": plan.prompt_tokens,
                "input_tokens_details": {"cached_tokens": cached},
                "context_tokens": plan.context_tokens,
                "rule": plan.rule,
            }
        )


def _chat(body: Body) -> tuple[list[Any], Body]:
    return read_messages(body), body


def _prompts(body: Body) -> list[str | list[int]]:
    """Return the prompts of a completion: texts, or lists of token ids."""
    prompt, expected = body.take("prompt"), "a string, a list of strings, or token ids"
    if prompt is None:
        raise missing("prompt", expected, body, {"messages": "/v1/chat/completions"})
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return prompt
        if all(is_id(each) for each in prompt):
            return [prompt]
        if all(isinstance(each, list) and each and all(map(is_id, each)) for each in prompt):
            return prompt
    raise wrong_type("prompt", prompt, expected)
