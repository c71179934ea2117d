"""`TorchComm`: ranks over torch.distributed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Self

from star_attention.config import STALL_S
from star_attention.distributed.collectives import MeshComm
from star_attention.distributed.rendezvous import START_S, STARTUP, rendezvous
from star_attention.distributed.world import World
from star_attention.errors import InvalidInputError, RankError, quote


class TorchComm(MeshComm):
    """Ranks over torch.distributed's transports, before any mesh: every rank is a cp rank.

    Creating one is collective. It makes process groups of its own and leaves torch's default group
    alone. `from_environment` takes torchrun's ranks.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        host: str,
        port: int,
        *,
        master: Any = None,
        name: str = "star-attention",
        stall_s: float = STALL_S,
        start_s: float = START_S,
        merge_collective: str | None = None,
    ) -> None:
        """Connect to the other ranks.

        Args:
            host: network name or address at which rank 0's `TCPStore` listens.
            port: its port.
            master: that store, on rank 0, to keep it alive.
            name: prefix of all keys in the store; groups of ranks that share a store need
                different ones.
            stall_s: stall limit, the longest silence of a rank in seconds.
            start_s: seconds to wait for the other ranks.
            merge_collective: "gather" or "reduce" to merge states; None for the one that moves
                fewer bytes.

        Raises:
            InvalidInputError: a value cannot work.
            RankError: not all ranks connect.
        """
        if merge_collective not in (None, "gather", "reduce"):
            raise InvalidInputError(
                f"merge_collective {quote(merge_collective)} is unknown; use None, 'gather'"
                " or 'reduce'"
            )
        world = World(
            rank, size, host, port, server=master, name=name, stall_s=stall_s, start_s=start_s
        )
        super().__init__(world, merge_collective=merge_collective)

    @classmethod
    def from_environment(cls, *, start_s: float = START_S, **settings: Any) -> Self:
        """Connect the ranks that torchrun's environment names.

        The environment variables are RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; `settings` are
        keywords of `TorchComm`.

        Raises:
            InvalidInputError: the environment is incomplete or wrong.
            RankError: not all ranks connect.
        """
        place = rendezvous(start_s)
        return cls(
            place.rank,
            place.size,
            place.host,
            place.port,
            master=place.server,
            start_s=start_s,
            **settings,
        )

    def diagnose(self, cause: str) -> RankError:
        """Return why a signal ends this rank: the rank that died, or `cause` if all seem well."""
        fault = self.world.watchdog.find_cause(cause)
        return RankError(fault.rank, fault.where, fault.cause)

    def close(self) -> None:
        """Let the ranks that follow go, and leave the other ranks for good."""
        world = self.world
        # A program that fails right after startup may be faster than the ranks that will follow.
        if self.rank == 0 and world.last_call == STARTUP:
            self.followers.come(world.others, world.watchdog.others_moved_at, world.stall_s)
        # A daemon thread may still be in a call, which nothing can end in order.
        if not world.in_call:
            # What the others report is theirs.
            with suppress(RankError):
                self.dismiss()
        world.close()
