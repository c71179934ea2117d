"""What the routes of a server share: the model, its contexts, limits and counts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Self

from starlette.requests import Request

from star_attention.engine import StarLLM
from star_attention.hf.text.call_forms import call_form
from star_attention.hf.text.endings import turn_end_ids
from star_attention.serve.chats import Chats
from star_attention.serve.contexts.store import ContextStore
from star_attention.serve.documents import Documents
from star_attention.serve.engine import Engine
from star_attention.serve.http.body import whole_number
from star_attention.serve.http.files import Files
from star_attention.serve.http.problems import busy, unavailable
from star_attention.serve.http.responses.kept import KeptResponses
from star_attention.serve.lanes import Lanes
from star_attention.serve.metrics import Metrics, Numbers
from star_attention.serve.settings import ServeSettings

_MOST_BODIES = 8
"""Largest bodies whose bytes all open requests may have together."""
_MOST_HELD = 4
"""Largest bodies whose bytes files, responses and opened chats may have, each."""


class Visit:
    """One open request, from its body to its last token.

    Args:
        service: where it is counted.
        tenant: whose it is.
        nbytes: most bytes of its body.
    """

    def __init__(self, service: Service, tenant: str, nbytes: int) -> None:
        self._service, self._tenant, self._nbytes = service, tenant, nbytes
        self._at_end: list[Callable[[], None]] = []
        self._is_kept = False
        service.requests[tenant] += 1
        service.request_bytes[tenant] += nbytes

    def at_end(self, function: Callable[[], None]) -> None:
        """Have a function called at the end."""
        self._at_end.append(function)

    def keep(self) -> Callable[[], None]:
        """Return what ends the visit, which `leave` does not any more."""
        self._is_kept = True
        return self._end

    def leave(self) -> None:
        """End the visit, unless it was kept."""
        if not self._is_kept:
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def _end(self) -> None:
        try:
            for function in self._at_end:
                function()
        finally:
            # Whoever sees nothing open finds all of it counted.
            self._service.requests[self._tenant] -= 1
            self._service.request_bytes[self._tenant] -= self._nbytes


class Service:
    """One server's state.

    Args:
        star: the engine.
        name: the model's name for clients.
        settings: limits and times.
        store: the contexts.
        engine: the thread that owns the model.

    Attributes:
        draining: True once no new requests are taken.
        is_shared: True if several tenants have keys: one alone gets half of what may be open.
        requests, request_bytes: requests that have begun and not ended, and the bytes of their
            bodies, by tenant.
    """

    def __init__(
        self, star: StarLLM, name: str, settings: ServeSettings, store: ContextStore, engine: Engine
    ) -> None:
        self.star, self.name, self.settings = star, name, settings
        self.store, self.engine = store, engine
        self.created = int(time.time())
        self.lanes = Lanes(star)
        # The chat template is asked once for these: not when streams wait for it.
        turn_end_ids(star.tokenizer)
        call_form(star.tokenizer)
        self.documents = Documents(settings.max_body)
        self.chats = Chats(_MOST_HELD * settings.max_body)
        self.files = Files(_MOST_HELD * settings.max_body, is_shared=lambda: self.is_shared)
        self.responses = KeptResponses(settings.max_responses, _MOST_HELD * settings.max_body)
        self.metrics = Metrics(self._gauges, self._counters)
        self.draining = False
        self.is_shared = False
        self.requests: Counter[str] = Counter()
        self.request_bytes: Counter[str] = Counter()

    @property
    def open(self) -> int:
        """Requests that have begun and not ended."""
        return self.requests.total()

    def check_queue(self, tenant: str) -> None:
        """Raise a 429 if too many contexts are waiting to be encoded."""
        _, _, queued = self.store.counts()
        most = self.settings.max_waiting
        if self.is_shared and queued[tenant] >= most // 2:
            raise busy(
                f"{queued[tenant]} contexts with your key are waiting to be encoded, the most"
                " for one key; come back later",
                retry_after_s=30,
            )
        if queued.total() >= most:
            raise busy(
                f"{queued.total()} contexts are waiting to be encoded, the most that this server"
                " takes; come back later",
                retry_after_s=30,
            )

    def check_open(self) -> None:
        """Raise a 503 if no requests are taken."""
        if self.draining or not self.engine.alive:
            raise unavailable("the server is shutting down; ask again in a moment", "shutting_down")

    def visit(self, request: Request) -> Visit:
        """Let a request in, whose body has not been read.

        Raises:
            Problem: 503 if no requests are taken, 429 if there are too many.
        """
        self.check_open()
        settings = self.settings
        declared = whole_number(request.headers.get("content-length", ""))
        nbytes = settings.max_body if declared is None else min(declared, settings.max_body)
        tenant = request.state.tenant
        self._check_share(self.requests, tenant, 1, settings.max_waiting, "{:,} requests are open")
        self._check_share(
            self.request_bytes,
            tenant,
            nbytes,
            _MOST_BODIES * settings.max_body,
            "the bodies of open requests have {:,} bytes",
        )
        return Visit(self, tenant, nbytes)

    def _check_share(
        self, held: Counter[str], tenant: str, more: int, most: int, what: str
    ) -> None:
        """Raise a 429 if a tenant's request is too much for all, or for the tenant's share.

        A request always comes in where nothing is held.
        """
        total, own = held.total(), held[tenant]
        if total and total + more > most:
            raise busy(f"{what.format(total)}, of {most:,} in all; ask again in a moment")
        if self.is_shared and own and own + more > most // 2:
            raise busy(
                f"{what.format(own)} with your key, of {most // 2:,} with one key; ask again in a"
                " moment"
            )

    def close(self) -> None:
        """End the threads; contexts that are worth it are saved."""
        self.draining = True
        self.engine.stop()
        self.lanes.close()

    def _gauges(self) -> Numbers:
        engine = self.engine
        _, places, queued = self.store.counts()
        talks, talk_bytes, _ = self.store.talks.numbers()
        return {
            ("contexts", "location"): {place: number for place, (number, _) in places.items()},
            ("context_bytes", "location"): {place: size for place, (_, size) in places.items()},
            ("conversations", ""): {"": talks},
            ("conversation_bytes", ""): {"": talk_bytes},
            ("num_encodes_waiting", ""): {"": queued.total()},
            ("num_requests_running", ""): {"": engine.batch.running},
            ("num_requests_waiting", ""): {"": engine.batch.waiting + engine.waiting},
            ("num_requests_open", ""): {"": self.open},
            ("engine_last_step_age_seconds", ""): {"": time.monotonic() - engine.beat},
        }

    def _counters(self) -> Numbers:
        counts, _, _ = self.store.counts()
        _, _, talks = self.store.talks.numbers()
        return {
            ("context_lookups", "outcome"): dict(counts.found),
            ("context_misses", "reason"): dict(counts.missed),
            ("context_evictions", "to"): dict(counts.evicted),
            ("context_reloads", ""): {"": counts.reloads},
            ("context_returns", ""): {"": counts.returns},
            ("contexts_encoded_again", ""): {"": counts.again},
            ("conversation_hits", ""): {"": talks.hits},
            ("conversations_dropped", "reason"): dict(talks.dropped),
            ("encodes", "outcome"): dict(counts.encodes),
            ("encode_tokens", ""): {"": counts.encoded_tokens},
            ("encode_tokens_reused", ""): {"": counts.reused_tokens},
            ("out_of_memory", ""): {"": counts.out_of_memory},
        }
