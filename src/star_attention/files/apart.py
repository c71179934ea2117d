"""Documents read in a process of their own, so that a hostile one costs no other work.

A few hundred bytes of a PDF or a Word document can unpack to gigabytes, or take minutes to read,
while the interpreter's lock is held. As a program, `python -m star_attention.files.apart`, this
module reads one document from standard input and writes its text.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from star_attention.errors import MissingPackageError, TextError, quote_path
from star_attention.files.documents import document_kind, document_text

_PROGRAM = (sys.executable, "-P", "-m", "star_attention.files.apart")
_ROOT = Path(__file__).parents[2]
"""The folder of the package, which programs may have put on their path by themselves."""
_PER_CORE_BYTES = 2**23
"""Stacks of the threads that packages begin, one per core."""
_NICENESS = 5
_TEXT, _MISSING, _REFUSED = b"+", b"?", b"-"
"""What the program writes first: before a text, or before why there is none."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What reading a document may take.

    Attributes:
        text_bytes: bytes of its text in UTF-8.
        memory_bytes: bytes of memory.
        seconds: seconds.
    """

    text_bytes: int
    memory_bytes: int = 4 * 2**30
    seconds: float = 300.0


async def document_text_apart(data: bytes, name: str, limits: Limits) -> str:
    """Return the text of a document, read in another process, which ends with this call.

    Args:
        data: the whole file, of a kind that `document_kind` knows.
        name: its name, for messages.
        limits: what it may take.

    Raises:
        TextError: it cannot be read, has no text, or takes more than the limits.
        MissingPackageError: markitdown is not installed.
    """
    wanted = {"name": name, "text": limits.text_bytes, "memory": limits.memory_bytes}
    head = json.dumps(wanted | {"seconds": limits.seconds}).encode()
    path = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    process = await asyncio.create_subprocess_exec(
        *_PROGRAM,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Readers complain of what they meet in a document, which no log is to hold.
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
    )
    try:
        async with asyncio.timeout(limits.seconds):
            written, _ = await process.communicate(head + b"\n" + data)
    except TimeoutError:
        raise _too_slow(name, limits.seconds) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    kind, text = written[:1], written[1:].decode("utf-8", "surrogatepass")
    if kind == _TEXT:
        return text
    if kind == _MISSING:
        raise MissingPackageError(text)
    raise TextError(text) if kind == _REFUSED else _too_slow(name, limits.seconds)


def _too_slow(name: str, seconds: float) -> TextError:
    return TextError(
        f"{quote_path(name)} could not be read: its reader ended early, or took more than"
        f" {seconds:g} seconds; convert it to text first"
    )


def main() -> None:
    """Read a document from standard input, and write its text or why there is none."""
    wanted = json.loads(sys.stdin.buffer.readline())
    name, most = wanted["name"], wanted["text"]
    _limit(wanted["memory"], wanted["seconds"])
    try:
        text = _text(sys.stdin.buffer.read(), name).encode("utf-8", "surrogatepass")
        if len(text) > most:
            raise TextError(
                f"{quote_path(name)} has {len(text):,} bytes of text, more than {most:,}; split it"
            )
        answer = _TEXT, text
    except MissingPackageError as error:
        answer = _MISSING, str(error).encode("utf-8", "surrogatepass")
    except TextError as error:
        why = _memory(name, wanted["memory"]) if _is_memory(error) else str(error)
        answer = _REFUSED, why.encode("utf-8", "surrogatepass")
    except MemoryError:
        answer = _REFUSED, _memory(name, wanted["memory"]).encode("utf-8", "surrogatepass")
    sys.stdout.buffer.write(b"".join(answer))


def _text(data: bytes, name: str) -> str:
    kind = document_kind(data)
    if kind is None:
        raise TextError(f"{quote_path(name)} is no document")
    return document_text(data, kind, name)


def _limit(memory_bytes: int, seconds: float) -> None:
    """Limit this process, where the system can; nothing waits for it."""
    try:
        import resource
    except ImportError:
        # Not on Windows.
        return
    os.nice(_NICENESS)
    most = memory_bytes + _PER_CORE_BYTES * (os.cpu_count() or 1)
    for what, limit in ((resource.RLIMIT_DATA, most), (resource.RLIMIT_CPU, int(seconds) + 1)):
        # One that is lower already stays.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (limit, limit))


def _is_memory(error: BaseException | None) -> bool:
    """True if memory ran out somewhere below a reader's error."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        attempts = getattr(error, "attempts", None) or []
        met = [each.exc_info[1] for each in attempts if each.exc_info]
        if isinstance(error, MemoryError) or any(isinstance(each, MemoryError) for each in met):
            return True
        error = error.__cause__ or error.__context__
    return False


def _memory(name: str, most: int) -> str:
    return (
        f"{quote_path(name)} takes more than {most:,} bytes of memory to read; convert it to text"
        " first, or split it"
    )


if __name__ == "__main__":
    main()
