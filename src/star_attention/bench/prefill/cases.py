"""The measurements of `bench prefill`: methods, context lengths and block sizes, in order."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from star_attention.bench.prefill.contenders import CONTENDERS
from star_attention.errors import InvalidInputError, quote
from star_attention.planning.plan import format_size, parse_size


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        method: a name in `CONTENDERS`.
        context: length in tokens.
        block: block size in tokens; None for dense methods.
        block_option: the block size as the user wrote it.
        extrapolated: True if the time is computed from shorter runs.
    """

    method: str
    context: int
    block: int | None = None
    block_option: str | None = None
    extrapolated: bool = False

    def __str__(self) -> str:
        block = "" if self.block is None else f", block {format_size(self.block)}"
        return f"{self.method}, context {format_size(self.context)}{block}"


def plan_cases(
    contexts: list[int],
    blocks: list[str],
    methods: list[str],
    *,
    device: str,
    dense_up_to: int | None = None,
) -> list[Case]:
    """List every method at every length, in the order of measurement: baselines first.

    A block size that does not fit twice into a context is left out, with a warning.

    Args:
        contexts: lengths in tokens.
        blocks: block sizes of Star Attention and of the official implementation, and windows of
            StreamingLLM: `8k`, or `/4` for a quarter of the context.
        methods: names in `CONTENDERS`.
        device: the device of the model.
        dense_up_to: the longest context at which dense methods run; beyond it they are
            extrapolated.

    Raises:
        InvalidInputError: an unknown method, one that the device cannot run, a block size that
            cannot work, or nothing to measure.
    """
    _check_methods(methods, device)
    ordered = [method for method in CONTENDERS if method in methods]
    cases: list[Case] = []
    too_large: list[tuple[int, str]] = []
    for context in sorted(contexts):
        options = {parse_block(option, context): option for option in blocks}
        sizes = sorted((size for size in options if 2 * size <= context), reverse=True)
        too_large += [(context, option) for size, option in options.items() if size not in sizes]
        for method in ordered:
            if CONTENDERS[method].takes_block:
                cases += [
                    Case(method=method, context=context, block=size, block_option=options[size])
                    for size in sizes
                ]
            else:
                beyond = dense_up_to is not None and context > dense_up_to
                cases.append(Case(method=method, context=context, extrapolated=beyond))
    if not cases:
        raise InvalidInputError(
            "nothing is left to measure: no context holds two blocks of"
            f" {' or '.join(blocks)}; give smaller blocks or longer contexts"
        )
    if any(CONTENDERS[method].takes_block for method in ordered):
        for context, option in too_large:
            warnings.warn(
                f"context {format_size(context)} does not hold two blocks of {option};"
                " this block size is left out",
                stacklevel=2,
            )
    return cases


def _check_methods(methods: list[str], device: str) -> None:
    for method in methods:
        if method not in CONTENDERS:
            raise InvalidInputError(
                f"method {quote(method)} is unknown; choose from {', '.join(CONTENDERS)}"
            )
        if CONTENDERS[method].needs_cuda and not device.startswith("cuda"):
            raise InvalidInputError(
                f"method {quote(method)} needs a CUDA device, this is {device}; leave it out"
            )


def parse_block(text: str, context: int) -> int:
    """Return a block size in tokens, from `8k` or from `/4` for a quarter of the context.

    Raises:
        InvalidInputError: neither a size nor a fraction, or a size below 1.
    """
    if text.startswith("/"):
        if not text[1:].isdecimal() or int(text[1:]) < 1:
            raise InvalidInputError(
                f"block size {quote(text)} is not a fraction of the context; write /4 for a quarter"
            )
        return max(1, context // int(text[1:]))
    size = parse_size(text, "block_size")
    if size < 1:
        raise InvalidInputError(
            f"block size {quote(text)} is below 1; give tokens, or /4 for a quarter of the context"
        )
    return size
