"""All exceptions that the library raises on purpose; catch `StarAttentionError` for any of them.

    StarAttentionError
    ├── InvalidInputError (ValueError)      an invalid value: the message gives value, limit, remedy
    │   ├── SizeError                       block, anchor or forward size
    │   ├── ContextLengthError              more tokens than model or context has positions for
    │   ├── TokenError                      token ids outside the vocabulary, or no tokens at all
    │   ├── TextError                       text with half characters; text file missing, not UTF-8
    │   └── ModelNotFoundError              model folder, hub id or tokenizer, missing or unreadable
    ├── UnsupportedModelError (ValueError)  model that Star Attention cannot run, with the reasons
    ├── UnsupportedCallError (ValueError)   attention call that no kernel can run, with the reasons
    ├── ContextFileError (ValueError)       saved context that cannot be used
    │   ├── CorruptContextError             truncated, modified, or not a saved context
    │   ├── ContextMismatchError            of another model, tokenizer or setting: names the field
    │   ├── ContextNotFoundError (FileNotFoundError)  no saved context at the path
    │   └── ContextSaveError (OSError)      cannot be written; an existing file is left unchanged
    ├── UnknownOptionError (TypeError)      unknown keyword, with the closest valid one
    ├── MissingPackageError (ImportError)   optional package not installed, with the install command
    ├── NonFiniteError (ArithmeticError)    model that computes NaN or infinity; says why
    ├── OutOfMemoryError (MemoryError)      names the setting to lower
    └── RankError (RuntimeError)            another rank died, hung, failed or cannot be reached

In parentheses: the built-in exception that a class also derives from. Any other wrong argument is
an ordinary `TypeError`.
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class StarAttentionError(Exception):
    """Base class of all errors that the library raises on purpose.

    All of them can be pickled, which process pools do: a class whose arguments are not its message
    says how to make it again in `__reduce__`.
    """


class InvalidInputError(StarAttentionError, ValueError):
    """A value is invalid; the message gives the value, the limit and the remedy."""


class SizeError(InvalidInputError):
    """A block, anchor or forward size is invalid."""


class ContextLengthError(InvalidInputError):
    """There are more tokens than the model, or the encoded context, has positions for."""


class TokenError(InvalidInputError):
    """Token ids are outside the vocabulary, or there are no tokens at all."""


class TextError(InvalidInputError):
    """A text has half a character or NULs, or its file is missing, unreadable or not UTF-8."""


class ModelNotFoundError(InvalidInputError):
    """A model folder, hub id or tokenizer is missing or unreadable."""


class UnsupportedModelError(StarAttentionError, ValueError):
    """Star Attention cannot run a model.

    Attributes:
        name: the model's type or class.
        reasons: the reasons, one sentence each.
    """

    def __init__(self, name: str, reasons: list[str]) -> None:
        self.name = name
        self.reasons = list(reasons)
        super().__init__(f"{name} cannot run with Star Attention: " + "; ".join(self.reasons))

    def __reduce__(self) -> Any:
        return type(self), (self.name, self.reasons), self.__dict__


class UnsupportedCallError(StarAttentionError, ValueError):
    """No attention kernel can run a call; the message lists the reasons of each kernel."""


class ContextFileError(StarAttentionError, ValueError):
    """A saved context cannot be used."""


class CorruptContextError(ContextFileError):
    """A file is truncated, was modified, or is not a saved context."""


class ContextMismatchError(ContextFileError):
    """A context was encoded with another model, tokenizer or setting.

    Attributes:
        field: the first field that differs, such as `config.vocab_size`.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)

    def __reduce__(self) -> Any:
        return type(self), (self.field, str(self)), self.__dict__


class ContextNotFoundError(ContextFileError, FileNotFoundError):
    """There is no saved context at a path."""


class ContextSaveError(ContextFileError, OSError):
    """A context cannot be written; a file that was at the path before is left unchanged."""


class UnknownOptionError(StarAttentionError, TypeError):
    """A call does not take a keyword; the message suggests what may be meant."""


class MissingPackageError(StarAttentionError, ImportError):
    """An optional package is not installed; the message gives the install command."""


class NonFiniteError(StarAttentionError, ArithmeticError):
    """A model computed NaN or infinity, so that its answers mean nothing; says what to do."""


class OutOfMemoryError(StarAttentionError, MemoryError):
    """The device or the machine ran out of memory; the message names the setting to lower."""


