"""Checksums of tensors that every bit counts in, computed on the tensors' own device.

A tensor's bytes, as 64-bit words in rows, are multiplied with fixed odd numbers and summed modulo
2^64: as fast as memory on a CPU and a GPU, with the same result on both. SHA-256 covers the sums of
all rows. This notices every change but a forged one: it tells models apart, and is not a signature.

Axes: R rows, C words of a row.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_COLUMNS = 1 << 12
_ROWS_AT_ONCE = {"cpu": 7, "cuda": 1 << 11}
"""Rows whose intermediate results stay in a CPU core's cache, or take 64 MiB on a GPU."""

_WORTH_THREADS = 1 << 26
"""Bytes on the CPU from which on several threads compute the sums of different tensors."""


def digests(tensors: Iterable[Tensor]) -> list[bytes]:
    """Return the SHA-256 of each tensor's data type, shape and bytes.

    Tensors without data (on the meta device) have that of their type and shape.
    """
    parts = [list(plain_parts(tensor)) for tensor in tensors]
    sums = iter(_all_row_sums([part for each in parts for part in each if not part.is_meta]))
    result = []
    for each in parts:
        digest = hashlib.sha256()
        for part in each:
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            if not part.is_meta:
                digest.update(next(sums).numpy().tobytes())
        result.append(digest.digest())
    return result


def _all_row_sums(tensors: list[Tensor]) -> list[Tensor]:
    """Return the row sums of several tensors, on the CPU."""
    threads = torch.get_num_threads()
    if threads > 1 and sum(tensor.nbytes for tensor in tensors if tensor.is_cpu) > _WORTH_THREADS:
        with ThreadPoolExecutor(threads) as pool:
            return to_cpu(list(pool.map(_row_sums, tensors)))
    return to_cpu([_row_sums(tensor) for tensor in tensors])


def plain_parts(tensor: Any) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of: quantized ones hold several."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None and type(tensor) not in (Tensor, torch.nn.Parameter):
        for name in flatten()[0]:
            yield from plain_parts(getattr(tensor, name))
        return
    yield tensor.detach()
    # bitsandbytes keeps the scales of its weights beside them.
    state = getattr(tensor, "quant_state", None)
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name, None)
        if isinstance(value, Tensor):
            yield value.detach()


def to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Copy flat tensors of one type to the CPU in one transfer per device, keeping their order."""
    on_cpu: dict[int, Tensor] = {}
    for device in {tensor.device for tensor in tensors}:
        indices = [index for index, tensor in enumerate(tensors) if tensor.device == device]
        joined = torch.cat([tensors[index] for index in indices]).cpu()
        parts = joined.split([tensors[index].numel() for index in indices])
        on_cpu |= dict(zip(indices, parts, strict=True))
    return [on_cpu[index] for index in range(len(tensors))]


@torch.no_grad()
def _row_sums(tensor: Tensor) -> Tensor:
    """Return the weighted sums of a tensor's words by row, int64 `[R]`."""
    words = _words(tensor)
    factors_C = _factors().to(words.device)
    whole = words.numel() // _COLUMNS * _COLUMNS
    rows_RC, rest = words[:whole].view(-1, _COLUMNS), words[whole:]
    at_once = _ROWS_AT_ONCE.get(words.device.type, _ROWS_AT_ONCE["cpu"])
    buffer_RC = torch.empty_like(rows_RC[:at_once])
    sums = [
        _weighted(part_RC, factors_C, buffer_RC[: len(part_RC)])
        for part_RC in rows_RC.split(at_once)
    ]
    if rest.numel():
        sums.append(_weighted(rest[None], factors_C[: rest.numel()], torch.empty_like(rest[None])))
    return torch.cat(sums)


def _weighted(rows_RC: Tensor, factors_C: Tensor, buffer_RC: Tensor) -> Tensor:
    # A product passes a changed bit upwards only, so that the sign bits of two floats could cancel:
    # the upper half of each word is added to the lower.
    torch.bitwise_right_shift(rows_RC, 32, out=buffer_RC).add_(rows_RC)
    if rows_RC.device.type == "cpu":
        return torch.mv(buffer_RC, factors_C)
    return buffer_RC.mul_(factors_C).sum(1)


def _words(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes as int64, padded with zeros; a view if possible."""
    flat = tensor.contiguous().view(-1)
    if flat.dtype == torch.bool or flat.is_complex():
        flat = flat.view(torch.uint8)
    per_word = 8 // flat.element_size()
    if per_word == 1:
        return flat.view(torch.int64)
    whole = flat.numel() // per_word * per_word
    is_aligned = flat.data_ptr() % 8 == 0 and flat.storage_offset() % per_word == 0
    if whole == flat.numel() and is_aligned:
        return flat.view(torch.int64)
    padded = torch.zeros(-(-flat.numel() // per_word) * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel() * flat.element_size()] = flat.view(torch.uint8)
    return padded.view(torch.int64)


@functools.cache
def _factors() -> Tensor:
    """Return fixed odd numbers, one for each word of a row."""
    data = hashlib.shake_128(b"star-attention").digest(8 * _COLUMNS)
    return torch.frombuffer(bytearray(data), dtype=torch.int64) | 1
