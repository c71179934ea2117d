"""Settings of an engine: frozen, keyword-only, with their defaults and their help.

The command line builds its options from the fields of `StarConfig`: a new setting is one field
(`cli/config_options.py` -> `cli/options.py`: `--block-size` comes from `block_size`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypedDict

from star_attention.errors import InvalidInputError, SizeError, quote, unknown_option
from star_attention.planning.lookback import ALL, parse_layers
from star_attention.planning.plan import ANCHOR_SOURCES, BlockPlan
from star_attention.planning.quality import expanded
from star_attention.planning.residency import check_share
from star_attention.planning.ring import RING_LAYOUTS
from star_attention.planning.sizes import (
    DEFAULT_FORWARD_RULE,
    check_lookback,
    default_forward_size,
    parse_size,
    resolve_sizes,
)
from star_attention.planning.stripes import STRIPE_TOKENS
from star_attention.planning.windows import KV_WINDOWS, LAST

METHODS = {
    "star": "star_attention.methods.star:Star",
    "dense": "star_attention.methods.dense:Dense",
    "ring": "star_attention.methods.ring:Ring",
    "streaming_llm": "star_attention.methods.streaming_llm:StreamingLLM",
}
"""Attention methods by name, imported on first use."""

BASELINE_METHOD = "dense"
"""Exact attention, which evaluations compare other methods against."""

KV_DTYPES = ("fp8",)
"""Precisions that a context may be stored in, other than the model's own.

Each has an entry in `storage.kv.QUANTIZERS` and in `planning.model_shape.STORED_BYTES`. CUDA
graphs read it if `attention.kernels.triton_answer` does (`hf.execution.graphs`); otherwise decoding
runs eagerly.
"""

KV_DEVICES = ("cpu",)

RESERVE_TOKENS = 1024
"""Tokens reserved for query and answer where rotary frequencies depend on the total length.

LongRoPE and dynamic NTK scaling do."""

DEFAULT_BLOCK_RULE = "a quarter of the context, rounded up to a power of two, 1k to 32k"
"""`planning.sizes.default_block_size`, in words."""

MAX_NEW_TOKENS = 256

DTYPES = ("auto", "float32", "bfloat16", "float16")

STALL_S = 60.0
"""Seconds without a heartbeat before a rank is considered dead."""


def check_dtype(dtype: Any) -> str:
    """Return the name of a precision without the prefix `torch.`.

    Raises:
        InvalidInputError: For a precision that models are not loaded in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InvalidInputError(f"dtype {quote(dtype)} is unknown; use one of {', '.join(DTYPES)}")
    return name


def check_device(device: Any) -> None:
    """Check the form of a device name. Torch, which knows the kinds, is not imported for it.

    Raises:
        InvalidInputError: For a name that no device has.
    """
    if not isinstance(device, str) or not re.fullmatch(r"(?!gpu\b)[a-z]+(:\d+)?", device):
        raise InvalidInputError(f"device {quote(device)} is unknown; use auto, cpu, cuda or cuda:1")


def check_max_new_tokens(tokens: Any) -> None:
    """Raise `InvalidInputError` unless `tokens` is a positive integer."""
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise InvalidInputError(
            f"max_new_tokens {quote(tokens)} is not a positive number of tokens"
        )


class StarSettings(TypedDict, total=False):
    """The fields of `StarConfig` as keywords, for editors and type checkers.

    Sizes may be written as `"4k"` or `"1m"`. `quality` is not a field, but a preset of several.
    """

    quality: str | None
    block_size: int | str | None
    anchor_size: int | str | None
    lookback: int | str
    lookback_layers: str | float | Iterable[int]
    method: str
    tokens_per_forward: int | str | None
    reserve_tokens: int | str
    anchor_source: str
    balance_ranks: bool
    ring_layout: str
    kv_dtype: str | None
    kv_device: str | None
    kv_resident: float | str
    kv_windows: str
    allow_special_tokens: bool | None
    slice_weights: bool | None


def _setting(
    default: Any, help: str, *, metavar: str, panel: str, default_text: str | None = None
) -> Any:
    """A field of `StarConfig` and its option: the metavar SIZE marks a number of tokens."""
    option = dict(help=help, metavar=metavar, panel=panel, default_text=default_text)
    return field(default=default, metadata=option)


