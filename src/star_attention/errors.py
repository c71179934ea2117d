"""Every exception that the library raises on purpose.

    StarAttentionError
    ├── InvalidInputError (ValueError)        a value that cannot work: says the value, the limit and the remedy
    │   ├── SizeError                         block, anchor or forward sizes
    │   ├── ContextLengthError                more tokens than the model, or the encoded context, has positions for
    │   ├── TokenError                        token ids outside the vocabulary, or no tokens at all
    │   ├── TextError                         a text file that cannot be read as UTF-8
    │   └── ModelNotFoundError                a model folder or tokenizer that is missing or unreadable
    ├── UnsupportedModelError (ValueError)    a model family that Star Attention cannot run, with the reasons
    ├── ContextFileError (ValueError)         a saved context
    │   ├── CorruptContextError               truncated, changed, or not such a file
    │   ├── ContextMismatchError              made with another model, tokenizer or setting: names the field
    │   ├── ContextNotFoundError (also FileNotFoundError)    there is none
    │   └── ContextSaveError (also OSError)   could not be written; what was there before is untouched
    ├── RankError (also RuntimeError)         another rank died, hangs or failed, or the network between them is cut
    ├── UnknownOptionError (also TypeError)   a word that `generate` or `from_pretrained` does not take, with what may be meant
    ├── MissingPackageError (also ImportError)  an optional package is missing: gives the command that installs it
    └── OutOfMemoryError (also MemoryError)   says which size to lower

Other wrong argument names are a `TypeError`, as for any Python call.
"""

from __future__ import annotations

import builtins
import contextlib
import traceback
from collections.abc import Iterator


class StarAttentionError(Exception):
    """Base class of every error raised by this library on purpose."""


class InvalidInputError(StarAttentionError, ValueError):
    """A value that cannot work; the message says the value, the limit and the remedy."""


class SizeError(InvalidInputError):
    """A block, anchor or forward size that cannot work."""


class ContextLengthError(InvalidInputError):
    """More tokens than the model, or the encoded context, has positions for."""


class TokenError(InvalidInputError):
    """Token ids outside the vocabulary, or no tokens at all."""


class TextError(InvalidInputError):
    """A text file that is missing, unreadable or not UTF-8."""


class ModelNotFoundError(InvalidInputError):
    """A model folder, hub id or tokenizer that is missing or unreadable."""


class UnsupportedModelError(StarAttentionError, ValueError):
    """A model that Star Attention cannot run; `reasons` lists why."""

    def __init__(self, name: str, reasons: list[str]) -> None:
        self.name = name
        self.reasons = list(reasons)
        super().__init__(f"{name} cannot run with Star Attention: " + "; ".join(self.reasons))


class UnsupportedCallError(StarAttentionError, ValueError):
    """No attention kernel can run a call; the message lists every kernel's reasons."""


class ContextFileError(StarAttentionError, ValueError):
    """A saved context that cannot be used."""


class CorruptContextError(ContextFileError):
    """The file is truncated, was changed, or is not a saved context."""


class ContextMismatchError(ContextFileError):
    """The context was made with another model, tokenizer or setting; `field` names what differs."""

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


class ContextNotFoundError(ContextFileError, FileNotFoundError):
    """There is no saved context at this path."""


class ContextSaveError(ContextFileError, OSError):
    """A context could not be written; a file that stood there before is untouched."""


class UnknownOptionError(StarAttentionError, TypeError):
    """A word that `generate` or `from_pretrained` does not take."""


class MissingPackageError(StarAttentionError, ImportError):
    """An optional package is missing; the message gives the command that installs it."""


class OutOfMemoryError(StarAttentionError, MemoryError):
    """The device or the machine ran out of memory; the message says which size to lower."""


@contextlib.contextmanager
def release_frames_on_oom() -> Iterator[None]:
    """What a call took before an `OutOfMemoryError` is freed, even while somebody holds the error.

    (Its traceback would keep the variables of all that ran, and with them keys and values.)
    """
    try:
        yield
    except OutOfMemoryError as error:
        for one in (error, error.__cause__):
            if one is not None:
                traceback.clear_frames(one.__traceback__)
        raise


class RankError(StarAttentionError, RuntimeError):
    """The ranks cannot go on: `rank` is the one at fault (None where it is not one), `where` what it was doing."""

    def __init__(self, rank: int | None, where: str, cause: str) -> None:
        self.rank, self.where, self.cause = rank, where, cause
        who = "the ranks" if rank is None else f"rank {rank}"
        super().__init__(f"{who} failed in {where}: {cause}")


def rebuilt(
    name: str, message: str, reasons: list[str] | None = None, rank: int | None = None
) -> Exception:
    """An exception that another rank raised, from what was told about it.

    Ours and Python's own keep their type, so that they can be caught as on one rank; others become a `RankError`.
    """
    kind = globals().get(name) or getattr(builtins, name, None)
    if kind is UnsupportedModelError:
        return UnsupportedModelError(message.partition(" cannot run")[0], reasons or [message])
    if kind is ContextMismatchError:
        return ContextMismatchError(message.partition("its ")[2].partition(" ")[0], message)
    if kind is KeyboardInterrupt:
        return RankError(rank, "a call", "it was interrupted")
    if isinstance(kind, type) and issubclass(kind, Exception) and kind is not RankError:
        with contextlib.suppress(TypeError):  # some of Python's own need more than a message
            return kind(message)
    return RankError(rank, "a call", f"{name}: {message}")
