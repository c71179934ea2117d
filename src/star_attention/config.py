"""Settings of one engine: frozen, keyword-only, defaults in this one place (the command line reads them from here)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from star_attention.errors import InvalidInputError, SizeError, UnknownOptionError
from star_attention.planning.plan import (
    ANCHOR_SOURCES,
    RING_LAYOUTS,
    BlockPlan,
    parse_size,
    resolve_sizes,
)

METHODS = {
    "star": "star_attention.methods.star:Star",
    "dense": "star_attention.methods.dense:Dense",
    "ring": "star_attention.methods.ring:Ring",
    "streaming_llm": "star_attention.methods.streaming_llm:StreamingLLM",
}
"""Attention methods by name, imported on use."""

BASELINE_METHOD = "dense"
"""Exact attention, which evaluations compare other methods against."""

KV_DTYPES, KV_DEVICES = ("fp8",), ("cpu",)

RESERVE_TOKENS = 1024
"""Tokens kept free for query and answer where rotary frequencies depend on the total length (LongRoPE, dynamic NTK)."""

TOKENS_PER_FORWARD = 8192
TOKENS_PER_FORWARD_GPU = 16384

MAX_NEW_TOKENS = 256

DTYPES = ("auto", "float32", "bfloat16", "float16")

STALL_S = 60.0
"""Longest silence of a rank, in seconds, before the others give up."""


def check_dtype(dtype: Any) -> str:
    """A precision's name, without torch's.

    Raises `InvalidInputError` for one that no model is loaded in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidInputError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    return name


def check_device(device: Any) -> None:
    """What can be said of a device without torch, which knows more kinds than these.

    Raises `InvalidInputError` for what is none anywhere.
    """
    if not isinstance(device, str) or not re.fullmatch(r"(?!gpu\b)[a-z]+(:\d+)?", device):
        raise InvalidInputError(f"device {device!r} is unknown; use auto, cpu, cuda or cuda:1")


def check_max_new_tokens(tokens: Any) -> None:
    """Raises `InvalidInputError` for what is no positive number."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InvalidInputError(f"max_new_tokens {tokens!r} is not a positive number of tokens")


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
    remedy = instead.get(name) or (f"did you mean {near[0]!r}?" if near else otherwise)
    return UnknownOptionError(f"{call} does not take {name!r}; {remedy}")


class StarSettings(TypedDict, total=False):
    """The fields of `StarConfig` as keywords, for editors and type checkers.

    Sizes may be written as `"4k"` or `"1m"`.
    """

    block_size: int | str | None
    anchor_size: int | str | None
    method: str
    tokens_per_forward: int | str | None
    reserve_tokens: int | str
    anchor_source: str
    ring_layout: str
    kv_dtype: str | None
    kv_device: str | None


@dataclass(frozen=True, kw_only=True)
class StarConfig:
    """How contexts are encoded.

    block_size: tokens encoded together; None takes the paper's rule anew for each context.
    anchor_size: tokens at the head of the context that every block sees, 0..block_size; None takes the block size.
    method: a name in `METHODS`. For `streaming_llm` block_size is the window and anchor_size the number of sinks (None: 4).
    tokens_per_forward: most context tokens in one forward of phase 1, which bounds its working memory; None takes
        8192 on CPU and 16384 on an accelerator.
    reserve_tokens: tokens kept free for query and answer where rotary frequencies depend on the total length.
    anchor_source: how ranks other than the first come by the anchor: "broadcast", or "local": each computes it once more,
        and phase 1 does not communicate at all.
    kv_dtype: None keeps the context's keys and values in the model's precision, "fp8" in e4m3 with a scale for each token of each
        head. Blocks read the anchor as it was computed; one that is larger than a forward reads its own earlier part rounded.
    kv_device: None keeps them where they were computed, "cpu" in the host's memory, from which each layer is brought back.
    ring_layout: how `ring` deals out tokens: "zigzag" (balanced), or "contiguous" as in the paper.

    Raises `SizeError` or `InvalidInputError` with the value, the limit and the remedy.
    """

    block_size: int | None = None
    anchor_size: int | None = None
    method: str = "star"
    tokens_per_forward: int | None = None
    reserve_tokens: int = RESERVE_TOKENS
    anchor_source: str = ANCHOR_SOURCES[0]
    ring_layout: str = RING_LAYOUTS[0]
    kv_dtype: str | None = None
    kv_device: str | None = None

    @classmethod
    def of(cls, config: StarConfig | None = None, **settings: Any) -> StarConfig:
        """Return `config` (default: all defaults) with some fields replaced.

        Sizes may be written as `"4k"` or `"1m"`.

        Raises:
            UnknownOptionError: a keyword that is not a field.
            SizeError, InvalidInputError: as for `StarConfig`.
        """
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown_option(
                    "StarConfig",
                    name,
                    known=known,
                    instead={},
                    otherwise=f"its fields are {', '.join(known)}",
                )
        sizes = ("block_size", "anchor_size", "tokens_per_forward", "reserve_tokens")
        for name in sizes:
            if settings.get(name) is not None or (name == "reserve_tokens" and name in settings):
                settings[name] = parse_size(settings[name], name)
        return cls(**settings) if config is None else replace(config, **settings)

    def __post_init__(self) -> None:
        if self.block_size is not None:
            resolve_sizes(self.block_size, self.block_size, self.anchor_size)
        elif self.anchor_size is not None and self.anchor_size < 0:
            resolve_sizes(1, None, self.anchor_size)
        if self.tokens_per_forward is not None and self.tokens_per_forward < 1:
            raise SizeError(
                f"tokens_per_forward {self.tokens_per_forward} is below 1; give a positive number of tokens, or leave it out"
            )
        if self.reserve_tokens < 1:
            raise SizeError(
                f"reserve_tokens {self.reserve_tokens} is below 1; a query needs at least one token"
            )
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise InvalidInputError(
                f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}"
            )

        if self.anchor_source not in ANCHOR_SOURCES:
            raise InvalidInputError(
                f"anchor_source {self.anchor_source!r} is unknown; choose one of {', '.join(ANCHOR_SOURCES)}"
            )

        if self.ring_layout not in RING_LAYOUTS:
            raise InvalidInputError(
                f"ring_layout {self.ring_layout!r} is unknown; choose one of {', '.join(RING_LAYOUTS)}"
            )

        for name, known in (("kv_dtype", KV_DTYPES), ("kv_device", KV_DEVICES)):
            if getattr(self, name) not in (None, *known):
                raise InvalidInputError(
                    f"{name} {getattr(self, name)!r} is unknown; choose {', '.join(known)}, or leave it out"
                )

    def forward_size(self, device_type: str) -> int:
        """Most context tokens in one forward on a device of that type ("cpu", "cuda", ...)."""
        if self.tokens_per_forward is not None:
            return self.tokens_per_forward
        return TOKENS_PER_FORWARD if device_type == "cpu" else TOKENS_PER_FORWARD_GPU

    def plan(self, context_tokens: int, ranks: int = 1) -> BlockPlan:
        """The block plan of this method's settings for a context of `context_tokens`."""
        return BlockPlan.resolve(context_tokens, self.block_size, self.anchor_size, ranks)
