"""Visitors of a server: they ask, leave, send rubbish, and look for what is not theirs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT, CONTEXTS, FILES = "/v1/chat/completions", "/v1/contexts", "/v1/files"
FULL = 429
_FOREVER = 5000


@dataclass
class Tenant:
    """One key, with the documents that are asked with it.

    Attributes:
        name, key: the tenant's.
        documents: texts; some are those of other tenants, too.
        answers: what is answered of each document, asked alone.
        ids: contexts and files that were made with the key.
        visits: what visitors did, and how often.
    """

    name: str
    key: str
    documents: list[str]
    answers: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    visits: Counter[str] = field(default_factory=Counter)

    def client(self, url: str) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.AsyncClient(base_url=url, headers=headers, timeout=150)


def body(document: str, question: str, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": document, "prompt_cache_breakpoint": {"mode": "explicit"}},
        {"type": "text", "text": question},
    ]
    messages = [{"role": "user", "content": parts}]
    return {"messages": messages, "max_tokens": 8, "ignore_eos": True, "temperature": 0, **more}


class Visitor:
    """A client of one tenant that does something else each time.

    Args:
        url: the server.
        tenant: whose it is.
        others: all tenants.
        question: asked of every document.
        seed: of what it does.
    """

    ACTS = ("ask", "stream", "leave", "drop", "rubbish", "raw", "keep", "upload", "peek", "look")

    def __init__(
        self, url: str, tenant: Tenant, others: list[Tenant], question: str, seed: int
    ) -> None:
        self.url, self.tenant, self.others, self.question = url, tenant, others, question
        self.random = random.Random(seed)

    async def visit_until(self, deadline: float) -> None:
        async with self.tenant.client(self.url) as client:
            while time.monotonic() < deadline:
                act = self.random.choice(self.ACTS)
                await getattr(self, act)(client)
                self.tenant.visits[act] += 1
                await asyncio.sleep(self.random.random() * 0.1)

    def document(self) -> tuple[int, str]:
        return self.random.choice(list(enumerate(self.tenant.documents)))

    async def ask(self, client: httpx.AsyncClient) -> None:
        number, text = self.document()
        response = await client.post(CHAT, json=body(text, self.question))
        if response.status_code != FULL:
            assert response.status_code == 200, response.text
            answer = response.json()
            self.check(number, answer["choices"][0]["message"]["content"])
            assert answer["usage"]["completion_tokens"] == 8

    async def stream(self, client: httpx.AsyncClient) -> None:
        number, text = self.document()
        asked, answer = body(text, self.question, stream=True), ""
        async with client.stream("POST", CHAT, json=asked) as response:
            if response.status_code == FULL:
                return
            assert response.status_code == 200
            lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
        for line in lines:
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                answer += choice["delta"].get("content") or ""
        self.check(number, answer)

    def check(self, number: int, answer: str) -> None:
        if self.tenant.answers:
            assert answer == self.tenant.answers[number]

    async def leave(self, client: httpx.AsyncClient) -> None:
        """Leave while an answer comes."""
        asked = body(self.document()[1], self.question, stream=True, max_tokens=_FOREVER)
        async with client.stream("POST", CHAT, json=asked) as response:
            number = self.random.randrange(20)
            async for _ in response.aiter_lines():
                number -= 1
                if number < 0:
                    break

    async def drop(self, client: httpx.AsyncClient) -> None:
        """Leave while a new document is encoded."""
        text = f"{self.random.random()} {self.document()[1]}"
        wait_s = self.random.random() * 0.2
        with contextlib.suppress(httpx.TimeoutException):
            asked = body(text, self.question, max_tokens=_FOREVER)
            await client.post(CHAT, json=asked, timeout=wait_s)

    async def rubbish(self, client: httpx.AsyncClient) -> None:
        """Ask for what cannot be."""
        asked: Any = self.random.choice(
            [[], {"messages": 3}, {"messages": [{"role": "user"}], "n": -1}, {"prompt": {}}, "x"]
        )
        path = self.random.choice([CHAT, "/v1/completions", CONTEXTS, "/v1/responses"])
        response = await client.post(path, json=asked)
        assert 400 <= response.status_code < 500, (path, asked, response.text)

    async def raw(self, client: httpx.AsyncClient) -> None:
        """Send bytes that are no request, or the beginning of one."""
        host, port = self.url.removeprefix("http://").split(":")
        heads = [b"", b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"]
        _, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(OSError):
            writer.write(self.random.choice(heads) + self.random.randbytes(200))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    async def keep(self, client: httpx.AsyncClient) -> None:
        """Keep a document, ask it by its id, and drop it."""
        text = self.document()[1][: 200 + self.random.randrange(300)]
        made = await client.post(f"{CONTEXTS}?wait=true", json={"text": text})
        # Another visitor with the same key may drop it before it is there.
        if made.status_code in (409, FULL):
            return
        assert made.status_code in (200, 201), made.text
        id = made.json()["id"]
        self.tenant.ids.add(id)
        messages = [{"role": "user", "content": self.question}]
        asked = {"context": id, "messages": messages, "max_tokens": 2}
        answer = await client.post(CHAT, json=asked)
        # Or afterwards.
        assert answer.status_code in (200, 404, 409, FULL), answer.text
        if self.random.random() < 0.7:
            gone = await client.delete(f"{CONTEXTS}/{id}")
            assert gone.status_code in (200, 404)

    async def upload(self, client: httpx.AsyncClient) -> None:
        text = f"{self.tenant.name}: {self.random.random()}".encode()
        form = {"purpose": "user_data"}
        made = await client.post(FILES, files={"file": ("a.txt", text)}, data=form)
        if made.status_code == FULL:
            return
        assert made.status_code == 200, made.text
        id = made.json()["id"]
        self.tenant.ids.add(id)
        read = await client.get(f"{FILES}/{id}/content")
        assert read.content == text
        await client.delete(f"{FILES}/{id}")

    async def peek(self, client: httpx.AsyncClient) -> None:
        """Try ids of others: they are as good as none."""
        other = self.random.choice([each for each in self.others if each is not self.tenant])
        if not other.ids:
            return
        id = self.random.choice(sorted(other.ids))
        path = FILES if id.startswith("file") else CONTEXTS
        for method in ("GET", "DELETE"):
            response = await client.request(method, f"{path}/{id}")
            assert response.status_code == 404, response.text
        asked = {"context": id, "messages": [{"role": "user", "content": "A"}]}
        response = await client.post(CHAT, json=asked)
        assert response.status_code in (404, FULL), response.text

    async def look(self, client: httpx.AsyncClient) -> None:
        """List what there is: nothing of others."""
        foreign = {id for each in self.others if each is not self.tenant for id in each.ids}
        for path in (CONTEXTS, FILES):
            listed = (await client.get(path)).json()["data"]
            assert not {each["id"] for each in listed} & foreign


async def visit(
    url: str, tenants: list[Tenant], question: str, *, visitors: int, seconds: float
) -> None:
    """Let visitors of all tenants come and go for a while."""
    deadline = time.monotonic() + seconds
    crowd = [
        Visitor(url, tenants[seed % len(tenants)], tenants, question, seed)
        for seed in range(visitors)
    ]
    async with asyncio.TaskGroup() as group:
        for visitor in crowd:
            group.create_task(visitor.visit_until(deadline))


async def ask_alone(url: str, tenant: Tenant, question: str) -> list[str | None]:
    """Ask each document once, note the answers, and return what the server says was kept."""
    kept = []
    async with tenant.client(url) as client:
        for text in tenant.documents:
            response = await client.post(CHAT, json=body(text, question))
            assert response.status_code == 200, response.text
            tenant.answers.append(response.json()["choices"][0]["message"]["content"])
            kept.append(response.headers["x-star-cache"])
    return kept
