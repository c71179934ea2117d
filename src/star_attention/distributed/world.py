"""Processes that work as one: they find each other, talk, and notice when one of them dies, hangs or fails.

Rank 0 leads: it decides, and tells the others with `tell`; they `hear`. Collectives run on process groups of our own (never
the default one), in an order that is the same on all ranks. Waiting for one looks out for faults of other ranks meanwhile
(`watch.py`), so that no rank waits for one that does not come.
"""

from __future__ import annotations

import os
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed
from torch import Tensor

from star_attention import errors
from star_attention.config import STALL_S
from star_attention.distributed.watchdog import BUSY, IDLE, WAITING, Fault, Watch
from star_attention.errors import InvalidInputError, RankError, first_line, release_frames_on_oom

dist: Any = torch.distributed  # its type information leaves out stores and transports

START_S = 300.0
"""Longest time that ranks wait for each other to start."""

_POLL = timedelta(seconds=0.1)
_FOREVER = timedelta(days=30)  # the watch decides how long to wait, not the transport
CALL, END = "call", "end"
"""What rank 0 tells first when a call begins, and last of an answer."""

_PACKET = 2048  # bytes of a message that need no second broadcast
_LENGTH = 8


class Pending:
    """A collective under way; `wait` returns when its tensors are there."""

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        if self._wait is not None:
            wait, self._wait = self._wait, None
            wait()


@dataclass
class _Now:
    """How the ranks stand; one for all that use them."""

    depth: int = 0  # of calls
    open: int = 0  # collectives that nobody has waited for
    keys: int = 0  # contexts
    broken: RankError | None = None
    agreed: BaseException | None = None
    early: Any = None  # heard, but meant for what comes next


