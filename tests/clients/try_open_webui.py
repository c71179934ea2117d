"""Open WebUI: its own server, with the settings of the documents, driven as its page does."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from trial import DOCUMENT, KEY, MODEL, QUESTION, SECOND, TOO_MANY, URL, run

START_S = 120
SETTINGS = {
    "OPENAI_API_BASE_URL": f"{URL}/v1",
    "OPENAI_API_KEY": KEY,
    "ENABLE_OLLAMA_API": "False",
    "BYPASS_EMBEDDING_AND_RETRIEVAL": "True",
    "ENABLE_RETRIEVAL_QUERY_GENERATION": "False",
    "ENABLE_TITLE_GENERATION": "False",
    "ENABLE_TAGS_GENERATION": "False",
    "ENABLE_FOLLOW_UP_GENERATION": "False",
}
"""Those of the documents."""
OF_THE_TEST = {
    "ANONYMIZED_TELEMETRY": "False",
    "ENABLE_VERSION_UPDATE_CHECK": "False",
    "OFFLINE_MODE": "True",
    # Its own instructions around a document are no text for `requests.json`.
    "RAG_TEMPLATE": "Answer from this context:\n<context>\n{{CONTEXT}}\n</context>\n",
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "a-key-of-its-own",
}


@contextlib.contextmanager
def open_webui(folder: Path) -> Iterator[httpx.Client]:
    """Run it while the block runs, and return what talks to it as its only user."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [str(Path(sys.executable).with_name("open-webui")), "serve"]
    log = folder / "log.txt"
    with log.open("w") as output:
        program = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=os.environ | {"DATA_DIR": str(folder), **OF_THE_TEST, **SETTINGS},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            wait_for(client, program, log)
            session = client.post("/api/v1/auths/signin", json={"email": "", "password": ""})
            client.headers["authorization"] = f"Bearer {session.json()['token']}"
            yield client
    finally:
        program.terminate()
        try:
            program.wait(20)
        except subprocess.TimeoutExpired:
            program.kill()


def wait_for(client: httpx.Client, program: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        if program.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Open WebUI does not start: {log.read_text()[-2000:]}")
        time.sleep(0.5)


def models(client: httpx.Client) -> list[str]:
    return [model["id"] for model in client.get("/api/models").json()["data"]]


def chat(client: httpx.Client, question: str, **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": question}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 24, **fields}
    return client.post("/api/chat/completions", json=body)


def text_of(answer: httpx.Response) -> dict[str, Any]:
    value = answer.raise_for_status().json()
    cached = value["usage"]["prompt_tokens_details"]["cached_tokens"]
    return {"text": value["choices"][0]["message"]["content"], "cached": cached}


def streamed(answer: httpx.Response) -> dict[str, Any]:
    lines = answer.text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    chunks = [chunk for chunk in chunks if "choices" in chunk]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    cached = chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
    return {"text": text, "cached": cached}


def upload(client: httpx.Client) -> dict[str, Any]:
    """Return the document as the page names it in a chat, once it has been read."""
    file = {"file": ("book.txt", DOCUMENT.encode(), "text/plain")}
    id = client.post("/api/v1/files/", files=file).raise_for_status().json()["id"]
    while client.get(f"/api/v1/files/{id}/process/status").json()["status"] == "processing":
        time.sleep(0.2)
    return {"type": "file", "id": id, "name": "book.txt", "status": "uploaded"}


def left(client: httpx.Client) -> bool:
    """Stop reading, as the page does; Open WebUI closes its own connection then."""
    messages = [{"role": "user", "content": "Count."}]
    # It passes on what it does not know.
    long = {"max_tokens": 60_000, "ignore_eos": True, "stream": True}
    body = {"model": MODEL, "messages": messages, **long}
    with client.stream("POST", "/api/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    return True


def verified(client: httpx.Client, key: str) -> str:
    """Check a connection, as the page does for one that its administrator adds."""
    body = {"url": f"{URL}/v1", "key": key, "config": {}}
    return client.post("/openai/verify", json=body).text


with tempfile.TemporaryDirectory() as folder, open_webui(Path(folder)) as client:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    documents = [upload(client)]
    run(
        version=lambda: version("open-webui"),
        models=lambda: models(client),
        chat=lambda: text_of(chat(client, QUESTION))["text"],
        document=lambda: text_of(chat(client, QUESTION, files=documents)),
        second=lambda: text_of(chat(client, SECOND, files=documents)),
        stream=lambda: streamed(chat(client, SECOND, files=documents, **options)),
        left=lambda: left(client),
        too_long=lambda: chat(client, QUESTION, max_tokens=TOO_MANY).json(),
        wrong_key=lambda: verified(client, "wrong"),
    )
