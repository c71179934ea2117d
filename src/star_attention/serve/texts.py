"""The texts of kept contexts, and where in them an answer came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from star_attention.engine import StarLLM
from star_attention.generation.result import Source
from star_attention.hf.text import passages
from star_attention.hf.text.messages import texts
from star_attention.serve.contexts.entry import Content
from star_attention.serve.reading import with_messages


def text_of(star: StarLLM, content: Content) -> str:
    """Return the text that places of sources are characters of.

    Of a document it is the document. Of all else it is what the tokens write, with what the chat
    template wrote and with the end that is held back for the queries.
    """
    content = with_messages(star, content)
    if content.messages is not None and len(content.messages) == 1:
        return "".join(texts(content.messages[0]))
    if content.raw and content.text is not None:
        return content.text
    return passages.written(star.tokenizer, content.ids.tolist()) + _held(content)


def source_objects(
    star: StarLLM, content: Content, sources: Sequence[Source]
) -> list[dict[str, Any]]:
    """Return sources as JSON values, with their characters in `text_of`.

    `start` and `end` are null where a tokenizer changes the text.
    """
    content = with_messages(star, content)
    ids, spans = content.ids.tolist(), [(source.start, source.stop) for source in sources]
    if content.messages is not None and len(content.messages) == 1:
        places = passages.chat_places(star.tokenizer, ids, spans, content.messages, _held(content))
    else:
        places = passages.places(star.tokenizer, ids, spans, text_of(star, content))
    return [
        {
            "start": place.start_char,
            "end": place.stop_char,
            "weight": round(source.weight, 4),
            "text": place.text,
        }
        for source, place in zip(sources, places, strict=True)
    ]


def _held(content: Content) -> str:
    end = content.end
    return "" if end is None else end["text"][end["encoded"] :]
