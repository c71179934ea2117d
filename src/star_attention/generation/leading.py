"""Rank 0 leads a session alone: the other ranks wait for its calls, and make them too."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

from star_attention.distributed.messages import STREAM
from star_attention.errors import InvalidInputError
from star_attention.generation.batching import following
from star_attention.storage.context import read_layer

_log = logging.getLogger(__name__)

_ENGINE_CALLS: dict[str, Callable[[Any], Any]] = {
    "waiting for rank 0": lambda star: star.from_rank_0(None),
    "prepare": lambda star: star.prepare(None),
    "encode": lambda star: star.encode(None, progress=False),
    "edit": lambda star: star.edit(None, 0, 0, "", progress=False),
    "extend": lambda star: star.extend(None, None, progress=False),
    "load_context": lambda star: star.load_context(None),
    "load_conversation": lambda star: star.load_conversation(None),
    "generate": lambda star: star.generate(None),
    "a stream": lambda star: star.stream(None),
    "logits": lambda star: star.logits(None, None),
    "a batch": lambda star: following.begin(star.runtime),
}
"""Calls of an engine by their names (`Control.collective`): rank 0's arguments count."""


class FollowCalls:
    """The methods of `StarLLM` by which rank 0 alone drives all ranks."""

    def follow(self: Any) -> None:
        """Do on this rank what rank 0 does, until it is done. For every rank but 0.

        Rank 0 calls `encode`, `generate`, `stream`, `extend`, `edit`, `load_context`, `prepare`,
        `load_conversation`, `logits`, `batch`, `save` and `with_config` as a single process would,
        on this engine and on all others over these ranks. A context, or a conversation, is kept
        here for as long as rank 0 keeps its own. Rank 0 may be idle for any time, and its
        exceptions end nothing. This method returns when rank 0 calls `close`, or at the end of its
        process.

            if star.rank > 0:
                star.follow()
                raise SystemExit

        Raises:
            InvalidInputError: on rank 0, also where it is the only one.
            RankError: another rank died, hangs or was stopped.
        """
        comm = self.runtime.comm
        if comm.rank == 0:
            raise InvalidInputError(
                "rank 0 leads and cannot follow; call it on the others: if star.rank > 0:"
                " star.follow()"
            )
        with comm.following():
            while (call := comm.next_call()) is not None:
                try:
                    _repeat(self, *call)
                except Exception:
                    # Rank 0 has it, too. Where the ranks cannot go on, the next wait says so.
                    _log.info("%s failed on rank %d", call[0], comm.rank, exc_info=True)

    def close(self: Any) -> None:
        """Release the ranks that follow: `follow` returns there. Only rank 0's call has an effect.

        The engine stays as it is. Calls that come after need the other ranks again: in `follow`, or
        in the same calls.
        """
        self.runtime.comm.dismiss()


def _repeat(star: Any, where: str, about: Any) -> None:
    """Make rank 0's call on this rank."""
    comm = star.runtime.comm
    stream = comm.streams.get(about) if where == STREAM else None
    if stream is not None:
        with comm.streaming(stream):
            stream.repeat()
        return
    try:
        call = _counterpart(star, where, about)
    except InvalidInputError as error:
        # In the call, so that rank 0 gets it.
        with comm.collective(where, about=about):
            raise error
    call()


def _counterpart(star: Any, where: str, about: Any) -> Callable[[], Any]:
    """Return the call on this rank that belongs to a call on rank 0.

    Raises:
        InvalidInputError: there is none, or this rank has no part of what it is about.
    """
    comm = star.runtime.comm
    if where == "save":
        return partial(comm.contexts.get(about).save, "")
    if where == "read":
        return partial(read_layer, comm.contexts.get(about[0]), about[1])
    if where not in _ENGINE_CALLS:
        raise InvalidInputError(
            f"rank {comm.rank} follows rank 0 and cannot take part in {where}, which needs"
            " arguments of its own on every rank; do it on all ranks, before follow() or without it"
        )
    key, config = about
    engine = copy.copy(star)
    engine.runtime = comm.engines.get(key).with_config(**asdict(config))
    return partial(_ENGINE_CALLS[where], engine)