class RankError(StarAttentionError, RuntimeError):
    """The ranks cannot continue, because one of them died, hung, failed or cannot be reached.

    Attributes:
        rank: the rank at fault, None if no single rank is at fault.
        where: what that rank was doing.
        cause: what went wrong.
    """

    def __init__(self, rank: int | None, where: str, cause: str) -> None:
        self.rank, self.where, self.cause = rank, where, cause
        subject = "the ranks" if rank is None else f"rank {rank}"
        super().__init__(f"{subject} failed in {where}: {cause}")

    def __reduce__(self) -> Any:
        return type(self), (self.rank, self.where, self.cause), self.__dict__


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none.

    A line that ends in a colon is completed by the next.
    """
    if isinstance(error, KeyError):
        # Its message is the key alone.
        return f"there is no {error}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


QUOTED_CHARACTERS = 80
"""Most characters of a user's value that a message repeats."""
_LONGEST_FILE_NAME = 255


def quote(value: object) -> str:
    """Return a value for a message, as `repr` shows it, cut after `QUOTED_CHARACTERS`.

    Messages end in logs and bug reports, where a document does not belong.
    """
    if isinstance(value, str) and len(value) > QUOTED_CHARACTERS:
        return f"{value[:QUOTED_CHARACTERS]!r}... ({len(value):,} characters)"
    # The length of the quotation marks is not the value's.
    shown, most = repr(value), QUOTED_CHARACTERS + 2
    return shown if isinstance(value, str) or len(shown) <= most else f"{shown[:most]}..."


def quote_path(path: object) -> str:
    """Return a path that does not exist for a message.

    All of it if its folder exists, else the end if it is long: it may be a text.
    """
    name = str(path)
    folder, file = os.path.split(name)
    is_path = bool(folder) and len(file) <= _LONGEST_FILE_NAME and os.path.isdir(folder)
    return name if is_path or len(name) <= QUOTED_CHARACTERS else f"...{name[-QUOTED_CHARACTERS:]}"


OF_THE_ENGINE = "it is a setting of the engine: use star.with_config({}=...)"
"""What to do with a keyword that is a field of `StarConfig`, for `unknown_option`."""


def unknown_option(
    call: str, name: str, *, known: Iterable[str], instead: Mapping[str, str], otherwise: str
) -> UnknownOptionError:
    """Return the error for a keyword that a call does not take.

    Args:
        call: the call, as the user writes it.
        name: the unknown keyword.
        known: keywords that the call takes; the nearest one is suggested.
        instead: what to use instead of keywords that other libraries take.
        otherwise: the remedy where no keyword is near.
    """
    near = difflib.get_close_matches(name, known, n=1)
    remedy = instead.get(name) or (f"did you mean {quote(near[0])}?" if near else otherwise)
    return UnknownOptionError(f"{call} does not take {quote(name)}; {remedy}")


@contextlib.contextmanager
def explained_by(check: Callable[[], None] | None) -> Iterator[None]:
    """Call a check if the block fails: the error that it raises may be the reason."""
    try:
        yield
    except Exception:
        if check is not None:
            check()
        raise


@contextlib.contextmanager
def release_frames_on_oom() -> Iterator[None]:
    """Free the local variables of a call that raises `OutOfMemoryError`."""
    # The traceback would otherwise keep them, keys and values among them, for as long as anybody
    # holds the error.
    try:
        yield
    except OutOfMemoryError as error:
        release_frames(error)
        raise


def release_frames(error: BaseException) -> None:
    """Free the local variables of the calls that an error has come through."""
    for link in (error, error.__cause__, error.__context__):
        if link is not None:
            traceback.clear_frames(link.__traceback__)


def rebuild(
    name: str, message: str, reasons: list[str] | None = None, rank: int | None = None
) -> Exception:
    """Rebuild an exception that another rank raised.

    Our exceptions and the built-in ones keep their type, so that callers catch them as on one rank.

    Args:
        name: name of its type.
        message: its message.
        reasons: its `reasons`, if it has any.
        rank: the rank that raised it.

    Returns:
        An exception of the same type, or a `RankError` for types that cannot be rebuilt.
    """
    kind = globals().get(name) or getattr(builtins, name, None)
    if kind is UnsupportedModelError:
        return UnsupportedModelError(message.partition(" cannot run")[0], reasons or [message])
    if kind is ContextMismatchError:
        # The message of `hf.loading.identity.check`.
        field = message.partition("it differs in ")[2].partition(":")[0]
        return ContextMismatchError(field, message)
    if kind is KeyboardInterrupt:
        return RankError(rank, "a call", "it was interrupted")
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not RankError:
        # Some built-in exceptions take more than a message.
        with contextlib.suppress(TypeError):
            return kind(message)
    return RankError(rank, "a call", f"{name}: {message}")
