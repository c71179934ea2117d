"""curl, as the documents show it."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

from trial import KEY, QUESTION, SECOND, TOO_MANY, URL, parts, run

MARK = {"prompt_cache_breakpoint": {"mode": "explicit"}}


def curl(path: str, *options: str, body: Any = None, key: str = KEY) -> str:
    line = ["curl", "--silent", "--show-error", f"{URL}{path}"]
    if key:
        line += ["--header", f"Authorization: Bearer {key}"]
    if body is not None:
        # From stdin, since a line of a command has its limit.
        line += ["--data-binary", "@-"]
    line += options
    text = None if body is None else json.dumps(body)
    return subprocess.run(line, input=text, capture_output=True, text=True, check=True).stdout


def chat(content: Any, *options: str, **fields: Any) -> str:
    messages = [{"role": "user", "content": content}]
    body = {"messages": messages, "max_tokens": 24, **fields}
    return curl("/v1/chat/completions", *options, body=body)


def asked(content: Any, **fields: Any) -> dict[str, Any]:
    answer = json.loads(chat(content, **fields))
    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return {"text": answer["choices"][0]["message"]["content"], "cached": cached}


def stream() -> dict[str, Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    lines = chat(parts(SECOND, **MARK), "--no-buffer", **options).split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    cached = chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    return {"text": text, "cached": cached}


def context() -> dict[str, Any]:
    form = f"file=@{os.environ['STAR_DOCUMENT']}"
    made = json.loads(curl("/v1/contexts?wait=true", "--form", form))
    return asked(QUESTION, context=made["id"])


def left() -> bool:
    try:
        chat("Count.", "--max-time", "1", stream=True, max_tokens=60_000, ignore_eos=True)
    except subprocess.CalledProcessError as error:
        return error.returncode == 28  # It took too long, as it should.
    return False


run(
    version=lambda: curl("/version"),
    models=lambda: [model["id"] for model in json.loads(curl("/v1/models"))["data"]],
    chat=lambda: asked(QUESTION)["text"],
    document=lambda: asked(parts(QUESTION, **MARK)),
    second=lambda: asked(parts(SECOND, **MARK)),
    stream=stream,
    context=context,
    left=left,
    too_long=lambda: json.loads(chat(QUESTION, max_tokens=TOO_MANY)),
    wrong_key=lambda: json.loads(curl("/v1/models", key="wrong")),
)
