"""The texts of kept contexts, and where in them an answer came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from star_attention.engine import StarLLM
from star_attention.generation.result import Source
from star_attention.hf.text import passages
from star_attention.hf.text.messages import texts
from star_attention.serve.chats import Chats
from star_attention.serve.contexts.entry import Content
from star_attention.serve.cut import Document


def text_of(chats: Chats, star: StarLLM, content: Content) -> str:
    """Return the text that places of sources are characters of.

    Of a document it is the document. Of all else it is what the tokens write, with what the chat
    template wrote and with the end that is held back for the queries.
    """
    return _text_of(star, chats.of(star, content)[0])


def _text_of(star: StarLLM, content: Content) -> str:
    """Return the text of a content that has its messages."""
    if content.messages is not None and len(content.messages) == 1:
        return "".join(texts(content.messages[0]))
    if content.raw and content.text is not None:
        return content.text
    return passages.written(star.tokenizer, content.ids.tolist()) + _held(content)


def source_objects(
    chats: Chats,
    star: StarLLM,
    content: Content,
    sources: Sequence[Source],
    documents: Sequence[Document] | None = (),
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Return sources as JSON values, with their characters in `text_of`.

    `start` and `end` are null where a tokenizer changes the text. A source in one of the documents
    has a `document`, with its characters there.

    Args:
        chats: the chats that contents are.
        star: the engine.
        content: what the context is made of.
        sources: the sources.
        documents: the files in the context, in their order; None for a context that is one as a
            whole.
        name: that of such a context.
    """
    content, _ = chats.of(star, content)
    ids, spans = content.ids.tolist(), [(source.start, source.stop) for source in sources]
    if content.messages is not None and len(content.messages) == 1:
        places = passages.chat_places(star.tokenizer, ids, spans, content.messages, _held(content))
    else:
        places = passages.places(star.tokenizer, ids, spans, _text_of(star, content))
    begun = _begun(star, content, documents, name)
    return [
        {
            "start": place.start_char,
            "end": place.stop_char,
            "weight": round(source.weight, 4),
            "text": place.text,
            **_within(begun, place.start_char, place.stop_char),
        }
        for source, place in zip(sources, places, strict=True)
    ]


def _begun(
    star: StarLLM, content: Content, documents: Sequence[Document] | None, name: str | None
) -> list[tuple[int, Document]]:
    """Return the documents that are in `text_of`, with where they begin."""
    if documents is not None and not documents:
        return []
    text = _text_of(star, content)
    if documents is None:
        return [(0, Document(text=text, name=name))]
    begun, after = [], 0
    for document in documents:
        at = text.find(document.text, after)
        if at < 0:
            break
        begun.append((at, document))
        after = at + len(document.text)
    return begun


def _within(
    begun: list[tuple[int, Document]], start: int | None, end: int | None
) -> dict[str, Any]:
    """Return the document that a place begins in, and the place in its text."""
    for number, (at, document) in enumerate(begun):
        size = len(document.text)
        if start is not None and end is not None and at <= start < at + size:
            about = {"name": document.name, "file_id": document.file_id}
            place = {"index": number, "start": start - at, "end": min(end - at, size)}
            known = {name: value for name, value in about.items() if value is not None}
            return {"document": place | known}
    return {}


def _held(content: Content) -> str:
    end = content.end
    return "" if end is None else end["text"][end["encoded"] :]
