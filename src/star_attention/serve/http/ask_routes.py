"""`/v1/chat/completions` and `/v1/completions`: from a body to answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from star_attention.generation.result import Generation
from star_attention.hf.text.endings import turn_end_ids
from star_attention.serve.http.answering import Answering, Counts, Locate
from star_attention.serve.http.body import Body, read_object, wrong_type
from star_attention.serve.http.events import ClientLeftError, EventStream, unless_left
from star_attention.serve.http.fields import Ask, read_ask
from star_attention.serve.http.objects import ChatShape, Shape, TextShape
from star_attention.serve.http.problems import (
    bad_request,
    not_supported,
    too_long,
)
from star_attention.serve.http.state import check_model
from star_attention.serve.jobs import Job, Question
from star_attention.serve.prompts import Plan, Prompts
from star_attention.serve.service import Service
from star_attention.serve.texts import source_objects


class AskRoutes:
    """The routes that generate answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._prompts = Prompts(service)

    async def chat(self, request: Request) -> Response:
        """Answer `/v1/chat/completions`."""
        tenant = request.state.tenant

        async def read(body: Body) -> tuple[Ask, list[Plan]]:
            messages = _messages(body)
            ask = self._read(body, chat=True)
            return ask, [await self._prompts.of_chat(tenant, messages, ask)]

        return await self._answer(request, ChatShape.new(self._service.name), read)

    async def complete(self, request: Request) -> Response:
        """Answer `/v1/completions`."""
        tenant, most = request.state.tenant, self._service.settings.max_answers

        async def read(body: Body) -> tuple[Ask, list[Plan]]:
            prompts = _prompts(body)
            ask = self._read(body, chat=False)
            if len(prompts) * ask.answers > most:
                raise bad_request(
                    f"prompt has {len(prompts)} prompts, of {ask.answers} answers each; ask for at"
                    f" most {most} answers at once",
                    "prompt",
                )
            return ask, [await self._prompts.of_text(tenant, each, ask) for each in prompts]

        return await self._answer(request, TextShape.new(self._service.name), read)

    async def count(self, request: Request) -> Response:
        """Answer `/v1/chat/completions/input_tokens`: tokens, and what is kept of them."""
        body = await read_object(request, self._service.settings.max_body)
        messages = _messages(body)
        ask = self._read(body, chat=True)
        plan = await self._prompts.of_chat(request.state.tenant, messages, ask)
        return JSONResponse(
            {
                "object": "response.input_tokens",
                "input_tokens": plan.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self._prompts.cached_tokens(plan)},
                "context_tokens": plan.context_tokens,
                "rule": plan.rule,
            }
        )

    def _read(self, body: Body, *, chat: bool) -> Ask:
        ask = read_ask(body, self._service.settings, chat=chat)
        for field in ask.ignored:
            self._service.metrics.ignored.labels(field).inc()
        check_model(self._service, ask.model)
        return ask

    async def _answer(
        self,
        request: Request,
        shape: Shape,
        read: Callable[[Body], Awaitable[tuple[Ask, list[Plan]]]],
    ) -> Response:
        """Answer a request for answers.

        Args:
            request: the request.
            shape: how answers look.
            read: returns what a body asks, and its prompts.
        """
        service = self._service
        visit = service.visit(request)
        try:
            body = await read_object(request, service.settings.max_body)
            ask, plans = await unless_left(request.receive, read(body))
            limits = [self._limit(each, ask) for each in plans]
            await self._check(plans, ask, limits)
            sources = self._locate(plans[0]) if ask.sources else None
            jobs = self._jobs(plans, ask, limits)
            answering = Answering(
                service.engine,
                jobs,
                [_counts(each, job) for each, job in zip(plans, jobs, strict=True)],
                shape=shape,
                settings=service.settings,
                metrics=service.metrics,
                request_id=request.state.request_id,
                sources=sources,
            )
            visit.at_end(answering.close)
            for plan, job in zip(plans, jobs, strict=True):
                service.metrics.rules.labels(plan.rule).inc()
                service.engine.submit(job)
            headers = _headers(plans[0], jobs[0])
            if ask.stream:
                events = answering.events(usage=ask.include_usage, progress=ask.include_progress)
                return EventStream(events, headers, on_end=visit.keep())
            whole = await unless_left(request.receive, answering.whole())
            return JSONResponse(whole, headers=headers)
        except ClientLeftError:
            # Nobody reads it.
            return Response(status_code=499)
        finally:
            visit.leave()

    def _limit(self, plan: Plan, ask: Ask) -> int:
        """Return the most tokens of an answer.

        Raises:
            Problem: there is no room for it.
        """
        settings, limit = self._service.settings, self._service.star.runtime.positions.limit
        if limit is None:
            return ask.max_tokens or settings.default_max_tokens
        room = limit - plan.prompt_tokens
        wanted = ask.max_tokens or min(max(room, 1), settings.default_max_tokens)
        if wanted > room:
            raise too_long(limit, plan.prompt_tokens, wanted, plan.param)
        return wanted

    async def _check(self, plans: list[Plan], ask: Ask, limits: list[int]) -> None:
        """Refuse settings that cannot work before anything is encoded, and before the first byte.

        A grammar may take a while to compile, so it is done beside the event loop.
        """
        answers = len(plans) * ask.answers
        if ask.sources and answers > 1:
            raise not_supported("sources", f"of {answers} answers", "ask for a single answer")
        runtime = self._service.star.runtime
        for plan, limit in zip(plans, limits, strict=True):
            rope_length = runtime.rope_length(plan.context_tokens)
            runtime.positions.check_room(plan.context_tokens, rope_length, [plan.query_ids], limit)
        options = self._options(ask, plans[0].is_chat) | {"max_new_tokens": max(limits)}
        await self._service.lanes.run(0, lambda star: star.check_settings(**options))

    def _options(self, ask: Ask, is_chat: bool) -> dict[str, Any]:
        options = dict(ask.options)
        if is_chat and not options.get("ignore_eos"):
            star = self._service.star
            own = star.model.generation_config.eos_token_id
            ends = {own} if isinstance(own, int) else set(own or ())
            ends |= {
                token
                for token in turn_end_ids(star.tokenizer)
                if token < star.runtime.handle.vocab_size
            }
            options["eos_token_id"] = sorted(ends) or None
        return options

    def _locate(self, plan: Plan) -> Locate:
        """Return what names the sources of an answer; there are none where no context is kept."""
        content, lanes = self._prompts.content(plan), self._service.lanes

        async def locate(answer: Generation) -> list[dict[str, Any]]:
            sources = answer.sources or ()
            if content is None or not sources:
                return []
            size = len(content.text or "") or len(content)
            return await lanes.run(size, lambda star: source_objects(star, content, sources))

        return locate

    def _jobs(self, plans: list[Plan], ask: Ask, limits: list[int]) -> list[Job]:
        """Open the contexts, and make a job of each prompt."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        jobs: list[Job] = []
        try:
            for plan, limit in zip(plans, limits, strict=True):
                options = self._options(ask, plan.is_chat) | {"max_new_tokens": limit}
                if ask.sources and plan.is_kept:
                    options["sources"] = ask.sources
                questions = [
                    Question(ids=plan.query_ids, options=_seeded(options, number))
                    for number in range(ask.answers)
                ]
                lease = self._prompts.open(plan)
                again = self._prompts.reopening(plan)
                jobs.append(Job(lease, questions, loop, plan.first_ids, again, changed))
        except BaseException:
            for job in jobs:
                job.release()
            raise
        return jobs


def _messages(body: Body) -> list[Any]:
    messages = body.take("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong_type("messages", messages, "a list of messages that is not empty")
    return messages


def _prompts(body: Body) -> list[str | list[int]]:
    """Return the prompts of a completion: texts, or lists of token ids."""
    prompt = body.take("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return prompt
        if all(_is_id(each) for each in prompt):
            return [prompt]
        if all(isinstance(each, list) and each and all(map(_is_id, each)) for each in prompt):
            return prompt
    raise wrong_type("prompt", prompt, "a string, a list of strings, or token ids")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seeded(options: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the options of one of several answers: each draws from a seed of its own."""
    seed = options.get("seed")
    return options if seed is None or not number else options | {"seed": seed + number}


def _counts(plan: Plan, job: Job) -> Counts:
    was_there = plan.is_kept and job.lease is not None and job.lease.outcome != "miss"
    return Counts(
        prompt=plan.prompt_tokens,
        context=plan.context_tokens,
        cached=plan.context_tokens if was_there else 0,
        kept=plan.is_kept,
    )


def _headers(plan: Plan, job: Job) -> dict[str, str]:
    """Return what an answer says about its context."""
    headers = {"x-star-rule": plan.rule, "x-star-context-tokens": str(plan.context_tokens)}
    if not plan.is_kept or job.lease is None:
        return headers | {"x-star-cache": "none"}
    headers |= {"x-star-cache": str(job.lease.outcome), "x-star-context": job.lease.id}
    return headers | ({"x-star-miss-reason": job.lease.reason} if job.lease.reason else {})
