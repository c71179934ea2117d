"""Anthropic's client: messages."""

from __future__ import annotations

from typing import Any

import anthropic
from trial import DOCUMENT, KEY, MODEL, QUESTION, SECOND, TOO_MANY, URL, parts, run

client = anthropic.Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=60)
MARK = {"cache_control": {"type": "ephemeral"}}


def messages(content: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 24, "messages": [{"role": "user", "content": content}]}


def asked(content: Any, **options: Any) -> dict[str, Any]:
    answer = client.messages.create(**messages(content) | options)
    return {
        "text": answer.content[0].text,
        "cached": answer.usage.cache_read_input_tokens,
        "stop": answer.stop_reason,
    }


def document(question: str) -> list[dict[str, Any]]:
    source = {"type": "text", "media_type": "text/plain", "data": DOCUMENT}
    return [{"type": "document", "source": source, **MARK}, {"type": "text", "text": question}]


def stream() -> dict[str, Any]:
    with client.messages.stream(**messages(parts(SECOND, **MARK))) as events:
        text = "".join(events.text_stream)
        answer = events.get_final_message()
    return {"text": text, "cached": answer.usage.cache_read_input_tokens}


def cited() -> dict[str, Any]:
    """Have the answer cite its document, which the client puts together from a stream."""
    content = document(QUESTION)
    content[0]["citations"] = {"enabled": True}
    with client.messages.stream(**messages(content)) as events:
        (block,) = events.get_final_message().content
    places = [DOCUMENT[c.start_char_index : c.end_char_index] for c in block.citations]
    assert places == [c.cited_text for c in block.citations]
    return {"text": block.text + places[0]}


def left() -> bool:
    options = messages("Count.") | {"max_tokens": 60_000, "extra_body": {"ignore_eos": True}}
    with client.messages.create(stream=True, **options) as events:
        next(iter(events))
    return True


def count() -> int:
    request = messages(document(QUESTION))
    del request["max_tokens"]
    return client.messages.count_tokens(**request).input_tokens


def wrong_key() -> Any:
    return client.with_options(api_key="wrong").messages.create(**messages("Hi"))


run(
    version=lambda: anthropic.__version__,
    models=lambda: [model.id for model in client.models.list()],
    chat=lambda: asked(QUESTION)["text"],
    document=lambda: asked(document(QUESTION)),
    cited=cited,
    second=lambda: asked(parts(SECOND, **MARK)),
    instructed=lambda: asked(QUESTION, system=[{"type": "text", "text": "Be brief."}])["stop"],
    stopped=lambda: asked(parts(QUESTION, **MARK), stop_sequences=["910"])["stop"],
    stream=stream,
    left=left,
    count=count,
    too_long=lambda: client.messages.create(
        stream=True, **messages(QUESTION) | {"max_tokens": TOO_MANY}
    ),
    wrong_key=wrong_key,
    wrong_model=lambda: client.messages.create(**messages("Hi") | {"model": "claude"}),
)
