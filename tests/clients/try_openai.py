"""OpenAI's client: chats, completions, responses, files."""

from __future__ import annotations

from typing import Any

import openai
from trial import DOCUMENT, KEY, MODEL, QUESTION, SECOND, TOO_MANY, URL, parts, run

client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)
MARK = {"prompt_cache_breakpoint": {"mode": "explicit"}}


def chat(content: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": content}]
    options = {"max_tokens": 24, **options}
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def asked(content: Any) -> dict[str, Any]:
    answer = chat(content)
    details = answer.usage.prompt_tokens_details
    return {"text": answer.choices[0].message.content, "cached": details.cached_tokens}


def stream() -> dict[str, Any]:
    chunks = list(chat(parts(SECOND), stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return {"text": text, "cached": chunks[-1].usage.prompt_tokens_details.cached_tokens}


def left() -> bool:
    with chat("Count.", stream=True, max_tokens=60_000, extra_body={"ignore_eos": True}) as chunks:
        next(iter(chunks))
    return True


def completion() -> str:
    return client.completions.create(model=MODEL, prompt="The hill", max_tokens=3).choices[0].text


def file() -> dict[str, Any]:
    file = client.files.create(file=("book.txt", DOCUMENT.encode()), purpose="user_data")
    part = {"type": "file", "file": {"file_id": file.id}}
    answer = asked([part, {"type": "text", "text": QUESTION}])
    asking = [{"type": "input_file", "file_id": file.id}, {"type": "input_text", "text": QUESTION}]
    (output,) = respond(asking, extra_body={"sources": True}).output
    cited = output.content[0].annotations[0]
    assert (cited.file_id, cited.filename) == (file.id, "book.txt")
    answer["text"] += cited.star["text"]
    client.files.delete(file.id)
    return answer


def respond(content: Any, **options: Any) -> Any:
    question = [{"role": "user", "content": content}]
    return client.responses.create(model=MODEL, input=question, max_output_tokens=24, **options)


def responses() -> dict[str, Any]:
    first = respond(parts(QUESTION, kind="input_text", **MARK))
    more = respond(SECOND, previous_response_id=first.id, instructions=None)
    client.responses.retrieve(more.id)
    client.responses.delete(first.id)
    cached = more.usage.input_tokens_details.cached_tokens
    return {"text": first.output_text, "cached": cached}


def response_stream() -> dict[str, Any]:
    question = [{"role": "user", "content": parts(QUESTION, kind="input_text", **MARK)}]
    options = {"model": MODEL, "input": question, "max_output_tokens": 24, "store": False}
    with client.responses.stream(**options) as events:
        kinds = [event.type for event in events]
        answer = events.get_final_response()
    cached = answer.usage.input_tokens_details.cached_tokens
    return {"text": answer.output_text, "cached": cached, "last": kinds[-1]}


run(
    version=lambda: openai.__version__,
    models=lambda: [model.id for model in client.models.list()],
    chat=lambda: asked(QUESTION)["text"],
    document=lambda: asked(parts(QUESTION, **MARK)),
    second=lambda: asked(parts(SECOND, **MARK)),
    stream=stream,
    left=left,
    completion=completion,
    file=file,
    responses=responses,
    response_stream=response_stream,
    too_long=lambda: chat(QUESTION, max_tokens=TOO_MANY),
    too_long_response=lambda: respond(QUESTION, extra_body={"max_output_tokens": TOO_MANY}),
    wrong_key=lambda: client.with_options(api_key="wrong").models.list(),
    wrong_model=lambda: client.models.retrieve("gpt-9"),
)
