"""Out-of-memory errors: detect, retry after a garbage collection, translate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from star_attention.errors import OutOfMemoryError, StarAttentionError


def is_out_of_memory(error: BaseException) -> bool:
    """True if the device or the machine ran out of memory."""
    # torch reports that host memory is exhausted as a plain RuntimeError of its allocator.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def allocate(make: Callable[[], Tensor]) -> Tensor:
    """Return `make()`, called once more after a garbage collection if memory ran out."""
    # Python's garbage collector counts objects, not their bytes, so that whole contexts may wait
    # for it. torch.compile, for one, leaves references to the first context that it saw.
    try:
        return make()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    gc.collect()
    return make()


@contextmanager
def translate_oom(message: Callable[[], str]) -> Iterator[None]:
    """Raise our `OutOfMemoryError` with `message()` if memory runs out inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or isinstance(error, StarAttentionError):
            raise
        raise OutOfMemoryError(message()) from error
