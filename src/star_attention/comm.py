"""Processes that share one context: `SoloComm` for one, `TorchComm` over torch.distributed for several.

Rank 0 leads: it decides, and tells the others with `tell`; they `hear`. Tensors travel by collectives on a process group of
our own (never the default one), in an order that is the same on all ranks. Waiting for a collective looks out for faults of
other ranks meanwhile (`watch.py`), so that no rank waits for one that does not come.

Axes: B batch, Q query rows, H query heads, D head size, W ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from star_attention import errors, wire
from star_attention.attention.state import State, merge
from star_attention.config import STALL_S
from star_attention.errors import InvalidInputError, RankError
from star_attention.watch import BUSY, IDLE, WAITING, Fault, Watch
from star_attention.wire import Traffic

dist: Any = torch.distributed  # its type information leaves out stores and transports

START_S = 300.0
"""Longest time that ranks wait for each other to start."""

_POLL = timedelta(seconds=0.1)
_FOREVER = timedelta(days=30)  # the watch decides how long to wait, not the transport
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


class Comm(Protocol):
    """What the phases need of the other ranks."""

    rank: int
    size: int
    traffic: Traffic

    def register(self, context: Any) -> int: ...
    def held(self, key: int | None) -> Any: ...
    def use(self, device: torch.device) -> None: ...
    def tell(self, message: Any) -> None: ...
    def hear(self) -> Any: ...
    def gather(self, value: Any) -> list[Any]: ...
    def decide(self, decision: Callable[[], Any]) -> Any: ...
    def all_fine(self, failure: Exception | None) -> None: ...
    def agreed(self, error: Exception) -> Exception: ...
    def call(self, where: str) -> contextlib.AbstractContextManager[None]: ...
    def tick(self, where: str | None = None) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def lines(self) -> list[dict[str, Any]]: ...
    def merge(self, state: State) -> State: ...
    def broadcast(self, tensor: Tensor, ranks: int) -> Pending: ...
    def exchange(self, tensor: Tensor, received: Tensor, *, target: int, source: int, total: int) -> Pending: ...


class SoloComm:
    """One process: nothing to say to anybody."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.traffic = Traffic()

    def register(self, context: Any) -> int:
        return 0

    def held(self, key: int | None) -> Any:
        raise AssertionError("a single process is given its contexts")

    def use(self, device: torch.device) -> None:
        return

    def tell(self, message: Any) -> None:
        return

    def hear(self) -> Any:
        raise AssertionError("a single process leads")

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def decide(self, decision: Callable[[], Any]) -> Any:
        return decision()

    def all_fine(self, failure: Exception | None) -> None:
        if failure is not None:
            raise failure

    def agreed(self, error: Exception) -> Exception:
        return error

    def call(self, where: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def tick(self, where: str | None = None) -> None:
        return

    def progress(self, done: int, total: int) -> None:
        return

    def lines(self) -> list[dict[str, Any]]:
        return []

    def merge(self, state: State) -> State:
        return state

    def broadcast(self, tensor: Tensor, ranks: int) -> Pending:
        return Pending()

    def exchange(self, tensor: Tensor, received: Tensor, *, target: int, source: int, total: int) -> Pending:
        raise AssertionError("there is no other rank")


class TorchComm:
    """Ranks over torch.distributed's transports; making one is collective. `from_environment` takes torchrun's ranks.

    host, port: where rank 0's store listens, through which the ranks find each other. master: that store, on rank 0.
    stall_s: longest silence of a rank before the others give up with a `RankError`.
    merge_collective: "gather" or "reduce" instead of the one that moves fewer bytes.

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
        merge_collective: str | None = None,
    ) -> None:
        if not stall_s > 0:
            raise InvalidInputError(
                f"stall_s {stall_s!r} is not above 0; give the longest silence of a rank in seconds"
            )
        if merge_collective not in (None, "gather", "reduce"):
            raise InvalidInputError(f"merge_collective {merge_collective!r} is unknown; use None, 'gather' or 'reduce'")
        self.rank, self.size = rank, size
        self.stall_s, self._start_s = stall_s, start_s
        self.merge_collective = merge_collective
        self.traffic = Traffic()
        self._name = name
        self._issued = self._open = 0
        self._broken: RankError | None = None
        self._agreed: BaseException | None = None
        self._depth = 0
        self._lock = threading.RLock()
        self._among: dict[int, Any] = {}
        self._contexts: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._keys = 0
        try:
            self._store = _store(host, port, start_s)
            self._control = self._group("gloo", size)
        except (RuntimeError, ValueError, OSError) as error:
            raise RankError(
                None, "the start", f"not all of {size} ranks came within {start_s:g} s ({_first_line(error)})"
            ) from error
        self._data = self._control
        self._watch = Watch(
            lambda: dist.PrefixStore(f"{name}/watch", _store(host, port, max(1.0, stall_s / 2))),
            rank,
            size,
            stall_s,
            on_fault=self._abort,
        )
        self._master = master  # lives as long as this rank

    def _group(self, backend: str, count: int) -> Any:
        """A process group of the first `count` ranks, of which this is one. Collective among them."""
        epoch = self._watch.epoch if hasattr(self, "_watch") else 0
        store = dist.PrefixStore(f"{self._name}/{epoch}/{backend}/{count}", self._store)
        if backend == "nccl":
            return dist.ProcessGroupNCCL(store, self.rank, count, _FOREVER)
        group = dist.ProcessGroupGloo(store, self.rank, count, timedelta(seconds=self._start_s))
        group._set_default_timeout(_FOREVER)
        return group

    @classmethod
    def from_environment(cls, **settings: Any) -> TorchComm:
        """The ranks of torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

        Raises `InvalidInputError` where the environment does not say who they are.
        """
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
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
            if dist.is_initialized():  # the address in the environment is taken: ask over the group that is there
                rank, size = dist.get_rank(), dist.get_world_size()
                master = _listen(host) if rank == 0 else None
                place: list[Any] = [master.port if rank == 0 else None]
                dist.broadcast_object_list(place, src=0)
                port = int(place[0])
            else:
                shared, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=start_s)))
                shared = dist.PrefixStore("star-attention", shared)
                if rank == 0:
                    master = _listen(host)
                    shared.set("port", str(master.port))
                port = int(shared.get("port"))
                _KEPT.append(shared)  # where rank 0 holds it, the others still read
        except (RuntimeError, ValueError, OSError) as error:
            raise RankError(None, "the start", f"the ranks did not find each other ({_first_line(error)})") from error
        return cls(rank, size, host, port, master=master, **settings)

    @classmethod
    def wanted(cls) -> bool:
        """Whether the environment says that this process is one of several."""
        return (os.environ.get("WORLD_SIZE") or "1") != "1"

    # ------------------------------------------------------------------ devices

    def use(self, device: torch.device) -> None:
        """Choose the transport of tensors: NCCL where every rank has a GPU of its own, gloo otherwise. Collective."""
        mine = None
        if device.type == "cuda":
            mine = (socket.gethostname(), torch.cuda.current_device() if device.index is None else device.index)
        everyone = self.gather(mine)
        own_gpu = None not in everyone and len(set(everyone)) == self.size
        if own_gpu and dist.is_nccl_available():
            torch.cuda.set_device(device)
            self._data = self._group("nccl", self.size)
            self._among.clear()

    @property
    def backend(self) -> str:
        return "gloo" if self._data is self._control else "nccl"

    # ------------------------------------------------------------------ what all ranks hold a part of

    def register(self, context: Any) -> int:
        """A number for a context, the same on all ranks, so that rank 0 can say which one it means."""
        self._keys += 1
        self._contexts[self._keys] = context
        return self._keys

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
    def call(self, where: str) -> Iterator[None]:
        """One public call, on all ranks: an exception in it is told to the others, and theirs is raised here.

        Afterwards the ranks have met again, so that the next call finds them together.
        """
        with self._lock:
            if self._broken is not None:
                raise self._broken
            if self._depth:
                yield
                return
            self._depth = 1
            self._watch.state(BUSY)
            self._watch.tick(where)
            try:
                yield
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                self._depth = 0
                self._watch.state(IDLE)
                self._watch.tick("between calls")

    def _fail(self, error: BaseException) -> None:
        if error is self._agreed:  # every rank raises it by itself, and all are where they were
            return
        fault = self._watch.fault
        # (What ends this rank from outside is told to nobody: as a rule another has died, and that is the cause.)
        interrupted = isinstance(error, KeyboardInterrupt)
        can_meet = isinstance(error, Exception) and (fault is None or fault.name is not None)
        if interrupted or (can_meet and not isinstance(error, RankError)):
            self._watch.tell_failure(type(error).__name__, "interrupted" if interrupted else str(error))
        if can_meet and self._recover():
            return
        self._broken = (
            error if isinstance(error, RankError) else RankError(None, self._watch.where, f"a call failed ({error})")
        )
        if isinstance(error, Exception):  # (else it is about to look for the rank that has died)
            self._watch.leave(_first_line(self._broken))

    def _recover(self) -> bool:
        """Meet the other ranks after an exception; new groups where some were left in the middle of a collective."""
        self._watch.state(WAITING)
        notes = self._watch.meet(f"met/{self._watch.epoch}", f"{self._issued} {self._open}")
        if notes is None:
            return False
        self._watch.epoch += 1
        self._watch.fault = None
        if len(set(notes)) > 1 or self._open:
            try:
                backend = self.backend
                abandoned = [self._control, self._data, *self._among.values()]
                self._control = self._group("gloo", self.size)
                self._data = self._control if backend == "gloo" else self._group(backend, self.size)
                self._among.clear()
                _KEPT.extend(abandoned)
                self._issued = self._open = 0
            except RuntimeError:
                return False
        return True

    def tick(self, where: str | None = None) -> None:
        """The work got on (a layer, a step); raises what the watch found out about other ranks."""
        self._watch.tick(where)
        if self._depth:
            self._check()

    def _check(self) -> None:
        fault = self._watch.check()
        if fault is not None:
            raise _as_error(fault)

    def progress(self, done: int, total: int) -> None:
        """How much of its share of phase 1 this rank has done, in tokens; the others may ask with `lines`."""
        self._watch.share = (done, total)

    def lines(self) -> list[dict[str, Any]]:
        """What every rank last said about itself: `where`, `state`, `done` and `total` tokens."""
        return list(self._watch.lines)

    def diagnosis(self, cause: str) -> RankError:
        """Why this rank is told to end from outside: the rank that has died, or `cause` where all seem well."""
        fault = self._watch.suspect(cause)
        return RankError(fault.rank, fault.where, fault.cause)

    # ------------------------------------------------------------------ messages

    def tell(self, message: Any) -> None:
        """Rank 0 to all others; one small broadcast unless the message is long."""
        data = pickle.dumps(message)
        packet = bytearray(_PACKET)
        packet[:_LENGTH] = len(data).to_bytes(_LENGTH, "little")
        packet[_LENGTH : _LENGTH + len(data)] = data[: _PACKET - _LENGTH]
        self._send(torch.frombuffer(packet, dtype=torch.uint8))
        rest = data[_PACKET - _LENGTH :]
        if rest:
            self._send(torch.frombuffer(bytearray(rest), dtype=torch.uint8))

    def hear(self) -> Any:
        """What rank 0 told."""
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

    def _send(self, message: Tensor) -> None:
        self._issue(self._control, lambda group: group.broadcast(message, 0)).wait()

    def _collect(self, part: Tensor, group: Any) -> list[Tensor]:
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._issue(group, lambda group: group.allgather(parts, part)).wait()
        return parts

    def decide(self, decision: Callable[[], Any]) -> Any:
        """Rank 0's result on every rank, or its exception raised on every rank."""
        if self.rank == 0:
            try:
                value = decision()
            except Exception as error:
                self._agreed = error
                self.tell((False, _told(error)))
                raise
            self.tell((True, value))
            return value
        fine, value = self.hear()
        if not fine:
            self._agreed = errors.rebuilt(*value)
            raise self._agreed
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on all ranks, in the order of ranks."""
        data = pickle.dumps(value)
        longest = max(int(length) for length in self._collect(torch.tensor([len(data)]), self._control))
        mine = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        return [pickle.loads(part.numpy().tobytes()) for part in self._collect(mine, self._control)]

    def agreed(self, error: Exception) -> Exception:
        """Mark an exception that every rank raises by itself at this place: there is nobody to tell."""
        self._agreed = error
        return error

    def all_fine(self, failure: Exception | None) -> None:
        """Raise what any rank failed with, on all ranks; None for this rank's success."""
        for rank, told in enumerate(self.gather(None if failure is None else _told(failure))):
            if told is not None:
                name, message, reasons = told
                self._agreed = failure if rank == self.rank else errors.rebuilt(name, message, reasons, rank)
                assert self._agreed is not None
                raise self._agreed

    # ------------------------------------------------------------------ tensors

    def broadcast(self, tensor: Tensor, ranks: int) -> Pending:
        """Rank 0's contiguous tensor, or room for it, to the first `ranks` ranks, of which this is one."""
        assert tensor.is_contiguous() and self.rank < ranks <= self.size
        self.traffic.add(wire.broadcast_bytes(tensor.numel() * tensor.element_size(), ranks))
        if ranks == self.size:
            group = self._data
        else:
            if ranks not in self._among:
                self._among[ranks] = self._group(self.backend, ranks)
            group = self._among[ranks]
        staged = self._staged(tensor, fill=self.rank == 0)
        pending = self._issue(group, lambda group: group.broadcast(staged, 0))
        return Pending(lambda: self._unstage(pending, staged, tensor if self.rank else staged))

    def exchange(self, tensor: Tensor, received: Tensor, *, target: int, source: int, total: int) -> Pending:
        """Send a flat tensor to one rank and receive one from another; either may be empty. Collective.

        total: numbers that move between all ranks together.
        """
        assert tensor.dim() == received.dim() == 1 and tensor.is_contiguous() and received.is_contiguous()
        self.traffic.add(total * received.element_size())
        out, into = self._staged(tensor, fill=True), self._staged(received, fill=False)
        # (Not send and recv: gloo's cannot be waited for a while without breaking the connection.)
        sent, got = [0] * self.size, [0] * self.size
        sent[target], got[source] = out.numel(), into.numel()
        pending = self._issue(self._data, lambda group: group.alltoall_base(into, out, got, sent))
        return Pending(lambda: self._unstage(pending, into, received))

    def merge(self, state: State) -> State:
        """The state over all ranks' keys, the same bits on every rank (paper, Algorithm 2)."""
        out_BQHD, lse_BQH = state.out_BQHD.float(), state.lse_BQH.contiguous()
        rows, size = lse_BQH.numel(), out_BQHD.shape[-1]
        how = self.merge_collective or wire.merge_choice(self.size, rows, size)
        if how == "gather":
            packed = torch.cat([out_BQHD, lse_BQH[..., None]], -1).contiguous()
            self.traffic.add(wire.gather_bytes(packed.numel() * packed.element_size(), self.size))
            parts = [part.to(packed.device) for part in self._collect(self._staged(packed, fill=True), self._data)]
            return merge([State(part[..., :-1], part[..., -1]) for part in parts])
        top_BQH = self._reduced(lse_BQH.clone(), dist.ReduceOp.MAX)
        # Rows that no rank has keys for: -inf - -inf is NaN, and any weight is right for a zero row.
        weight_BQH = (lse_BQH - top_BQH).exp().nan_to_num(0.0)
        packed = torch.cat([out_BQHD * weight_BQH[..., None], weight_BQH[..., None]], -1).contiguous()
        packed = self._reduced(packed, dist.ReduceOp.SUM)
        sum_BQH = packed[..., -1]
        out_BQHD = packed[..., :-1] / sum_BQH.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        return State(out_BQHD, top_BQH + sum_BQH.log())

    def _reduced(self, tensor: Tensor, op: Any) -> Tensor:
        staged = self._staged(tensor, fill=True)
        self.traffic.add(wire.reduce_bytes(tensor.numel() * tensor.element_size(), self.size))
        self._issue(self._data, lambda group: group.allreduce(staged, op)).wait()
        return staged.to(tensor.device)

    def _device(self, tensor: Tensor) -> torch.device:
        return torch.device("cpu") if self.backend == "gloo" else tensor.device

    def _staged(self, tensor: Tensor, *, fill: bool) -> Tensor:
        """The tensor where the transport can reach it: gloo's is in the memory of the host."""
        device = self._device(tensor)
        if device == tensor.device:
            return tensor
        return tensor.to(device) if fill else torch.empty_like(tensor, device=device)

    @staticmethod
    def _unstage(pending: Pending, staged: Tensor, tensor: Tensor) -> None:
        pending.wait()
        if staged is not tensor:
            tensor.copy_(staged)

    # ------------------------------------------------------------------ waiting

    def _issue(self, group: Any, collective: Callable[[Any], Any]) -> Pending:
        self._check_alive()
        self._issued += 1
        self._open += 1
        work = collective(group)

        def wait() -> None:
            self._wait(work, group)
            self._open -= 1

        return Pending(wait)

    def _check_alive(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._depth:
            self._check()

    def _wait(self, work: Any, group: Any) -> None:
        if self._is_nccl(group):  # the stream waits; where a rank is lost, the watch ends the collective
            work.wait()
            return
        self._watch.state(WAITING)
        try:
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
                        raise _as_error(self._watch.suspect(_first_line(error))) from error
        finally:
            self._watch.state(BUSY if self._depth else IDLE)

    def _is_nccl(self, group: Any) -> bool:
        return self.backend == "nccl" and group is not self._control

    def _abort(self) -> None:
        """End collectives that run on the device, where nobody could look out for faults."""
        if self.backend == "nccl":
            for group in (self._data, *self._among.values()):
                group.abort()

    def close(self) -> None:
        """Leave the other ranks, who are told."""
        self._watch.close()
        if self._broken is not None or self._open:
            _KEPT.extend([self._control, self._data, *self._among.values()])


_KEPT: list[Any] = []
"""Stores that others still read, and groups with a collective that never ends (taking one down would wait for it)."""


def _told(error: Exception) -> tuple[str, str, list[str] | None]:
    """What `errors.rebuilt` makes an exception of again."""
    return type(error).__name__, str(error), getattr(error, "reasons", None)


def _as_error(fault: Fault) -> BaseException:
    """The error of a fault: the other rank's own exception where it raised one that users know."""
    if fault.name is not None:
        return errors.rebuilt(fault.name, f"{fault.message} (on rank {fault.rank}, in {fault.where})", None, fault.rank)
    return RankError(fault.rank, fault.where, fault.cause)


def _store(host: str, port: int, timeout_s: float) -> Any:
    timeout = timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)


def _listen(host: str) -> Any:
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=START_S))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def from_environment(comm: Any, *, stall_s: float = STALL_S) -> Comm:
    """The communicator that `StarLLM(comm=...)` means: None takes torchrun's environment if there is one.

    stall_s: the longest silence of a rank; counts when the first engine of a process is made.
    """
    if isinstance(comm, (SoloComm, TorchComm)):
        return comm
    if comm not in (None, "solo"):
        raise InvalidInputError(f"comm {comm!r} is unknown; use None, 'solo' for one process, or a TorchComm")
    if comm == "solo" or not (TorchComm.wanted() or (dist.is_initialized() and dist.get_world_size() > 1)):
        return SoloComm()
    if not _OWN:
        _OWN.append(TorchComm.from_environment(stall_s=stall_s))
        atexit.register(_OWN[0].close)
    return _OWN[0]


_OWN: list[TorchComm] = []  # one for all engines of a process


def own() -> TorchComm | None:
    """The communicator that this process made from torchrun's environment, if it has."""
    return _OWN[0] if _OWN else None
