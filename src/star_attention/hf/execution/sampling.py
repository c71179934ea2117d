"""Drawing of tokens, and their way to the host.

Axes: R rows = queries x answers each, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from star_attention.attention.kernels import triton_works


def highest(scores_RV: Tensor) -> Tensor:
    """Return the place of the highest score of each row, `[R]`: of equal ones, the first.

    Torch gives a whole row to one block of threads of a GPU, which takes 27 us for 128K scores.
    """
    if scores_RV.is_cuda and scores_RV.dtype != torch.float64 and triton_works(scores_RV.device):
        from star_attention.linear import triton_highest

        return triton_highest.highest(scores_RV.contiguous())
    return scores_RV.argmax(-1)


class Sampler:
    """Draws the next token of every row.

    With a seed each query has a generator of its own, so that its answers are the same alone and
    next to others; several answers to a query share it, as rows of the stock `generate` do.

    Args:
        seed: seed of each generator; None draws from torch's global one.
        queries: number of queries, whose answers are rows next to each other.
        device: where the scores are.
    """

    def __init__(self, seed: int | None, queries: int, device: torch.device) -> None:
        self._generators: list[torch.Generator] = []
        if seed is not None:
            self._generators = [torch.Generator(device).manual_seed(seed) for _ in range(queries)]

    def draw(self, scores_RV: Tensor) -> Tensor:
        """Return a token of each row, `[R, 1]`, without waiting for the device."""
        probabilities_RV = torch.softmax(scores_RV, -1)
        if len(self._generators) <= 1:
            generator = self._generators[0] if self._generators else None
            return torch.multinomial(probabilities_RV, 1, generator=generator)
        # What `multinomial` does for each query alone, with one division and argmax for all.
        noise_RV = torch.empty_like(probabilities_RV)
        rows = len(noise_RV) // len(self._generators)
        for index, generator in enumerate(self._generators):
            noise_RV[index * rows : (index + 1) * rows].exponential_(generator=generator)
        return highest(probabilities_RV / noise_RV)[:, None]


class AsyncCopy:
    """A copy of integers from the device to the host, which the device does not wait for.

    A stream of its own makes it: between two kernels of one stream a copy takes 15 us.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived = None
        # The device's memory stays until the copy has been made.
        self._source = self._values = values
        if values.is_cuda:
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._arrived = torch.cuda.Event()
            stream = _copying(values.device)
            stream.wait_stream(torch.cuda.current_stream(values.device))
            with torch.cuda.stream(stream):
                self._values.copy_(values, non_blocking=True)
                self._arrived.record(stream)

    def wait(self) -> list[int]:
        """Return the values once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[int] = self._values.tolist()
        return values


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a device's copies."""
    return torch.cuda.Stream(device)
