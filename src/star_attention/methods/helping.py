"""Phase 1 where rank 0 computes the first layers of other ranks' last blocks (`planning.helping`).

Rank 0 does so as soon as it has sent the anchor; the other ranks take what it sends behind their
first forward, and come to these blocks last. Shapes and bits are those of a rank that computes all
layers by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial

from star_attention.hf.cache.encode import EncodeCache
from star_attention.hf.cache.helping import Helping, HelpReceiver, HelpSender, RunForward
from star_attention.hf.execution.layer_part import LayerPart, layers_of
from star_attention.phase1 import EncodeJob, empty
from star_attention.planning.helping import Help, helps, in_order
from star_attention.planning.plan import ANCHOR_SOURCES, Span
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, KVFormat
from star_attention.storage.oom import translate_oom


def helping_of(job: EncodeJob) -> Helping:
    """Return what this rank does for others, or others for it."""
    given = _helps(job)
    if not given or job.comm.cp_rank >= job.plan.busy_ranks:
        return Helping()
    return _Helped(job, given) if job.comm.cp_rank else _Helper(job, given)


def _helps(job: EncodeJob) -> list[Help]:
    """Return what rank 0 computes for others: the same on all ranks."""
    handle, plan = job.handle, job.plan
    # Other ranks would wait for rank 0 before their next turn.
    if not job.config.balance_ranks or job.in_turns:
        return []
    if plan.busy_ranks < 2 or job.layout != plan.layout or any(handle.windows):
        return []
    if job.config.anchor_source != ANCHOR_SOURCES[0] or handle.probe_result.hidden is None:
        return []
    return helps(plan, layers=len(handle.windows), tokens_per_forward=job.span_tokens)


class _Part(Helping):
    """Either side's: which forwards the parts have, and which layers."""

    def __init__(self, job: EncodeJob, given: list[Help]) -> None:
        hidden = job.handle.probe_result.hidden
        assert hidden is not None, "such models are not helped"
        self._job, self._helps, self._hidden = job, given, hidden
        self._layers = partial(LayerPart, layers_of(job.handle.decoder))

    def _spans(self, given: Help) -> list[Span]:
        return given.spans(self._job.plan, self._job.span_tokens)

    def _memory_for(self, what: str) -> AbstractContextManager[None]:
        """Return a block in which memory that runs out is what this feature takes."""
        tokens = self._job.tokens_per_forward
        return translate_oom(
            lambda: (
                f"out of memory in phase 1 for {what}: set balance_ranks=False"
                f" (--no-balance-ranks), or lower tokens_per_forward (now {tokens:,})"
            )
        )


class _Helper(_Part):
    """Rank 0's side."""

    def __init__(self, job: EncodeJob, given: list[Help]) -> None:
        super().__init__(job, given)
        self._links: list[HelpSender] = []

    def begin(self, run: RunForward, stores: list[ContextKV], anchors: list[ContextKV]) -> None:
        self._run, self._anchors = run, anchors

    def after(self, span: Span) -> None:
        anchor_size = self._job.plan.anchor_size
        if span.start >= anchor_size:
            # Other ranks have asked for it after their first forward: drop what was sent.
            self.finish()
        if span.start < anchor_size <= span.stop:
            with self._memory_for("layers that rank 0 computes for other ranks"):
                for given in self._helps:
                    self._help(given)

    def _help(self, given: Help) -> None:
        job, plan = self._job, self._job.plan
        link = HelpSender(job.comm, given.rank, plan.busy_ranks)
        self._links.append(link)
        # A block of several forwards reads what the ones before have stored, as it is stored.
        own, kv_format = Segments([(given.start, given.stop)]), KVFormat(dtype=job.config.kv_dtype)
        cache = EncodeCache(
            plan,
            [empty(job.handle, own, job.comm, kv_format) for _ in range(job.contexts)],
            job.handle.windows,
            job.comm,
            anchors=self._anchors,
            link=link,
        )
        for span in self._spans(given):
            part = self._layers(stop=given.layers)
            self._run(cache, span, part)
            assert part.ended_BSE is not None, "the layer after the last one was reached"
            link.send_hidden(part.ended_BSE)

    def finish(self) -> None:
        for link in self._links:
            link.finish()
        self._links.clear()


class _Helped(_Part):
    """The side of the other ranks: of those that are helped, and of those between them."""

    def __init__(self, job: EncodeJob, given: list[Help]) -> None:
        super().__init__(job, given)
        own = [each for each in given if each.rank == job.comm.cp_rank]
        self._own = own[0] if own else None

    def begin(self, run: RunForward, stores: list[ContextKV], anchors: list[ContextKV]) -> None:
        job = self._job
        self._receiver = HelpReceiver(
            job.comm, job.places, self._hidden, stores, ranks=job.plan.busy_ranks
        )

    def in_order(self, spans: Iterable[Span]) -> Iterable[Span]:
        spans = list(spans)
        return spans if self._own is None else in_order(spans, self._spans(self._own))

    def part(self, span: Span) -> LayerPart | None:
        own = self._own
        if own is None or not own.start <= span.start < own.stop:
            return None
        with self._memory_for("layers that rank 0 has computed for this rank"):
            return self._layers(first=own.layers, hidden_BSE=self._receiver.hidden_states(span))

    def after(self, span: Span) -> None:
        # Behind the first forward, which the anchor has arrived in: rank 0 sends this next.
        with self._memory_for("layers that rank 0 computes for this rank"):
            while self._helps:
                given = self._helps.pop(0)
                self._receiver.request(given, self._spans(given))

    def finish(self) -> None:
        self._receiver.finish()
