"""Settings of a calibration."""

from __future__ import annotations

from dataclasses import dataclass

from star_attention.errors import SizeError

MIN_SAMPLES = 3
"""Samples that an interval needs."""

MIN_BLOCK = 16

LENGTH, GPU_LENGTH = 2048, 8192
"""Default tokens of a context, on CPU and on a GPU."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """The contexts that a calibration measures.

    Attributes:
        length: tokens of each context.
        blocks: blocks of each context.
        samples: number of contexts.
        seed: determines the facts, and the places in the text.

    Raises:
        SizeError: too few blocks, tokens or samples.
    """

    length: int = LENGTH
    blocks: int = 8
    samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 4:
            raise SizeError(f"blocks {self.blocks} are too few to look back over; give at least 4")
        if self.length < self.blocks * MIN_BLOCK:
            raise SizeError(
                f"length {self.length:,} leaves less than {MIN_BLOCK} tokens for each of"
                f" {self.blocks} blocks; give at least {self.blocks * MIN_BLOCK}"
            )
        if self.samples < MIN_SAMPLES:
            raise SizeError(
                f"samples {self.samples} are too few for an interval; give at least {MIN_SAMPLES}"
            )

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return -(-self.length // self.blocks)
