"""Tenants take turns: one with many requests does not keep another one waiting."""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from typing import Any, cast

import pytest

pytest.importorskip("starlette")
pytest.importorskip("openai")

from star_attention.serve.answers import Answers, Store
from star_attention.serve.jobs import Job, Question
from star_attention.serve.keys import Keys
from star_attention.serve.turns import Turns
from tests.servers import ASK, Server, eventually, quick_engine, running
from tests.stores import FakeEncoder, settle, store, wanted

CHAT = "/v1/chat/completions"
ANN, BOB = ({"authorization": f"Bearer key-of-{name}"} for name in ("ann", "bob"))


def test_who_holds_least_is_served_and_then_who_waited_longest() -> None:
    turns = Turns()
    served = []
    for _ in range(5):
        served.append(turns.first(["ann", "bob", "cat"]))
        turns.note(served[-1])
    assert served == ["ann", "bob", "cat", "ann", "bob"]
    assert turns.first(["ann", "bob", "cat"], {"cat": 1}) == "ann"
    assert turns.first(["cat", "bob"], {"cat": 1, "bob": 2}) == "cat"


def asked(answers: Answers, *tenants: str, number: int = 1) -> dict[Job, str]:
    """Let tenants ask, one after another; return their jobs with names."""
    loop = cast("asyncio.AbstractEventLoop", None)
    question = Question(ids=[500, 501], options={"max_new_tokens": 3, "ignore_eos": True})
    jobs = {}
    for index, tenant in enumerate(tenants):
        job = Job(None, [question] * number, loop, tenant=tenant, first_ids=(7,))
        jobs[job] = f"{tenant}{index}"
        answers.ask(job)
    return jobs


def started(answers: Answers, jobs: dict[Job, str]) -> list[list[str]]:
    """Answer all; return the names of those that began to be answered between two steps."""
    steps: list[list[str]] = []
    while events := answers.take_events():
        names = []
        for event in events:
            before = event.job.started
            event.job.apply(event)
            names += [jobs[event.job]] if event.job.started != before else []
        steps += [names] if names else []
        while answers.running and not answers.events:
            answers.step()
    assert [(job.done, job.error) for job in jobs] == [(True, None)] * len(jobs)
    return steps


def answers_of(**settings: Any) -> Answers:
    return Answers(quick_engine(), cast("Store", None), **settings)


def test_answers_are_begun_in_turn() -> None:
    answers = answers_of(max_rows=2)
    jobs = asked(answers, "ann", "ann", "ann", "ann", "bob", "bob")
    assert started(answers, jobs) == [["ann0", "ann1"], ["bob4", "ann2"], ["bob5", "ann3"]]


def test_of_one_tenant_the_first_comes_first() -> None:
    answers = answers_of(max_rows=1)
    jobs = asked(answers, "ann", "ann", "ann")
    assert started(answers, jobs) == [["ann0"], ["ann1"], ["ann2"]]


def test_a_tenant_leaves_places_free_for_others() -> None:
    answers = answers_of(max_rows=4, max_rows_per_key=1)
    jobs = asked(answers, "ann", "ann", "bob")
    assert started(answers, jobs) == [["ann0", "bob2"], ["ann1"]]


def test_several_answers_to_one_request_are_no_reason_to_wait_forever() -> None:
    answers = answers_of(max_rows=4, max_rows_per_key=2)
    jobs = asked(answers, "ann", "ann", number=3)
    assert started(answers, jobs) == [["ann0"], ["ann1"]]


def test_a_request_that_is_canceled_leaves_the_queue() -> None:
    answers = answers_of(max_rows=1)
    jobs = asked(answers, "ann", "ann", "bob")
    answers.cancel(next(job for job, name in jobs.items() if name == "bob2"))
    assert len(answers.queue) == 1
    answers.fail_all(RuntimeError("the end"))
    assert not answers.running


def test_contexts_are_encoded_in_turn() -> None:
    encoder = FakeEncoder()
    kept = store(encoder)
    of_ann = [[start, start + 1] for start in (10, 20, 30)]
    for ids in of_ann:
        kept.create(wanted(*ids, tenant="ann"))
    kept.create(wanted(40, 41, tenant="bob"))
    assert kept.counts()[2] == {"ann": 3, "bob": 1}
    settle(kept)
    assert encoder.encoded == [(10, 11), (40, 41), (20, 21), (30, 31)]


def test_contexts_that_somebody_waits_for_come_first() -> None:
    """Forbids that clients who leave keep others waiting for what nobody wants any more."""
    encoder = FakeEncoder()
    kept = store(encoder)
    for start in (10, 20):
        kept.acquire(wanted(start, start + 1)).release()
    lease = kept.acquire(wanted(30, 31))
    kept.create(wanted(40, 41))
    settle(kept)
    assert lease.ready.result(0)
    assert encoder.encoded == [(30, 31), (40, 41), (10, 11), (20, 21)]


def stream(server: Server, headers: dict[str, str]) -> Any:
    body = b'{"messages": [{"role": "user", "content": "A"}], "stream": true, "ignore_eos": true}'
    lines = [f"POST {CHAT} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return server.raw("\n".join([*lines, "", ""]), body)


def test_one_key_of_several_gets_half_of_what_is_open() -> None:
    keys = Keys.of({"key-of-ann": "ann", "key-of-bob": "bob"})
    with running(keys=keys, max_waiting=4, max_rows=1) as server:
        connections = [stream(server, ANN) for _ in range(2)]
        assert eventually(lambda: server.service.open == 2)
        refusal = server.post(CHAT, {"messages": ASK}, headers=ANN)
        assert refusal.status_code == 429
        message = refusal.json()["error"]["message"]
        assert message.startswith("2 requests are open with your key, of 2 with one key; ask")
        body = {"messages": ASK, "max_tokens": 2}
        assert server.post("/v1/contexts", {"text": "A"}, headers=BOB).status_code == 202
        for connection in connections:
            connection.close()
        assert server.post(CHAT, body, headers=BOB).status_code == 200


def test_one_key_alone_gets_all() -> None:
    keys = Keys.of({"key-of-ann": "ann"})
    with running(keys=keys, max_waiting=2, max_rows=1) as server, stream(server, ANN):
        assert eventually(lambda: server.service.open == 1)
        assert server.post("/v1/contexts", {"text": "A"}, headers=ANN).status_code == 202


def test_many_commands_are_no_gap_between_tokens() -> None:
    """Forbids that a burst of requests and cancels stops all streams until the last of it."""
    steps: list[float] = []
    taken: list[int] = []

    def command(number: int) -> None:
        time.sleep(0.004)
        taken.append(number)

    with running() as server:
        engine = server.service.engine
        engine.on_step = lambda seconds: steps.append(time.monotonic())
        with stream(server, {}):
            assert eventually(lambda: len(steps) > 3)
            for number in range(400):
                engine.post(functools.partial(command, number))
            begun = len(steps)
            assert eventually(lambda: len(taken) == 400)
            times = steps[begun - 1 :]
    assert taken == sorted(taken)
    # In one go they would take 1.6 seconds.
    assert max(later - sooner for sooner, later in itertools.pairwise(times)) < 0.8
    assert len(times) > 20
