"""From what a request asks to its answers, for the routes of all protocols."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from star_attention.errors import quote
from star_attention.generation.result import Generation
from star_attention.hf.text.endings import turn_end_ids
from star_attention.hf.text.template import reads
from star_attention.serve.http.answering import Answering, Calls, Counts, Locate
from star_attention.serve.http.body import Body, read_object
from star_attention.serve.http.events import EventStream, ObjectResponse, unless_left
from star_attention.serve.http.fields import Ask, read_ask
from star_attention.serve.http.line import line_of
from star_attention.serve.http.objects import Shape
from star_attention.serve.http.problems import not_supported, too_long
from star_attention.serve.http.state import check_model
from star_attention.serve.http.tools import Call, CallReader, reader_of
from star_attention.serve.jobs import Job, Question
from star_attention.serve.prompts import Plan, Prompts
from star_attention.serve.service import Service
from star_attention.serve.texts import source_objects


def _nothing() -> None:
    return None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that has been read.

    Attributes:
        ask: what it asks for.
        plans: its prompts.
        shape: how its answers are written.
        begin: called when the answers begin; returns what is called at their end.
    """

    ask: Ask
    plans: list[Plan]
    shape: Shape
    begin: Callable[[Answering], Callable[[], None]] = lambda answering: _nothing


class Asking:
    """Answers requests, whatever their protocol.

    Args:
        service: the server's state.

    Attributes:
        prompts: reads prompts.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.prompts = Prompts(service)

    def read(self, body: Body, *, chat: bool = True) -> Ask:
        """Return what a body asks for, besides its prompt."""
        effort, tokenizer = "reasoning_effort", self._service.star.tokenizer
        if chat and effort in body.fields and not reads(tokenizer, effort):
            remedy = "the model's chat template does not read it; leave it out"
            raise not_supported(effort, quote(body.fields[effort]), remedy)
        ask = read_ask(body, self._service.settings, chat=chat)
        for field in ask.ignored:
            self._service.metrics.ignored.labels(field).inc()
        check_model(self._service, ask.model)
        reader = self._reader(ask)
        if reader is None or (grammar := reader.grammar) is None:
            return ask
        return replace(ask, options={**ask.options, "json_schema": grammar})

    def _reader(self, ask: Ask) -> CallReader | None:
        """Return what reads calls of tools; None where there are no tools.

        Raises:
            Problem: the model cannot call any.
        """
        if ask.tools is None:
            return None
        return reader_of(ask.tools, self._service.star.tokenizer, ask.name("tools"))

    async def count(
        self, request: Request, read: Callable[[Body], tuple[list[Any], Body]]
    ) -> tuple[Plan, int]:
        """Return the plan of a chat that is not asked, and the tokens that are kept of it.

        Args:
            request: the request.
            read: returns a body's messages, and its other fields.
        """
        service = self._service
        with service.visit(request):
            body = await read_object(request, service.settings.max_body)
            messages, fields = read(body)
            plan = await self.prompts.of_chat(request.state.tenant, messages, self.read(fields))
        return plan, self.prompts.cached_tokens(plan)

    async def answer(self, request: Request, read: Callable[[Body], Awaitable[Asked]]) -> Response:
        """Answer a request for answers.

        Args:
            request: the request.
            read: returns what a body asks.
        """
        service = self._service
        visit = service.visit(request)
        try:
            body = await read_object(request, service.settings.max_body)
            asked = await unless_left(request.receive, read(body))
            ask, plans = asked.ask, asked.plans
            limits = [self._limit(each, ask) for each in plans]
            await self._check(plans, ask, limits)
            jobs = self._jobs(plans, ask, limits)
            sources = self._locate(plans[0], jobs[0]) if ask.sources else None
            answering = Answering(
                service.engine,
                jobs,
                [_counts(each, job) for each, job in zip(plans, jobs, strict=True)],
                shape=asked.shape,
                settings=service.settings,
                metrics=service.metrics,
                request_id=request.state.request_id,
                sources=sources,
                calls=self._calls(ask),
                line=line_of(request.scope) if ask.stream else None,
            )
            visit.at_end(answering.close)
            visit.at_end(asked.begin(answering))
            for plan, job in zip(plans, jobs, strict=True):
                service.metrics.rules.labels(plan.rule).inc()
                service.engine.submit(job)
            headers = _headers(plans[0], jobs[0])
            if ask.stream:
                events = answering.events(progress=ask.include_progress)
                return EventStream(events, headers, on_end=visit.keep())
            whole = await unless_left(request.receive, answering.whole())
            return ObjectResponse(whole, headers=headers)
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
            raise too_long(
                limit,
                plan.prompt_tokens,
                wanted,
                param=plan.param,
                limited_by=ask.limited_by,
            )
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
        await self._service.lanes.check(options)

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

    def _locate(self, plan: Plan, job: Job) -> Locate:
        """Return what names the sources of an answer; there are none where no context is kept."""
        content, lanes = self.prompts.content(plan), self._service.lanes
        chats = self._service.chats
        documents = plan.documents if plan.context_id is None else None
        name = None if job.lease is None else job.lease.view().name

        async def locate(answer: Generation) -> dict[str, Any]:
            sources = answer.sources or ()
            if content is None or job.lease is None:
                return {"sources": []}
            size = len(content.text or "") or len(content)
            found = await lanes.run(
                size, lambda star: source_objects(chats, star, content, sources, documents, name)
            )
            return {"context": job.lease.id, "sources": found}

        return locate

    def _calls(self, ask: Ask) -> Calls | None:
        """Return what finds the calls in answers; None where there are no tools."""
        reader, lanes = self._reader(ask), self._service.lanes
        if reader is None:
            return None

        async def read(answer: Generation) -> tuple[Call, ...]:
            size = len(answer.text)
            return await lanes.run(size, lambda star: reader.calls(star, answer))

        return Calls(holder=reader.holder, read=read)

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
                lease = self.prompts.open(plan)
                again = self.prompts.reopening(plan)
                begun, keep = self.prompts.conversation(plan)
                jobs.append(
                    Job(
                        lease,
                        questions,
                        loop,
                        tenant=plan.tenant,
                        first_ids=plan.first_ids,
                        again=again,
                        begun=begun,
                        keep=keep,
                        changed=changed,
                    )
                )
        except BaseException:
            for job in jobs:
                job.release()
            raise
        return jobs


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
        said=plan.said_tokens,
        kept=plan.is_kept,
    )


def _headers(plan: Plan, job: Job) -> dict[str, str]:
    """Return what an answer says about its context."""
    headers = {"x-star-rule": plan.rule, "x-star-context-tokens": str(plan.context_tokens)}
    if plan.kept_tokens:
        headers["x-star-conversation-tokens"] = str(plan.kept_tokens)
    if not plan.is_kept or job.lease is None:
        return headers | {"x-star-cache": "hit" if plan.kept_tokens else "none"}
    headers |= {"x-star-cache": str(job.lease.outcome), "x-star-context": job.lease.id}
    return headers | ({"x-star-miss-reason": job.lease.reason} if job.lease.reason else {})