@dataclass(frozen=True, kw_only=True)
class StarConfig:
    """Settings of one engine: how contexts are encoded.

    Sizes are tokens, and may be written as `"4k"` or `"1m"`.

    Args:
        block_size: Tokens per block. None applies the paper's rule to each context: a quarter of
            it, between 1k and 32k. For `streaming_llm`, the window.
        anchor_size: Leading tokens of the context that every block sees, 0 to `block_size`. None
            takes the block size, with `lookback` at most 64. For `streaming_llm`, the number of
            sinks (None: 4).
        lookback: Blocks before its own that each block sees, in `lookback_layers`; 0 is the paper's
            method. Two blocks in half of the layers, with the small anchor, cost what the paper's
            large anchor costs, and answer better.
        lookback_layers: Layers that look back: "all", "lower" or "upper" (half of them), a fraction
            (the lowest), or numbers counted from 0 (`[0, 1, 2]`, "0-14+20").
        method: "star", "dense" (ordinary attention), "ring" (exact, over ranks) or "streaming_llm".
        tokens_per_forward: Maximum context tokens in one forward of phase 1, which bounds its
            working memory. None takes 8192 on one rank and 16384 on several, on a CPU 2048.
        reserve_tokens: Tokens reserved for query and answer in models whose rotary frequencies
            depend on the total length.
        anchor_source: How ranks other than the first get the anchor: "broadcast", or "local". With
            "local" each rank computes it again, and phase 1 does not communicate at all.
        balance_ranks: Whether rank 0, whose first block takes less time, computes layers of other
            ranks' last blocks in phase 1. Answers are the same. Batches and servers go without.
        ring_layout: How `ring` shards tokens: "zigzag" (balanced), or "contiguous" as in the paper.
        kv_dtype: Precision of the context's keys and values. None keeps the model's, "fp8" stores
            e4m3 with a scale per token and head. Blocks read the anchor as computed; an anchor
            larger than a forward reads its own earlier part rounded.
        kv_device: Where the context's keys and values are stored. None leaves them on the device
            that computed them, "cpu" moves them to host memory, from which each layer is copied
            back while those before it compute.
        kv_resident: Share of the layers, 0 to 1, that stay on the device despite `kv_device`.
        kv_windows: What layers with a sliding window keep: "last" keeps the last window, all that
            answers and `extend` see, "all" every token, for second looks and edits with look-back.
        allow_special_tokens: What special tokens in a text (`<|im_end|>`) are: True makes them
            control tokens, False text. None makes those of chat messages text, so that no document
            can end its turn, and those of raw text control tokens, with a warning.
        slice_weights: What each rank multiplies in phase 2, where it holds all weights: True its
            slice of every layer that can be sliced, False all of them. None slices the parts of
            the model where that is faster: large ones, on ranks of one host. Answers are the same
            up to rounding.

    Raises:
        SizeError: For a size that cannot work.
        InvalidInputError: For an unknown name.
    """

    block_size: int | None = _setting(
        None,
        "Tokens per block.",
        metavar="SIZE",
        panel="Context",
        default_text=f"{DEFAULT_BLOCK_RULE}; one block where blocks are not faster",
    )
    anchor_size: int | None = _setting(
        None,
        "Leading tokens of the context that every block sees; 0 for none.",
        metavar="SIZE",
        panel="Context",
        default_text="the block size; 64 with --lookback",
    )
    lookback: int = _setting(
        0,
        "Blocks before its own that each block sees in the layers that look back; 0 for none.",
        metavar="BLOCKS",
        panel="Context",
    )
    lookback_layers: str = _setting(
        ALL,
        "Layers that look back: all, lower, upper, a fraction (0.33), or numbers (0-14+20).",
        metavar="LAYERS",
        panel="Context",
    )
    method: str = _setting(
        "star", f"Attention method: {', '.join(METHODS)}.", metavar="NAME", panel="Context"
    )
    tokens_per_forward: int | None = _setting(
        None,
        "Maximum tokens in one forward pass; bounds the working memory.",
        metavar="SIZE",
        panel="Model",
        default_text=DEFAULT_FORWARD_RULE,
    )
    reserve_tokens: int = _setting(
        RESERVE_TOKENS,
        "Tokens reserved for query and answer, in models whose rotary frequencies depend on the"
        " total length.",
        metavar="SIZE",
        panel="Model",
    )
    anchor_source: str = _setting(
        ANCHOR_SOURCES[0],
        "How the other ranks get the anchor: broadcast, or local (each computes it; for slow"
        " links).",
        metavar="NAME",
        panel="Ranks",
    )
    balance_ranks: bool = _setting(
        True,
        "Whether rank 0, which would finish first, computes layers for other ranks.",
        metavar="",
        panel="Ranks",
        default_text="on",
    )
    ring_layout: str = _setting(
        RING_LAYOUTS[0],
        "How the ring method shards tokens: zigzag (balanced), or contiguous.",
        metavar="NAME",
        panel="Ranks",
    )
    kv_dtype: str | None = _setting(
        None,
        "Precision of the context's keys and values; fp8 takes a little over half the memory of"
        " bfloat16.",
        metavar="TYPE",
        panel="Context",
        default_text="the model's",
    )
    kv_device: str | None = _setting(
        None,
        "Where the context's keys and values are stored; cpu means host memory.",
        metavar="DEVICE",
        panel="Context",
        default_text="where they are computed",
    )
    kv_resident: float = _setting(
        0.0,
        "Share of the layers, 0 to 1, that stay on the GPU despite --kv-device.",
        metavar="SHARE",
        panel="Context",
    )
    kv_windows: str = _setting(
        LAST,
        "What layers with a sliding window keep: last (the last window, which is all that answers"
        " see) or all (every token).",
        metavar="TOKENS",
        panel="Context",
    )
    allow_special_tokens: bool | None = _setting(
        None,
        "Whether special tokens in texts and queries (<|im_end|>) are control tokens or text.",
        metavar="",
        panel="Context",
        default_text="text with --chat, control tokens without",
    )
    slice_weights: bool | None = _setting(
        None,
        "Whether each rank multiplies only its slice of the weights when it answers.",
        metavar="",
        panel="Ranks",
        default_text="where it is faster: large models on one host",
    )

    @classmethod
    def of(cls, config: StarConfig | None = None, **settings: Any) -> StarConfig:
        """Return `config` (default: all defaults) with some fields replaced.

        The keyword `quality` ("paper", "balanced", "high") stands for `lookback`, `lookback_layers`
        and `anchor_size`, as far as they are not given beside it.

        Raises:
            UnknownOptionError: a keyword that is not a field.
            SizeError, InvalidInputError: as for `StarConfig`.
        """
        if not isinstance(config, (StarConfig, type(None))):
            raise InvalidInputError(
                f"config: expected a StarConfig, got {type(config).__name__}; give"
                " StarConfig(...), or its fields as keywords"
            )
        settings = expanded(settings)
        known = [setting.name for setting in fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown_option(
                    "StarConfig",
                    name,
                    known=known,
                    instead={},
                    otherwise=f"its fields are {', '.join(known)}",
                )
        return cls(**settings) if config is None else replace(config, **settings)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            # None means "by rule", except where the default is a number.
            is_by_rule = value is None and setting.default is None
            if setting.metadata["metavar"] == "SIZE" and not is_by_rule:
                object.__setattr__(self, setting.name, parse_size(value, setting.name))
        self._check_lookback()
        if self.block_size is not None:
            resolve_sizes(self.block_size, self.block_size, self.anchor_size)
        elif self.anchor_size is not None and self.anchor_size < 0:
            resolve_sizes(1, None, self.anchor_size)
        if self.tokens_per_forward is not None and self.tokens_per_forward < 1:
            raise SizeError(
                f"tokens_per_forward {self.tokens_per_forward} is below 1;"
                " give a positive number of tokens, or leave it out"
            )
        if self.reserve_tokens < 1:
            raise SizeError(
                f"reserve_tokens {self.reserve_tokens} is below 1; a query needs at least one token"
            )
        for name, known in _NAMED.items():
            if getattr(self, name) not in known:
                names, value = ", ".join(filter(None, known)), quote(getattr(self, name))
                remedy = f"one of {names}" if None not in known else f"{names}, or leave it out"
                raise InvalidInputError(f"{name} {value} is unknown; choose {remedy}")
        for name, otherwise in (
            ("allow_special_tokens", "for text in chats alone"),
            ("slice_weights", "to slice where it is faster"),
        ):
            if getattr(self, name) not in (None, True, False):
                raise InvalidInputError(
                    f"{name}: expected True, False or None, got {quote(getattr(self, name))}; leave"
                    f" it out {otherwise}"
                )
        if self.balance_ranks not in (True, False):
            raise InvalidInputError(
                f"balance_ranks: expected True or False, got {quote(self.balance_ranks)}; leave it"
                " out for True"
            )
        object.__setattr__(self, "kv_resident", check_share(self.kv_resident, self.kv_device))

    def _check_lookback(self) -> None:
        lookback: Any = self.lookback
        if isinstance(lookback, str) and lookback.strip().isdecimal():
            lookback = int(lookback)
            object.__setattr__(self, "lookback", lookback)
        check_lookback(lookback)
        object.__setattr__(self, "lookback_layers", parse_layers(self.lookback_layers))

    @property
    def kv_settings(self) -> dict[str, Any]:
        """The settings that say how keys and values are stored: the fields `KV_SETTINGS`."""
        return {name: getattr(self, name) for name in KV_SETTINGS}

    def forward_size(self, device_type: str, ranks: int = 1) -> int:
        """Return the most context tokens of a forward on this kind of device and these ranks."""
        return self.tokens_per_forward or default_forward_size(device_type, ranks)

    def plan(self, context_tokens: int, ranks: int = 1) -> BlockPlan:
        """Return the block plan of these sizes for a context of `context_tokens`."""
        return BlockPlan.resolve(
            context_tokens,
            self.block_size,
            self.anchor_size,
            ranks,
            self.lookback,
            self.lookback_layers,
            self.tokens_per_forward or STRIPE_TOKENS,
        )


_NAMED: dict[str, tuple[str | None, ...]] = {
    "method": tuple(METHODS),
    "anchor_source": ANCHOR_SOURCES,
    "ring_layout": RING_LAYOUTS,
    "kv_windows": KV_WINDOWS,
    "kv_dtype": (None, *KV_DTYPES),
    "kv_device": (None, *KV_DEVICES),
}
"""Fields of `StarConfig` that take one of several names."""

KV_SETTINGS = tuple(field.name for field in fields(StarConfig) if field.name.startswith("kv_"))
"""Fields of `StarConfig` about the storage of keys and values."""
