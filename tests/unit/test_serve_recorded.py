"""What real clients have sent, sent again in this process: each gets the status it got before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from star_attention.serve.http.app import make_app
from star_attention.serve.keys import Keys
from tests.clients.recording import DOCUMENT_HERE, FILE, KEY, Player
from tests.servers import Server, running

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
ENDS = {
    "/v1/chat/completions": "data: [DONE]",
    "/v1/completions": "data: [DONE]",
    "/v1/messages": 'event: message_stop\ndata: {"type":"message_stop"}',
    "/v1/responses": "event: response.",
}
"""How streams end, by path."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(default_max_tokens=4) as server:
        yield server


def replayed(server: Server, requests: list[dict[str, Any]]) -> list[httpx.Response]:
    """Return the answers to requests, one after another."""

    async def play() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=make_app(server.service, Keys.of({KEY: "ann"})))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            player = Player(client)
            return [await player.send(request) for request in requests]

    return asyncio.run(play())


def check(request: dict[str, Any], response: httpx.Response) -> None:
    """Check the form of an answer; its words are another model's."""
    assert response.status_code == request["status"], response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        *_, last, end = response.text.split("\n\n")
        assert end == ""
        assert last.startswith(ENDS[request["path"]])
    elif response.status_code != 200:
        assert response.json()["error"]["message"]
    elif request["path"] in ENDS:
        assert response.json()["usage"]


@pytest.mark.parametrize("client", RECORDED)
def test_what_clients_have_sent(server: Server, client: str) -> None:
    """Forbids a change that a client would not understand; `make test-clients` asks them."""
    requests = RECORDED[client]["requests"]
    responses = replayed(server, requests)
    for request, response in zip(requests, responses, strict=True):
        check(request, response)
    about = [
        response.headers.get("x-star-cache")
        for request, response in zip(requests, responses, strict=True)
        if request["status"] == 200 and DOCUMENT_HERE in json.dumps(request["body"])
    ]
    # Files and contexts are documents that nobody asks about yet.
    asked = [cache for cache in about if cache is not None]
    assert len(asked) >= 3
    assert asked[1:] == ["hit"] * (len(asked) - 1)


def test_recorded_requests_hold_nothing_of_the_machine() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert KEY not in text
    for part in ("/tmp/", "/home/", "/root/", "localhost", "127.0.0.1"):
        assert part not in text
