"""Servers for tests: over a real socket, in a thread of this process."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from star_attention import StarLLM
from star_attention.serve import program
from star_attention.serve.keys import Keys
from star_attention.serve.listening import bind
from star_attention.serve.program import make_service, run
from star_attention.serve.service import Service
from star_attention.serve.settings import ServeSettings
from tests.command_line import NEEDLE, NOISE, OTHER, QUESTION
from tests.engines import bundled_model, bundled_tokenizer, random_text_model
from tests.talkers import say

NAME = "needle-17m"
DOCUMENT = NOISE * 12 + NEEDLE + NOISE * 8 + OTHER + NOISE * 4
"""About 700 tokens."""
ANSWER = "4910508"
ASK = [{"role": "user", "content": QUESTION}]
_WAIT_S = 20

# A server collects garbage at its start, which takes a quarter of a second with pytest's, and its
# end would let all later collections look at what tests/conftest.py has frozen. Only the server's
# own name for the module is replaced.
program.gc = types.SimpleNamespace(  # type: ignore[assignment]
    collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None
)
# How often it looks for a signal to end: hundreds of them end in a session.
program._LOOK_S = 0.01


@functools.cache
def engine() -> StarLLM:
    """The bundled model, in small blocks."""
    return StarLLM(bundled_model(), bundled_tokenizer(), block_size=256, anchor_size=256)


@functools.cache
def quick_engine() -> StarLLM:
    """A small random model with the bundled tokenizer, for what does not look at answers."""
    model = random_text_model(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=65536,
    )
    return StarLLM(model, bundled_tokenizer(), block_size=64, anchor_size=64, tokens_per_forward=64)


def in_parts(*texts: str, mark: bool = False) -> list[dict[str, Any]]:
    """Return one user message in parts; `mark` says that all but the last one can be kept."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": text} for text in texts]
    if mark:
        parts[-2]["prompt_cache_breakpoint"] = {"mode": "explicit"}
    return [{"role": "user", "content": parts}]


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server.

    Attributes:
        port: where it listens, on 127.0.0.1.
        service: its state.
    """

    port: int
    service: Service

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """Return OpenAI's own client, which repeats nothing by itself."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 30, **options}
        )

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=json, timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric's value; 0 if it has none yet."""
        text = self.service.metrics.text().decode()
        wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
        braces = re.escape(f"{{{wanted}}}") if wanted else ""
        match = re.search(rf"^star:{name}{braces} (\S+)$", text, re.MULTILINE)
        return float(match[1]) if match else 0.0

    def raw(self, head: str, body: bytes = b"") -> socket.socket:
        """Open a connection and send a request as it is."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=_WAIT_S)
        connection.sendall(head.replace("\n", "\r\n").encode() + body)
        return connection

    def is_idle(self) -> bool:
        """True if nothing runs or waits, and no memory of an answer is held."""
        engine = self.service.engine
        return not (self.service.open or engine.waiting or engine.batch.running)


@contextlib.contextmanager
def running(
    star: StarLLM | None = None,
    keys: Keys | None = None,
    before: Callable[[Service], None] = lambda service: None,
    **settings: Any,
) -> Iterator[Server]:
    """Serve an engine on a free port while the block runs.

    Args:
        star: the engine; None for a small random model.
        keys: the server's keys.
        before: called with the server's state before its engine starts.
        settings: fields of `ServeSettings`.
    """
    settings = {"min_context_tokens": 256, "drain_timeout": 5.0, "warm_up": False, **settings}
    service = make_service(star or quick_engine(), NAME, ServeSettings(port=0, **settings))
    before(service)
    failures: list[BaseException] = []
    ready = threading.Event()
    with bind("127.0.0.1", 0) as listener:

        def serve() -> None:
            try:
                run(service, keys, listener, ready.set)
            except BaseException as error:
                failures.append(error)
                ready.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert ready.wait(_WAIT_S)
        try:
            yield Server(port=listener.getsockname()[1], service=service)
        finally:
            service.draining = True
            thread.join(_WAIT_S)
    assert not thread.is_alive(), "the server does not end"
    if failures:
        raise failures[0]


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the events of a stream, each with the name of its type."""
    found = []
    for block in response.text.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def saying(text: str) -> Callable[[Service], None]:
    """Return what has every answer of a server say a text, as far as its limit allows."""

    def before(service: Service) -> None:
        add, tokenizer = service.engine.batch.add, service.star.tokenizer

        def adding(context: Any, query: Any, **options: Any) -> Any:
            said = say(tokenizer, text)
            limit = min(said["max_new_tokens"], options["max_new_tokens"])
            return add(context, query, **(options | said | {"max_new_tokens": limit}))

        service.engine.batch.add = adding  # type: ignore[method-assign]

    return before


def eventually(condition: Callable[[], bool], seconds: float = _WAIT_S) -> bool:
    """True once a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
