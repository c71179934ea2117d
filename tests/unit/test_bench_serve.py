"""`bench serve`: what its clients hear of a server is what it reports. No time is asserted."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("starlette")
pytest.importorskip("openai")

from star_attention.bench.models import random_tokenizer
from star_attention.bench.serve import plots, rows
from star_attention.bench.serve.benchmark import Serve
from star_attention.bench.serve.crowd import Report, crowd
from star_attention.bench.serve.load import Client
from star_attention.bench.serve.rows import ServeRow
from star_attention.bench.serve.server import Server, serving
from star_attention.bench.serve.wire import Address, Heard
from star_attention.cli import app
from star_attention.errors import InvalidInputError, StarAttentionError
from tests.engines import BUNDLED
from tests.servers import NAME, quick_engine, running

SMALL = Serve(
    cases=list(rows.CASES),
    context=500,
    streams=3,
    short=200,
    texts=2,
    clients=4,
    block=64,
    query_tokens=5,
    answer_tokens=40,
    rounds=2,
    questions=3,
    processes=1,
)


def test_every_case_over_http(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with running(quick_engine(), implicit=False) as own:
        server = Server(Address.of(own.url))
        assert server.model == NAME
        measured = list(SMALL.run_at(server, lambda line: None))
        assert own.get("/v1/contexts").json()["data"] == []
    assert [row.case for row in measured] == list(rows.CASES)
    assert [(row.failed, row.error) for row in measured] == [(None, None)] * 6
    single, shared, again, spread, encode, leave = measured
    assert (single.answers, shared.answers, again.answers, spread.answers) == (2, 3 * 2, 3, 4 * 2)
    # A client that is slow to read hears several tokens at once, and may hear the end.
    assert leave.answers + leave.left == 4 * 2
    assert leave.left
    assert encode.encode_s
    assert encode.encode_alone_s
    assert all(row.tokens_per_s and row.first_p50_s for row in measured)
    names = {path.name for path in plots.draw(measured, tmp_path)}
    assert names == {path.name for path in tmp_path.iterdir()}
    assert names == {"serve.md", "serve-rates.png", "serve-times.png"}


def test_no_question_is_asked_twice() -> None:
    """Forbids that a server goes on with a conversation where Python reads a question."""
    cases = SMALL._rows()

    def asked(rounds: int | None) -> list[tuple[int, ...]]:
        clients = [client for case in cases for client in SMALL._questions(case, rounds)]
        return [tuple(ids) for questions in clients for ids in questions]

    measured = asked(None)
    assert len(set(measured)) == len(measured)
    assert not {*measured} & {*asked(1)}


def test_what_a_server_refuses_is_counted() -> None:
    with running(quick_engine()) as own:
        server = Server(Address.of(own.url))
        bodies: list[dict[str, Any]] = [{"context": "ctx_none", "prompt": [500]}]
        bodies += [{"prompt": [500, 501], "max_tokens": 3, "ignore_eos": True}]
        with crowd(server.address, [Client(questions=bodies)], 1) as asking:
            asking.go()
            report = asking.report()
        (refusal,) = report.errors
        assert "404" in refusal
        assert "ctx_none" in refusal
        assert [each.tokens for each in report.answers] == [0, 3]
        with pytest.raises(StarAttentionError, match="/v1/nothing: 404"):
            server.request("GET", "/v1/nothing")
    with pytest.raises(StarAttentionError, match="/ready: ConnectionRefusedError"):
        server.request("GET", "/ready")


def test_a_report_counts_all_clients_from_the_first_request_to_the_last_text() -> None:
    answers = [
        Heard(sent=10.0, times=[11.0, 12.0, 16.0], tokens=3, ended=16.5),
        Heard(sent=9.0, times=[12.0, 14.0], tokens=2),
        Heard(sent=12.0, error="refused"),
    ]
    report = Report(answers=answers, client_cpu=0.5)
    assert report.tokens_per_s == 5 / 7
    assert report.gaps_s() == [1.0, 4.0, 2.0]
    assert report.gaps_s(12.5, 13.0) == [4.0, 2.0]
    heard = rows.heard(report)
    assert (heard["first_p50_s"], heard["first_p95_s"], heard["longest_gap_s"]) == (3.0, 3.0, 4.0)
    assert (heard["answers"], heard["left"], heard["errors"]) == (1, 1, 1)


def test_tables_compare_with_python() -> None:
    row = ServeRow(
        case="shared",
        context=2048,
        texts=1,
        clients=4,
        answer_tokens=9,
        tokens_per_s=80.0,
        python_tokens_per_s=100.0,
        floor_tokens_per_s=160.0,
        first_p50_s=0.011,
        python_first_s=0.01,
    )
    single = replace(row, case="single", clients=1, tokens_per_s=20.0)
    header, _, cells = rows.table([single, row])
    named = dict(zip(header, cells, strict=True))
    assert named["x single"] == "4.00"
    assert (named["of Python"], named["of floor"]) == ("0.80", "0.50")
    assert rows.overhead([row])[1:] == [
        ("shared, first token", "11.0 ms", "10.0 ms", "1.0 ms"),
        ("shared, throughput", "80 tok/s", "100 tok/s", "20.0%"),
    ]
    assert rows.overhead([]) == []


@pytest.mark.parametrize("url", ["https://127.0.0.1", "127.0.0.1:80", "http://a:b", "http://"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidInputError, match=r"is not the URL of a server; write http://"):
        Address.of(url)


def test_urls_may_end_as_those_of_clients_do() -> None:
    address = Address.of("http://[::1]:81/models/v1/")
    assert (address.host, address.port, address.path) == ("::1", 81, "/models")
    assert address.url == "http://[::1]:81/models"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "none"], "case 'none' is unknown; choose from single, shared"),
        (
            ["--url", "http://127.0.0.1:1", "-m", str(BUNDLED)],
            "has a model already; leave out --model",
        ),
        (["--url", "http://127.0.0.1:1"], "/v1/models: ConnectionRefusedError"),
    ],
)
def test_what_cannot_be_measured(options: list[str], message: str) -> None:
    process = CliRunner().invoke(app, ["bench", "serve", *options])
    assert process.exit_code == 1
    (line,) = process.stderr.splitlines()
    assert message in line


def test_a_tokenizer_for_random_weights_has_a_text_for_every_id() -> None:
    for size in (300, 20_000):
        tokenizer = random_tokenizer(size)
        assert len(tokenizer) == size
        assert len({tokenizer.decode([id]) for id in range(256, size)}) == size - 256
        text = "any text, größer"
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_a_server_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sizes = "--context 512 --short 256 --texts 2 --clients 3 --streams 2 --block 256"
    sizes += " --answer-tokens 8 --questions 2 --processes 2"
    model = ["-m", str(BUNDLED), "--dtype", "float32", "--device", "cpu"]
    arguments = ["bench", "serve", *model, *sizes.split(), "--out", str(tmp_path)]
    process = CliRunner().invoke(app, arguments)
    assert process.exit_code == 0, process.output
    record = json.loads(process.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "serve.json").read_text()) == record
    assert re.search(r"in Python: shared, context 512\n[\d,]+ tok/s\n", process.stderr)
    single, shared, again, spread, encode, leave = record["rows"]
    assert single["answers"] == 2
    assert all(row["failed"] is None and not row["errors"] for row in record["rows"])
    assert shared["python_tokens_per_s"]
    assert spread["floor_tokens_per_s"]
    assert again["python_first_s"]
    assert encode["encode_alone_s"]
    assert leave["server_cpu"]


def test_a_server_that_does_not_start_says_why() -> None:
    said = "the server has not started: error: there is no model folder"
    with pytest.raises(StarAttentionError, match=said), serving(["-m", "./none"]):
        pass


@pytest.mark.slow
def test_without_time_there_is_one_case_over_http_and_none_in_python() -> None:
    sizes = "--context 512 --short 256 --texts 2 --block 256 --answer-tokens 8 --rounds 1"
    model = ["-m", str(BUNDLED), "--dtype", "float32", "--device", "cpu"]
    arguments = ["bench", "serve", *model, *sizes.split(), "--budget", "0.01"]
    process = CliRunner().invoke(app, arguments)
    assert process.exit_code == 0, process.output
    (row,) = json.loads(process.stdout.splitlines()[-1])["rows"]
    assert row["tokens_per_s"]
    assert row["python_tokens_per_s"] is None
