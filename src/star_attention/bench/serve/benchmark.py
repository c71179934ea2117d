"""`bench serve`: clients of a server, over loopback."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from star_attention.bench.benchmark import Benchmark, Target
from star_attention.bench.models import weight_bytes_per_token
from star_attention.bench.modes import block_of
from star_attention.bench.ranks import attempt
from star_attention.bench.serve import plots
from star_attention.bench.serve import rows as serve_rows
from star_attention.bench.serve.crowd import Report, crowd
from star_attention.bench.serve.load import Client
from star_attention.bench.serve.python import OPTIONS, PythonRuns
from star_attention.bench.serve.rows import (
    AGAIN,
    CASES,
    ENCODE,
    IN_PYTHON,
    LEAVE,
    SHARED,
    SINGLE,
    ServeRow,
)
from star_attention.bench.serve.server import Server, serving
from star_attention.distributed import SoloComm
from star_attention.engine import StarLLM
from star_attention.errors import StarAttentionError
from star_attention.generation.batching.warming import warm_up
from star_attention.planning.sizes import counted, format_size
from star_attention.planning.stored import context_bytes
from star_attention.planning.windows import LAST
from star_attention.storage.context import EncodedContext
from star_attention.tools.machine import Ceilings

_IDS = range(100, 4000)
"""Token ids that all vocabularies have."""
_SHORT = 8
"""Tokens of an answer, in runs that are not measured."""
_UNMEASURED = len(CASES)
"""Stands for a case in runs that are not measured: their questions are others."""
_LEAVE_AFTER = 4
"""Pieces of text after which a client leaves its answer."""
_FREE_S = 10.0
"""Most seconds until answers that were left are gone."""


def random_questions(number: int, tokens: int, seed: int) -> list[list[int]]:
    """Return so many random lists of token ids."""
    generator = random.Random(seed)
    return [generator.choices(_IDS, k=tokens) for _ in range(number)]


@dataclass(frozen=True, kw_only=True)
class Serve(Benchmark[ServeRow]):
    """Settings of `bench serve`.

    Attributes:
        options: of `star-attention serve`, which say what it serves.
        cases: names in `CASES`.
        context: length of the long context in tokens; one more is encoded beside clients.
        streams: clients of the long context at once.
        short, texts, clients: the same of contexts that are spread over clients.
        block: block size in tokens.
        query_tokens, answer_tokens: length of a question and of an answer.
        rounds: questions of each client.
        questions: further questions that are asked alone.
        processes: most processes that clients are spread over.
        budget: seconds for all of it, of which the work in Python may take half; None for no limit.
        compile: as for `StarLLM`.
        kv_dtype, kv_device, kv_resident, kv_windows: as for `StarLLM`.
    """

    name: ClassVar[str] = "serve"
    options: list[str] = field(default_factory=list)
    cases: list[str]
    context: int
    streams: int
    short: int
    texts: int
    clients: int
    block: int
    query_tokens: int
    answer_tokens: int
    rounds: int
    questions: int
    processes: int
    budget: float | None = None
    compile: bool | None = None
    kv_dtype: str | None = None
    kv_device: str | None = None
    kv_resident: float | str = 0.0
    kv_windows: str = LAST

    @property
    def longest_input(self) -> int:
        return max(self.context, self.short) + self.query_tokens + self.answer_tokens

    def run(self, target: Target) -> Iterator[ServeRow]:
        rows = self._in_python(self._rows(), target)
        contexts = [self.context, *[self.short] * self.texts, self.context]
        nbytes = sum(
            context_bytes(target.shape, tokens, self.kv_dtype, self.kv_windows)
            for tokens in contexts
        )
        options = ["--max-context-bytes", str(nbytes * 5 // 4)]
        options += ["--max-rows", str(max(self.streams, self.clients))]
        options += ["--block-size", str(block_of(self.block, self.short, target))]
        target.progress("starting the server")
        with serving([*self.options, *options, "--no-implicit"]) as server:
            yield from self.run_at(server, target.progress, rows)

    def _rows(self) -> list[ServeRow]:
        """Return the rows without numbers, those of the same contexts next to each other."""
        rows = []
        for case in CASES:
            is_long, is_alone = case in (SINGLE, SHARED, AGAIN), case in (SINGLE, AGAIN)
            row = ServeRow(
                case=case,
                context=self.context if is_long else self.short,
                texts=1 if is_long else self.texts,
                clients=1 if is_alone else self.streams if is_long else self.clients,
                answer_tokens=1 if case == AGAIN else self.answer_tokens,
            )
            rows += [row] if case in self.cases else []
        return rows

    def run_at(
        self,
        server: Server,
        progress: Callable[[str], None],
        rows: list[ServeRow] | None = None,
    ) -> Iterator[ServeRow]:
        """Measure a server that runs.

        Args:
            server: the server.
            progress: called with a line before each measurement.
            rows: what is known of the rows already; None for nothing.
        """
        rows = self._rows() if rows is None else rows
        kept: list[str] = []
        for index, row in enumerate(rows, start=1):
            what = f"{row.case}, context {format_size(row.context)}"
            progress(f"{index} of {len(rows)}: {what}, {counted(row.clients, 'client')}")
            complete, reason = attempt(SoloComm(), partial(self._timed, row, server, kept))
            yield complete or replace(row, failed=reason)
            following = rows[index] if index < len(rows) else None
            if following is None or following.texts != row.texts:
                server.drop(kept)
                kept.clear()

    # ------------------------------------------------------------------------ over HTTP

    def _timed(self, row: ServeRow, server: Server, kept: list[str]) -> ServeRow:
        """Measure a row. `kept` has the ids of its contexts, or is empty and receives them."""
        if not kept:
            for ids in random_questions(row.texts, row.context, seed=row.texts):
                kept.append(server.keep(ids))
        # What is compiled and captured at its first use is not measured.
        self._heard(self._clients(row, kept, _SHORT, rounds=1), server)
        cpu_s, started = server.cpu_s(), time.monotonic()
        measured = self._measured(row, server, kept)
        spent_s, wall_s = server.cpu_s(), time.monotonic() - started
        if cpu_s is not None and spent_s is not None:
            measured = replace(measured, server_cpu=(spent_s - cpu_s) / wall_s)
        return measured

    def _measured(self, row: ServeRow, server: Server, kept: list[str]) -> ServeRow:
        if row.case == ENCODE:
            return self._beside_encoding(row, server, kept)
        clients = self._clients(row, kept, row.answer_tokens)
        if row.case == LEAVE:
            clients[::2] = [replace(each, leave_after=_LEAVE_AFTER) for each in clients[::2]]
        report = self._heard(clients, server)
        _check_free(server)
        return replace(row, **serve_rows.heard(report))

    def _beside_encoding(self, row: ServeRow, server: Server, kept: list[str]) -> ServeRow:
        first, second = random_questions(2, self.context, seed=99)
        started = time.monotonic()
        id = server.keep(first)
        alone_s = time.monotonic() - started
        server.drop([id])
        clients = self._clients(row, kept, row.answer_tokens)
        with crowd(server.address, clients, self.processes, endless=True) as others:
            others.go()
            _wait_for(server, row.clients)
            started = time.monotonic()
            id = server.keep(second)
            ended = time.monotonic()
            report = others.report()
        server.drop([id])
        times = serve_rows.heard(report, start=started, end=ended)
        return replace(row, encode_alone_s=alone_s, encode_s=ended - started, **times)

    def _clients(
        self, row: ServeRow, kept: list[str], answer_tokens: int, rounds: int | None = None
    ) -> list[Client]:
        """Return the clients of a row, each with its questions."""
        asked = self._questions(row, rounds)
        return [
            Client(
                questions=[
                    {
                        "context": kept[client % len(kept)],
                        "prompt": ids,
                        "max_tokens": answer_tokens,
                        **OPTIONS,
                    }
                    for ids in questions
                ]
            )
            for client, questions in enumerate(asked)
        ]

    def _questions(self, row: ServeRow, rounds: int | None = None) -> list[list[list[int]]]:
        """Return the token ids of the questions of each client: of `rounds`, unmeasured ones.

        A repeated question would resume the conversation that the server has kept of it; the work
        in Python would not.
        """
        case = CASES.index(row.case) if rounds is None else _UNMEASURED
        rounds = rounds or (self.questions if row.case == AGAIN else self.rounds)
        return [
            random_questions(rounds, self.query_tokens, seed=1000 * (case + 1) + client)
            for client in range(row.clients)
        ]

    def _heard(self, clients: list[Client], server: Server) -> Report:
        with crowd(server.address, clients, self.processes) as asking:
            asking.go()
            report = asking.report()
        if not any(each.times for each in report.answers):
            raise StarAttentionError(report.errors[0] if report.errors else "there is no answer")
        return report

    # ------------------------------------------------------------------------ in Python

    def _in_python(self, rows: list[ServeRow], target: Target) -> list[ServeRow]:
        """Return rows with what the same work takes without a server, and its floor."""
        measured: list[ServeRow] = []
        encoded: list[EncodedContext] = []
        stop_at = math.inf if self.budget is None else time.monotonic() + self.budget / 2
        if any(row.case in IN_PYTHON for row in rows):
            for piece in warm_up(self._engine(target), max(row.clients for row in rows)):
                target.progress(f"in Python: warming up, {piece}")
                if time.monotonic() > stop_at:
                    break
        for row in rows:
            if encoded and len(encoded) != row.texts:
                encoded.clear()
            complete: ServeRow | None = row
            if row.case in IN_PYTHON and time.monotonic() < stop_at:
                target.progress(f"in Python: {row.case}, context {format_size(row.context)}")
                work = partial(self._timed_in_python, row, encoded, target)
                complete, reason = attempt(target.comm, work)
                if complete is None:
                    encoded.clear()
                    target.progress(f"in Python: {reason}")
                else:
                    target.progress(f"  {serve_rows.in_python(complete)}")
            measured.append(complete or row)
        encoded.clear()
        gc.collect()
        if target.device.type == "cuda":
            # The server's process needs it.
            torch.cuda.empty_cache()
        return measured

    def _timed_in_python(
        self, row: ServeRow, encoded: list[EncodedContext], target: Target
    ) -> ServeRow:
        star = self._engine(target)
        if not encoded:
            target.check_memory(star, row.context * row.texts)
            for ids in random_questions(row.texts, row.context, seed=row.texts):
                encoded.append(star.encode(torch.tensor(ids), progress=False))
        runs, questions = PythonRuns(star=star, contexts=encoded), self._questions(row)
        if row.case == AGAIN:
            return replace(row, python_first_s=runs.first_s(questions[0]))
        runs.tokens_per_s(self._questions(row, rounds=1), _SHORT)
        rate = runs.tokens_per_s(questions, row.answer_tokens)
        stored = context_bytes(target.shape, row.context, self.kv_dtype, self.kv_windows)
        read_bytes = weight_bytes_per_token(target.model) + row.texts * stored
        # Of a tail, half is there on average.
        tails = row.clients * (self.query_tokens + row.answer_tokens // 2)
        read_bytes += tails * target.shape.stored_bytes_per_token(None)
        return replace(
            row,
            python_tokens_per_s=rate,
            read_bytes=read_bytes,
            floor_tokens_per_s=row.clients * target.ceilings.bytes_per_s / read_bytes,
        )

    def _engine(self, target: Target) -> StarLLM:
        return target.engine(
            compile=self.compile,
            block_size=block_of(self.block, self.short, target),
            kv_dtype=self.kv_dtype,
            kv_device=self.kv_device,
            kv_resident=self.kv_resident,
            kv_windows=self.kv_windows,
        )

    # ------------------------------------------------------------------------- reports

    def table(self, rows: list[ServeRow]) -> list[tuple[str, ...]]:
        return serve_rows.table(rows)

    def comparison(self, rows: list[ServeRow]) -> list[tuple[str, ...]]:
        return serve_rows.overhead(rows)

    def draw(self, rows: list[ServeRow], ceilings: Ceilings, folder: Path) -> list[Path]:
        return plots.draw(rows, folder)


def _wait_for(server: Server, rows: int) -> None:
    """Wait until so many answers are under way, or for a while."""
    deadline = time.monotonic() + _FREE_S
    while server.metric("num_requests_running") < rows and time.monotonic() < deadline:
        time.sleep(0.05)


def _check_free(server: Server) -> None:
    """Wait until no answer is under way.

    Raises:
        StarAttentionError: answers that nobody hears go on.
    """
    deadline = time.monotonic() + _FREE_S
    while rows := server.metric("num_requests_running"):
        if time.monotonic() > deadline:
            raise StarAttentionError(f"{rows:.0f} answers still run after their clients have left")
        time.sleep(0.05)