class World:
    """All ranks; making one is collective. `from_environment` takes torchrun's.

    host, port: where rank 0's store listens, through which the ranks find each other. master: that store, on rank 0.
    stall_s: longest silence of a rank before the others give up with a `RankError`.

    Makes process groups of its own and leaves torch's default one alone. Raises `RankError` when not all ranks arrive.
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
    ) -> None:
        if not stall_s > 0:
            raise InvalidInputError(
                f"stall_s {stall_s!r} is not above 0; give the longest silence of a rank in seconds"
            )
        self.rank, self.size = rank, size
        self.stall_s, self._start_s = stall_s, start_s
        self._name = name
        self._now = _Now()
        self._lock = threading.RLock()
        self._groups: dict[tuple[str, range], Any] = {}
        self._contexts: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        try:
            self._store = _store(host, port, start_s)
            self._control()
        except RankError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise RankError(
                None,
                "the start",
                f"not all of {size} ranks came within {start_s:g} s ({first_line(error)})",
            ) from error
        self.watch = Watch(
            lambda: dist.PrefixStore(f"{name}/watch", _store(host, port, max(1.0, stall_s / 2))),
            rank,
            size,
            stall_s,
            on_fault=self._abort,
        )
        self._master = master  # lives as long as this rank

    def group(self, backend: str, ranks: range) -> Any:
        """The process group of these ranks, of which this is one; made at first use, which is collective among them."""
        if (backend, ranks) not in self._groups:
            if hasattr(self, "watch"):
                with self._waiting():
                    self._groups[backend, ranks] = self._new_group(
                        backend, ranks, self._check_alive
                    )
            else:
                self._groups[backend, ranks] = self._new_group(backend, ranks)
        return self._groups[backend, ranks]

    def _new_group(
        self, backend: str, ranks: range, check: Callable[[], None] | None = None
    ) -> Any:
        epoch = self.watch.epoch if hasattr(self, "watch") else 0
        name = f"{self._name}/{epoch}/{backend}/{ranks.start}-{ranks.stop}-{ranks.step}"
        store, place = dist.PrefixStore(name, self._store), ranks.index(self.rank)
        # (Making a group waits for the others inside of torch, where neither Ctrl-C nor a fault of theirs would end it.)
        store.set(f"here/{self.rank}", "")
        _await(store, {f"here/{rank}": rank for rank in ranks}, self._start_s, check)
        if backend == "nccl":
            return dist.ProcessGroupNCCL(store, place, len(ranks), _FOREVER)
        group = dist.ProcessGroupGloo(store, place, len(ranks), timedelta(seconds=self._start_s))
        group._set_default_timeout(_FOREVER)
        return group

    def _control(self) -> Any:
        """All ranks, for messages."""
        return self.group("gloo", range(self.size))

    @classmethod
    def from_environment(cls, **settings: Any) -> Self:
        """The ranks of torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

        Raises `InvalidInputError` where the environment does not say who they are.
        """
        missing = [
            name
            for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
            if not os.environ.get(name)
        ]
        if missing:
            raise InvalidInputError(
                f"the environment lacks {', '.join(missing)}; start the processes with torchrun, or give comm='solo'"
            )
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            if not os.environ[name].isdecimal():
                raise InvalidInputError(
                    f"{name} {os.environ[name]!r} is not a number; give what torchrun gives, or comm='solo'"
                )
        if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
            raise InvalidInputError(
                f"RANK {os.environ['RANK']} is not one of WORLD_SIZE {os.environ['WORLD_SIZE']}; give what torchrun gives,"
                " or comm='solo'"
            )
        start_s = settings.get("start_s", START_S)
        host = os.environ["MASTER_ADDR"]
        master: Any = None
        try:
            if (
                dist.is_initialized()
            ):  # the address in the environment is taken: ask over the group that is there
                rank, size = dist.get_rank(), dist.get_world_size()
                master = _listen(host) if rank == 0 else None
                place: list[Any] = [master.port if rank == 0 else None]
                dist.broadcast_object_list(place, src=0)
                port = int(place[0])
            else:
                shared, rank, size = next(
                    dist.rendezvous("env://", timeout=timedelta(seconds=start_s))
                )
                shared = dist.PrefixStore("star-attention", shared)
                if rank == 0:
                    master = _listen(host)
                    shared.set("port", str(master.port))
                _await(shared, {"port": 0}, start_s)
                port = int(shared.get("port"))
                _KEPT.append(shared)  # where rank 0 holds it, the others still read
        except RankError:
            raise
        except (RuntimeError, ValueError, OSError) as error:
            raise RankError(
                None, "the start", f"the ranks did not find each other ({first_line(error)})"
            ) from error
        return cls(rank, size, host, port, master=master, **settings)

    # ------------------------------------------------------------------ what all ranks hold a part of

    def register(self, context: Any) -> int:
        """A number for a context, the same on all ranks, so that rank 0 can say which one it means."""
        self._now.keys += 1
        self._contexts[self._now.keys] = context
        return self._now.keys

    def held(self, key: int | None) -> Any:
        """This rank's part of a context.

        Raises `InvalidInputError` where it is gone.
        """
        context = None if key is None else self._contexts.get(key)
        if context is None:
            raise InvalidInputError(
                f"rank {self.rank} no longer holds its part of this context; keep the result of encode or load_context on"
                " all ranks as long as one asks it"
            )
        return context

    # ------------------------------------------------------------------ calls and faults

    @contextmanager
    def collective(self, where: str, *, check_in: bool = True) -> Iterator[None]:
        """One public call, on all ranks: an exception in it is told to the others, and theirs is raised here.

        Afterwards the ranks have met again, so that the next call finds them together. check_in: make sure first that all ranks
        are in the same call (where the first message shows it, there is no need).

        Raises `InvalidInputError` where they are not.
        """
        with self._lock:
            if self._now.broken is not None:
                raise self._now.broken
            if self._now.depth:
                yield
                return
            self._now.depth = 1
            self.watch.issued = 0
            self.watch.state(BUSY)
            self.watch.tick(where)
            try:
                if check_in:
                    self._check_in(where)
                with release_frames_on_oom():
                    yield
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self._now.depth = 0
                self.watch.state(IDLE)
                self.watch.tick("between calls")

    def _check_in(self, where: str) -> None:
        if self.rank == 0:
            self.broadcast_object((CALL, where))
            return
        what, *more = self.receive_object()
        while what == END:  # of a stream that this rank has left
            what, *more = self.receive_object()
        if (what, more) != (CALL, [where]):
            theirs = more[0] if what == CALL else "the stream of an answer"
            raise InvalidInputError(
                f"rank 0 is in {theirs}, rank {self.rank} in {where}: every call is collective, so make the same calls in"
                " the same order on all ranks"
            )

    def _fail(self, error: BaseException) -> None:
        if error is self._now.agreed:  # every rank raises it by itself, and all are where they were
            return
        fault = self.watch.fault
        # (What ends this rank from outside is told to nobody: as a rule another has died, and that is the cause.)
        interrupted = isinstance(error, KeyboardInterrupt)
        can_meet = isinstance(error, Exception) and (fault is None or fault.name is not None)
        if interrupted or (can_meet and not isinstance(error, RankError)):
            self.watch.tell_failure(
                type(error).__name__, "interrupted" if interrupted else str(error)
            )
        if can_meet and self._recover():
            return
        self._now.broken = (
            error
            if isinstance(error, RankError)
            else RankError(None, self.watch.where, f"a call failed ({error})")
        )
        if isinstance(error, Exception):  # (else it is about to look for the rank that has died)
            self.watch.leave(first_line(self._now.broken))

    def _recover(self) -> bool:
        """Meet the other ranks after an exception, and make new groups: in the old ones some may wait for others that left."""
        self.watch.state(WAITING)
        if not self.watch.meet(f"met/{self.watch.epoch}"):
            return False
        self.watch.epoch += 1
        self.watch.fault = None
        self._abort()
        if self._now.open:
            _KEPT.extend(self._groups.values())
        self._groups.clear()
        self._now.open, self._now.early = 0, None
        try:
            self._control()
        except RuntimeError:
            return False
        return True

    def tick(self, where: str | None = None) -> None:
        """The work got on (a layer, a step); raises what the watch found out about other ranks."""
        self.watch.tick(where)
        if self._now.depth:
            self._check()

    def _check(self) -> None:
        fault = self.watch.check()
        if fault is not None:
            raise _as_error(fault)

    def progress(self, done: int, total: int) -> None:
        """How much of its share of phase 1 this rank has done, in tokens; the others may ask with `lines`."""
        self.watch.share = (done, total)

    def rank_status(self) -> list[dict[str, Any]]:
        """What every rank last said about itself: `where`, `state`, `done` and `total` tokens."""
        return list(self.watch.lines)

    def diagnosis(self, cause: str) -> RankError:
        """Why this rank is told to end from outside: the rank that has died, or `cause` where all seem well."""
        fault = self.watch.suspect(cause)
        return RankError(fault.rank, fault.where, fault.cause)

    # ------------------------------------------------------------------ messages

    def broadcast_object(self, message: Any) -> None:
        """Rank 0 to all others; one small broadcast unless the message is long."""
        data = pickle.dumps(message)
        packet = bytearray(_PACKET)
        packet[:_LENGTH] = len(data).to_bytes(_LENGTH, "little")
        packet[_LENGTH : _LENGTH + len(data)] = data[: _PACKET - _LENGTH]
        self._send(torch.frombuffer(packet, dtype=torch.uint8))
        rest = data[_PACKET - _LENGTH :]
        if rest:
            self._send(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def receive_object(self) -> Any:
        """What rank 0 told."""
        if self._now.early is not None:
            message, self._now.early = self._now.early, None
            return message
        packet = torch.empty(_PACKET, dtype=torch.uint8)
        self._send(packet)
        raw = packet.numpy().tobytes()
        length = int.from_bytes(raw[:_LENGTH], "little")
        data = raw[_LENGTH : _LENGTH + length]
        if length > len(data):
            rest = torch.empty(length - len(data), dtype=torch.uint8)
            self._send(rest)
            data += rest.numpy().tobytes()
        return pickle.loads(data)

    def push_back(self, message: Any) -> None:
        """Leave a message for who hears next."""
        self._now.early = message

    def _send(self, message: Tensor) -> None:
        self.issue(self._control(), lambda group: group.broadcast(message, 0)).wait()

    def collect(self, part: Tensor, group: Any) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(group.size())]
        self.issue(group, lambda group: group.allgather(parts, part)).wait()
        return parts

    def run_on_rank_0(self, decision: Callable[[], Any]) -> Any:
        """Rank 0's result on every rank, or its exception raised on every rank."""
        if self.rank == 0:
            try:
                value = decision()
            except Exception as error:
                self._now.agreed = error
                self.broadcast_object((False, _told(error)))
                raise
            self.broadcast_object((True, value))
            return value
        fine, value = self.receive_object()
        if not fine:
            self._now.agreed = errors.rebuild(*value)
            raise self._now.agreed
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on all ranks, in the order of ranks."""
        data = pickle.dumps(value)
        longest = max(
            int(length) for length in self.collect(torch.tensor([len(data)]), self._control())
        )
        mine = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        return [
            pickle.loads(part.numpy().tobytes()) for part in self.collect(mine, self._control())
        ]

    def mark_collective(self, error: Exception) -> Exception:
        """Mark an exception that every rank raises by itself at this place: there is nobody to tell."""
        self._now.agreed = error
        return error

    def raise_if_any_failed(self, failure: Exception | None) -> None:
        """Raise what any rank failed with, on all ranks; None for this rank's success."""
        for rank, told in enumerate(self.gather(None if failure is None else _told(failure))):
            if told is not None:
                name, message, reasons = told
                self._now.agreed = (
                    failure if rank == self.rank else errors.rebuild(name, message, reasons, rank)
                )
                assert self._now.agreed is not None
                raise self._now.agreed

    # ------------------------------------------------------------------ waiting

    def issue(self, group: Any, collective: Callable[[Any], Any]) -> Pending:
        self._check_alive()
        self.watch.issued += 1
        self._now.open += 1
        work = collective(group)

        def wait() -> None:
            self._wait(work, group)
            self._now.open -= 1

        return Pending(wait)

    def _check_alive(self) -> None:
        if self._now.broken is not None:
            raise self._now.broken
        if self._now.depth:
            self._check()

    def _wait(self, work: Any, group: Any) -> None:
        if (
            type(group).__name__ == "ProcessGroupNCCL"
        ):  # the stream waits; where a rank is lost, the watch ends the collective
            work.wait()
            return
        with self._waiting():
            while True:
                ended = (
                    work.is_completed()
                )  # (asked before: it may end between our own timeout and a question after it)
                try:
                    work.wait(_POLL)
                    return
                except RuntimeError as error:
                    self._check()
                    if ended:
                        raise _as_error(self.watch.suspect(first_line(error))) from error

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Waiting for other ranks is not hanging."""
        self.watch.state(WAITING)
        try:
            yield
        finally:
            self.watch.state(BUSY if self._now.depth else IDLE)

    def _abort(self) -> None:
        """End collectives that run on the device, where nobody could look out for faults."""
        for (backend, _), group in list(self._groups.items()):
            if backend == "nccl":
                with suppress(RuntimeError):  # (aborted before)
                    group.abort()

    def close(self) -> None:
        """Leave the other ranks, who are told."""
        self.watch.close()
        if self._now.broken is not None or self._now.open:
            _KEPT.extend(self._groups.values())


_KEPT: list[Any] = []
"""Stores that others still read, and groups with a collective that never ends (taking one down would wait for it)."""


def _told(error: Exception) -> tuple[str, str, list[str] | None]:
    """What `errors.rebuild` makes an exception of again."""
    return type(error).__name__, str(error), getattr(error, "reasons", None)


def _as_error(fault: Fault) -> BaseException:
    """The error of a fault: the other rank's own exception where it raised one that users know."""
    if fault.name is not None:
        return errors.rebuild(
            fault.name,
            f"{fault.message} (on rank {fault.rank}, in {fault.where})",
            None,
            fault.rank,
        )
    return RankError(fault.rank, fault.where, fault.cause)


def _store(host: str, port: int, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _listen(host: str) -> Any:
    return dist.TCPStore(
        host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=START_S)
    )


def _await(
    store: Any, keys: dict[str, int], start_s: float, check: Callable[[], None] | None = None
) -> None:
    """Wait until the ranks have set their keys (key to rank), with Ctrl-C and `check` looked at meanwhile.

    Raises `RankError` naming those that have not come within `start_s`.
    """
    deadline = time.monotonic() + start_s
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            late = [rank for key, rank in keys.items() if not store.check([key])]
            who = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
            raise RankError(
                late[0] if len(late) == 1 else None,
                "the start",
                f"{who} did not come within {start_s:g} s",
            )
        if check is not None:
            check()
        time.sleep(0.01)
