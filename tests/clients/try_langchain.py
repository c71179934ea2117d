"""LangChain's chat models for OpenAI's two protocols and for Anthropic's."""

from __future__ import annotations

import asyncio
from typing import Any

import langchain_anthropic
import langchain_openai
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from trial import KEY, MODEL, QUESTION, SECOND, TOO_MANY, URL, parts, run

MARK = {"prompt_cache_breakpoint": {"mode": "explicit"}}


def openai(**options: Any) -> ChatOpenAI:
    options = {"max_tokens": 24, "max_retries": 0, "api_key": KEY, **options}
    return ChatOpenAI(model=MODEL, base_url=f"{URL}/v1", **options)


def anthropic(**options: Any) -> ChatAnthropic:
    options = {"max_tokens": 24, "max_retries": 0, "api_key": KEY, **options}
    return ChatAnthropic(model=MODEL, base_url=URL, **options)


def asked(model: Any, content: Any) -> dict[str, Any]:
    return _of(model.invoke([HumanMessage(content)]))


def streamed(model: Any, content: Any) -> dict[str, Any]:
    whole = None
    for chunk in model.stream([HumanMessage(content)]):
        whole = chunk if whole is None else whole + chunk
    return _of(whole)


def streamed_later(model: Any, content: Any) -> dict[str, Any]:
    """Stream by `async`, where a clock counts chunks."""

    async def stream() -> Any:
        whole = None
        async for chunk in model.astream([HumanMessage(content)]):
            whole = chunk if whole is None else whole + chunk
        return whole

    return _of(asyncio.run(stream()))


def _of(answer: Any) -> dict[str, Any]:
    details = (answer.usage_metadata or {}).get("input_token_details", {})
    return {"text": answer.text, "cached": details.get("cache_read")}


def left() -> bool:
    model = openai(max_tokens=60_000, extra_body={"ignore_eos": True})
    chunks = model.stream("Count.")
    next(chunks)
    chunks.close()
    return True


def mark(question: str) -> list[dict[str, Any]]:
    return parts(question, cache_control={"type": "ephemeral"})


run(
    version=lambda: [langchain_openai.__version__, langchain_anthropic.__version__],
    chat=lambda: asked(openai(), QUESTION)["text"],
    document=lambda: asked(openai(), parts(QUESTION, **MARK)),
    second=lambda: asked(openai(), parts(SECOND, **MARK)),
    stream=lambda: streamed(openai(stream_usage=True), parts(SECOND, **MARK)),
    stream_later=lambda: streamed_later(openai(stream_usage=True), parts(SECOND, **MARK)),
    responses=lambda: asked(openai(use_responses_api=True), parts(QUESTION, **MARK)),
    response_stream=lambda: streamed(openai(use_responses_api=True), parts(QUESTION, **MARK)),
    messages=lambda: asked(anthropic(), mark(QUESTION)),
    message_stream=lambda: streamed(anthropic(), mark(SECOND)),
    left=left,
    too_long=lambda: openai(max_tokens=TOO_MANY).invoke("Hi"),
    wrong_key=lambda: openai(api_key="wrong").invoke("Hi"),
)
