"""LlamaIndex's client for servers of OpenAI's protocol."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.llms.openai_like import OpenAILike
from trial import DOCUMENT, KEY, MODEL, QUESTION, SECOND, TOO_MANY, URL, run


def model(**options: Any) -> OpenAILike:
    options = {"is_chat_model": True, "max_tokens": 24, "api_key": KEY, **options}
    return OpenAILike(
        model=MODEL, api_base=f"{URL}/v1", max_retries=0, context_window=65536, **options
    )


def messages(question: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", blocks=[TextBlock(text=DOCUMENT), TextBlock(text=question)])]


def _of(answer: Any) -> dict[str, Any]:
    usage = getattr(answer.raw, "usage", None)
    details = getattr(usage, "prompt_tokens_details", None)
    return {"text": answer.message.content, "cached": getattr(details, "cached_tokens", None)}


def stream() -> dict[str, Any]:
    *_, last = model().stream_chat(messages(SECOND))
    return {"text": last.message.content}


def left() -> bool:
    own = model(max_tokens=60_000, additional_kwargs={"extra_body": {"ignore_eos": True}})
    chunks = own.stream_chat([ChatMessage(role="user", content="Count.")])
    next(chunks)
    chunks.close()
    return True


run(
    version=lambda: version("llama-index-llms-openai-like"),
    chat=lambda: model().chat([ChatMessage(role="user", content=QUESTION)]).message.content,
    document=lambda: _of(model().chat(messages(QUESTION))),
    second=lambda: _of(model().chat(messages(SECOND))),
    stream=stream,
    completion=lambda: model(is_chat_model=False).complete("The hill").text,
    left=left,
    too_long=lambda: model(max_tokens=TOO_MANY).chat(messages(QUESTION)),
    wrong_key=lambda: model(api_key="wrong").chat(messages(QUESTION)),
)
