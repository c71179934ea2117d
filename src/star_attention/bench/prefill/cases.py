"""The measurements of `bench prefill`: methods, context lengths and block sizes, in order."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

from star_attention.bench.prefill.contenders import (
    CONTENDERS,
    DEFAULT_METHODS,
    DEFAULT_METHODS_ON_RANKS,
)
from star_attention.errors import InvalidInputError, quote
from star_attention.planning.sizes import format_size, parse_size


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        method: a name in `CONTENDERS`.
        context: length in tokens.
        block: block size in tokens; None for dense methods.
        block_option: the block size as the user wrote it.
        extrapolated: True if the time is computed from shorter runs.
        ranks: ranks that share the context.
    """

    method: str
    context: int
    block: int | None = None
    block_option: str | None = None
    extrapolated: bool = False
    ranks: int = 1

    def __str__(self) -> str:
        block = "" if self.block is None else f", block {format_size(self.block)}"
        ranks = "" if self.ranks == 1 else f", {self.ranks} ranks"
        return f"{self.method}, context {format_size(self.context)}{block}{ranks}"


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Methods to measure.

    Attributes:
        alone: on one rank: the process itself, or rank 0 while the others wait.
        together: on all ranks.
        ranks: number of ranks.
    """

    alone: list[str]
    together: list[str] = field(default_factory=list)
    ranks: int = 1

    @classmethod
    def of(
        cls, names: list[str] | None, alone: list[str], ranks: int, *, tensor_parallel: int = 1
    ) -> Methods:
        """Assign the methods that a user names: those for one rank alone, others to all ranks.

        Args:
            names: None for `DEFAULT_METHODS`, or `DEFAULT_METHODS_ON_RANKS`.
            alone: methods that one of several ranks measures alone as well.
            ranks: number of ranks.
            tensor_parallel: those that share the weights of one model. With several no rank can
                measure alone, and none does.

        Raises:
            InvalidInputError: a method for one rank, while none holds all weights.
        """
        if ranks == 1:
            return cls(alone=list(names or DEFAULT_METHODS))
        names = list(names or DEFAULT_METHODS_ON_RANKS)
        solitary = [
            name for name in names if name in CONTENDERS and CONTENDERS[name].needs_solitude
        ]
        if tensor_parallel > 1 and solitary:
            raise InvalidInputError(
                f"method {quote(solitary[0])} runs on one rank, and with tensor_parallel"
                f" {tensor_parallel} none has all weights; leave one of them out"
            )
        together = [name for name in names if name not in solitary]
        alone = alone if tensor_parallel == 1 else []
        return cls(alone=[*alone, *solitary], together=together, ranks=ranks)

    def ordered(self) -> list[tuple[str, int]]:
        """Return each method with its number of ranks, in the order of measurement."""
        alone = [(name, 1) for name in CONTENDERS if name in self.alone]
        return alone + [(name, self.ranks) for name in CONTENDERS if name in self.together]

    def check(self, device: str) -> None:
        """Raise `InvalidInputError` for a method that is unknown or cannot run here."""
        for name in [*self.alone, *self.together]:
            if name not in CONTENDERS:
                raise InvalidInputError(
                    f"method {quote(name)} is unknown; choose from {', '.join(CONTENDERS)}"
                )
            if CONTENDERS[name].needs_cuda and not device.startswith("cuda"):
                raise InvalidInputError(
                    f"method {quote(name)} needs a CUDA device, this is {device}; leave it out"
                )
        for name in self.alone:
            if CONTENDERS[name].needs_ranks:
                raise InvalidInputError(
                    f"method {quote(name)} needs several ranks; run it under torchrun, or leave it"
                    " out"
                )


def plan_cases(
    contexts: list[int],
    blocks: list[str],
    methods: Methods,
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
        methods: what to measure on one rank and on all of them.
        device: the device of the model.
        dense_up_to: the longest context at which dense methods run, ring attention among them;
            beyond it they are extrapolated.

    Raises:
        InvalidInputError: an unknown method, one that the device or the ranks cannot run, a block
            size that cannot work, or nothing to measure.
    """
    methods.check(device)
    cases: list[Case] = []
    too_large: list[tuple[int, str]] = []
    for context in sorted(contexts):
        options = {parse_block(option, context): option for option in blocks}
        sizes = sorted((size for size in options if 2 * size <= context), reverse=True)
        too_large += [(context, option) for size, option in options.items() if size not in sizes]
        for method, ranks in methods.ordered():
            case = Case(method=method, context=context, ranks=ranks)
            if CONTENDERS[method].takes_block:
                cases += [replace(case, block=size, block_option=options[size]) for size in sizes]
            else:
                is_dense = not CONTENDERS[method].by_rule
                beyond = is_dense and dense_up_to is not None and context > dense_up_to
                cases.append(replace(case, extrapolated=beyond))
    if not cases:
        raise InvalidInputError(
            "nothing is left to measure: no context holds two blocks of"
            f" {' or '.join(blocks)}; give smaller blocks or longer contexts"
        )
    if any(CONTENDERS[method].takes_block for method, _ in methods.ordered()):
        for context, option in too_large:
            warnings.warn(
                f"context {format_size(context)} does not hold two blocks of {option};"
                " this block size is left out",
                stacklevel=2,
            )
    return cases


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
