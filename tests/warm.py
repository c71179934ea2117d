"""Python programs in processes of their own that are forked: torch is imported once for all.

A fresh process imports torch and transformers for five seconds of a core. `python(*arguments)` is a
command line to run instead of `python ARGUMENTS`: a small client, which has a server fork a process
that has the client's streams, folder and environment. The client passes signals on, ends as its
process does, and takes it along when it is killed. Tests of imports, of memory and of torchrun
start fresh processes all the same.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NoReturn

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGCONT)
_LENGTH = struct.Struct("<Q")
_STATUS = struct.Struct("<i")


def python(*arguments: str | Path) -> list[str]:
    """Return a command that runs `python ARGUMENTS` in a forked process.

    Arguments are those of a script, or begin with `-c` or `-m`.
    """
    if not hasattr(os, "pidfd_open"):
        return [sys.executable, *map(str, arguments)]
    # Without site-packages: it starts in 20 ms.
    return [sys.executable, "-I", "-S", __file__, _server(), *map(str, arguments)]


@functools.cache
def _server() -> str:
    """Start the server, which ends with this process; return the path of its socket."""
    path = str(Path(tempfile.mkdtemp(prefix="warm-")) / "socket")
    process = subprocess.Popen(
        [sys.executable, __file__, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    _SERVERS.append(process)
    return path


_SERVERS: list[subprocess.Popen[bytes]] = []
"""Kept open: a server ends when its standard input does."""


# -------------------------------------------------------------------------------- the client


def _client(path: str, arguments: list[str]) -> None:
    streams = [number for number in (0, 1, 2) if _is_open(number)]
    request = dict(
        arguments=arguments, streams=streams, folder=os.getcwd(), environment=dict(os.environ)
    )
    data = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [_LENGTH.pack(len(data))], streams)
    connection.sendall(data)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
    status = _STATUS.unpack(_receive(connection, _STATUS.size))[0]
    if status < 0:
        with contextlib.suppress(OSError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side of the connection has ended")
        data += part
    return data


# -------------------------------------------------------------------------------- the server


def _serve(path: str) -> list[str]:
    """Fork a process for each client; return in each of them, with its arguments."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    _import_everything()
    os.write(1, b"ready\n")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os.unlink(path)
            os.rmdir(os.path.dirname(path))
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with contextlib.suppress(ConnectionError):
            header, streams, *_ = socket.recv_fds(connection, _LENGTH.size, 3)
            request = json.loads(_receive(connection, *_LENGTH.unpack(header)))
            child = os.fork()
            if not child:
                connection.close()
                return _become(request, streams)
            for number in streams:
                os.close(number)
            _watch(connection, child)
        os._exit(0)


_MODULES = (
    "tests.dist.preload",
    "transformers.models.llama.modeling_llama",
    "star_attention.cli.chat",
    "star_attention.cli.encode",
    "star_attention.cli.generate",
    "star_attention.cli.serving",
)


def _import_everything() -> None:
    for name in _MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _watch(connection: socket.socket, child: int) -> None:
    """Pass signals on until the child ends, and tell how; kill it if the client ends first."""
    end = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([end, connection], [], [])
        if end in ready:
            _, status = os.waitpid(child, 0)
            connection.sendall(_STATUS.pack(os.waitstatus_to_exitcode(status)))
            return
        numbers = connection.recv(64)
        for number in numbers or [signal.SIGKILL]:
            os.kill(child, number)
        if not numbers:
            return


def _become(request: dict[str, Any], streams: list[int]) -> list[str]:
    """Take over a client's streams, folder and environment."""
    received = dict(zip(request["streams"], streams, strict=True))
    for number in (0, 1, 2):
        if number in received:
            os.dup2(received[number], number)
        else:
            os.close(number)
    for number in streams:
        os.close(number)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_streams(received)
    random.seed()
    return list(request["arguments"])


def _open_streams(received: dict[int, int]) -> None:
    """Make Python's objects of the streams, as a fresh process does."""
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        stream = None
        if number in received:
            stream = os.fdopen(
                number,
                "w" if number else "r",
                closefd=False,
                errors="backslashreplace" if number == 2 else "strict",
            )
            stream.reconfigure(line_buffering=number == 2 or stream.isatty())
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _run(arguments: list[str]) -> None:
    first, *others = arguments
    if first == "-m":
        sys.argv, sys.path[0] = others, os.getcwd()
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *others[1:]], os.getcwd()
        exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def _end(arguments: list[str]) -> NoReturn:
    """Run a program and end as Python does, but for taking 3,000 modules apart."""
    status = 0
    try:
        _run(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except OSError:
                status = status or 120
    os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _client(sys.argv[1], sys.argv[2:])
    sys.path[0] = os.getcwd()
    _end(_serve(sys.argv[1]))
