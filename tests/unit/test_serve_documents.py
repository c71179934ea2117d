"""Documents (PDF, Word) that clients send, and those that would take a server's memory or time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import http.client
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("markitdown")

from star_attention.errors import TextError
from star_attention.files.apart import Limits, document_text_apart
from star_attention.serve.documents import Documents
from tests.command_line import NOISE
from tests.servers import Server, eventually, in_parts, running
from tests.unit.test_documents import SENTENCE, pdf, word

SLOW = pdf("x" * 300_000)
"""Takes 20 seconds to read."""
MOST_TEXT = 200_000
CHILDREN = Path("/proc/thread-self/children")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(max_body=2**20) as server:
        yield server


def limit(server: Server, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    documents = server.service.documents
    limits = dataclasses.replace(documents.limits, **changes)
    monkeypatch.setattr(documents, "limits", limits)


def readers() -> list[str]:
    """Return the processes that read documents for this one."""
    tasks = Path("/proc/self/task").iterdir()
    children = {child for task in tasks for child in (task / "children").read_text().split()}
    found = []
    for child in children:
        # It may end meanwhile.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"star_attention.files.apart" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def test_documents_are_kept_as_their_text(server: Server) -> None:
    data = word(*[NOISE] * 4, SENTENCE)
    kept = server.post("/v1/contexts?wait=true", files={"file": ("letter.docx", data)})
    assert kept.status_code == 201, kept.text
    text = server.get(f"/v1/contexts/{kept.json()['id']}/text").text
    assert text.endswith(SENTENCE)
    assert "w:p" not in text
    uploaded = server.post("/v1/files", files={"file": ("a.pdf", pdf("The hill.", SENTENCE))})
    content = server.get(f"/v1/files/{uploaded.json()['id']}/content")
    assert content.text.strip() == f"The hill.\n{SENTENCE}"


def test_a_document_in_a_message_is_read_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids that each question on a document reads it again, and that keys share what is kept."""
    data = word(*[NOISE] * 10, SENTENCE)
    encoded = base64.b64encode(data).decode()
    (message,) = in_parts("", "What is it?")
    message["content"][0] = {"type": "file", "file": {"file_data": encoded, "filename": "a.docx"}}
    asked = {"messages": [message], "max_tokens": 2}
    caches = []
    for _ in range(2):
        answer = server.post("/v1/chat/completions", asked)
        assert answer.status_code == 200, answer.text
        caches.append((answer.headers["x-star-rule"], answer.headers["x-star-cache"]))
        # From now on no document can be read.
        limit(server, monkeypatch, seconds=0.0)
    assert caches == [("file", "miss"), ("file", "hit")]
    with pytest.raises(TextError):
        asyncio.run(server.service.documents.text_of(data, "a.docx", "another"))


@pytest.mark.parametrize(
    ("data", "limits", "message"),
    [
        (pdf(*["x" * 60] * 40), {"text_bytes": 1000}, "bytes of text, more than 1,000; split it"),
        (SLOW, {"seconds": 1.5}, "took more than 1.5 seconds"),
    ],
    ids=["text", "time"],
)
def test_a_document_that_takes_too_much(data: bytes, limits: dict[str, Any], message: str) -> None:
    """Forbids that a small file takes the server's time for ever."""
    with pytest.raises(TextError, match=message):
        asyncio.run(document_text_apart(data, "a.doc", Limits(**{"text_bytes": 2**20, **limits})))


@pytest.mark.skipif(
    sys.platform != "linux" or (os.cpu_count() or 1) > 32,
    reason="needs limits of Linux, and no stacks of very many threads",
)
def test_a_document_that_takes_too_much_memory() -> None:
    """Forbids that a small file takes the server's memory."""
    limits = Limits(text_bytes=2**20, memory_bytes=2**27)
    with pytest.raises(TextError, match="takes more than 134,217,728 bytes of memory"):
        asyncio.run(document_text_apart(word("x " * 10_000_000), "a.doc", limits))


@pytest.mark.skipif(not CHILDREN.exists(), reason="needs /proc")
@pytest.mark.parametrize("path", ["/v1/contexts", "/v1/files", "/v1/chat/completions"])
def test_a_client_that_leaves_while_its_document_is_read(server: Server, path: str) -> None:
    """Forbids that a document is read for nobody."""
    if path == "/v1/chat/completions":
        file = {"file_data": base64.b64encode(SLOW).decode()}
        content = [{"type": "file", "file": file}, {"type": "text", "text": "What is it?"}]
        asked: dict[str, Any] = {"json": {"messages": [{"role": "user", "content": content}]}}
    else:
        asked = {"files": {"file": ("a.pdf", SLOW)}}
    sent = httpx.Request("POST", server.url, **asked)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", path, sent.read(), dict(sent.headers))
    assert eventually(lambda: len(readers()) == 1)
    connection.close()
    assert eventually(lambda: not readers() and server.is_idle())


def test_keys_take_turns() -> None:
    """Forbids that all documents of one key are read before another key's."""

    async def ended() -> list[str]:
        documents, order = Documents(MOST_TEXT), []
        documents._places = asyncio.Semaphore(1)

        async def read(tenant: str, number: int) -> None:
            await documents.text_of(word(f"{tenant} {number}"), "a.docx", tenant)
            order.append(tenant)

        await asyncio.gather(*(read("ann", each) for each in range(3)), read("bob", 0))
        return order

    assert asyncio.run(ended()).index("bob") < 2
