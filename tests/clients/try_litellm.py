"""litellm, which speaks all three protocols."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

# It would ask the network for prices.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import litellm
from trial import KEY, MODEL, QUESTION, SECOND, TOO_MANY, URL, parts, run

OPENAI = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1"}
ANTHROPIC = {"model": f"anthropic/{MODEL}", "api_base": URL}
MARK = {"cache_control": {"type": "ephemeral"}}


def chat(content: Any, **options: Any) -> Any:
    options = {"max_tokens": 24, "api_key": KEY, "max_retries": 0, **OPENAI, **options}
    return litellm.completion(messages=[{"role": "user", "content": content}], **options)


def asked(content: Any, **options: Any) -> dict[str, Any]:
    answer = chat(content, **options)
    cached = answer.usage.prompt_tokens_details.cached_tokens
    return {"text": answer.choices[0].message.content, "cached": cached}


def stream(**options: Any) -> dict[str, Any]:
    chunks = list(
        chat(parts(SECOND, **MARK), stream=True, stream_options={"include_usage": True}, **options)
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    usage = next(c.usage for c in chunks if getattr(c, "usage", None))
    return {"text": text, "cached": usage.prompt_tokens_details.cached_tokens}


def left() -> bool:
    chunks = chat("Count.", stream=True, max_tokens=60_000, extra_body={"ignore_eos": True})
    next(iter(chunks))
    return True


def responses() -> dict[str, Any]:
    answer = litellm.responses(
        model=f"openai/{MODEL}",
        api_base=f"{URL}/v1",
        api_key=KEY,
        input=[{"role": "user", "content": parts(QUESTION, kind="input_text", **MARK)}],
        max_output_tokens=24,
    )
    (item,) = answer.output
    cached = answer.usage.input_tokens_details.cached_tokens
    return {"text": item.content[0].text, "cached": cached}


run(
    version=lambda: version("litellm"),
    chat=lambda: asked(QUESTION)["text"],
    document=lambda: asked(parts(QUESTION, **MARK)),
    second=lambda: asked(parts(SECOND, **MARK)),
    stream=stream,
    responses=responses,
    messages=lambda: asked(parts(QUESTION, **MARK), **ANTHROPIC),
    message_stream=lambda: stream(**ANTHROPIC),
    left=left,
    too_long=lambda: chat(QUESTION, max_tokens=TOO_MANY),
    too_long_message=lambda: chat(QUESTION, **ANTHROPIC | {"max_tokens": TOO_MANY}, stream=True),
    wrong_key=lambda: chat(QUESTION, api_key="wrong"),
)
