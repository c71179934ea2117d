"""Variants: a method and its sizes, written `star:/4` or `streaming_llm:2k:64`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from star_attention import methods
from star_attention.config import KV_DTYPES, METHODS, StarConfig
from star_attention.errors import InvalidInputError, SizeError, quote
from star_attention.evals.runs.anchors import CONTENTS, POSITIONS
from star_attention.planning.lookback import ALL, LOOKBACK_ANCHOR, parse_layers, sink_size
from star_attention.planning.second_look import check_share
from star_attention.planning.sizes import (
    check_lookback,
    default_block_size,
    format_size,
    parse_size,
)

SAME = "="
"""An anchor as large as the block."""

_FRACTION = re.compile(r"/([1-9][0-9]*)")
_LOOKBACK, _SECOND_LOOK = "lookback", "second_look"
_SETTINGS = {
    _LOOKBACK: "lookback",
    _SECOND_LOOK: "second_look",
    "anchor": "anchor",
    "positions": "anchor_positions",
    "kv": "kv_dtype",
}
"""Fields of `Variant` by the name that they have in a key."""

SYNTAX = (
    "write METHOD[:BLOCK[:ANCHOR]] with sizes like 4k, or /4 for a quarter of the length"
    " (= makes the anchor as large as the block), then lookback=BLOCKS[@LAYERS],"
    " second_look=SHARE, kv=fp8, anchor=NAME, positions=NAME; numbers of layers are joined by +,"
    " as 0-4+8"
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One attention method with its settings.

    Attributes:
        method: A name in `config.METHODS`.
        block_size: Tokens, "/4" for a quarter of a sample's length, or None for the paper's rule.
            With `streaming_llm` the size of its window.
        anchor_size: The same, or "=" for the block size. None takes the method's default. With
            `streaming_llm` the number of its sinks.
        anchor: Ablation of the anchor's tokens, one of `anchors.CONTENTS`; None changes nothing.
        anchor_positions: Ablation of its positions, one of `anchors.POSITIONS`; None changes
            nothing.
        kv_dtype: Precision of the stored KV; None keeps the engine's.
        lookback: Blocks before its own that each block sees; 0 for none.
        lookback_layers: Layers that look back, as `planning.lookback.parse_layers` writes them.
        second_look: Share of the context that is computed again for each query; 0 for none.

    Raises:
        InvalidInputError: For unknown names, and for sizes, look-back or a second look of a method
            that takes none.
        SizeError: For sizes out of range.
    """

    method: str = StarConfig.method
    block_size: int | str | None = None
    anchor_size: int | str | None = None
    anchor: str | None = None
    anchor_positions: str | None = None
    kv_dtype: str | None = None
    lookback: int = 0
    lookback_layers: str = ALL
    second_look: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidInputError(
                f"method {quote(self.method)} is unknown; choose one of {', '.join(METHODS)}"
            )
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise InvalidInputError(
                f"kv_dtype {quote(self.kv_dtype)} is unknown; choose {', '.join(KV_DTYPES)},"
                " or leave it out"
            )
        if not self.has_sizes and (self.block_size, self.anchor_size) != (None, None):
            raise InvalidInputError(
                f"method {quote(self.method)} takes no block and no anchor size; leave them out"
            )
        self._check_ablation()
        self._check_lookback()
        check_share(self.second_look)
        methods.check_second_look(self.method, self.second_look)
        self._normalize_sizes()

    def _check_ablation(self) -> None:
        if not self.is_ablation:
            return
        if not self._shares_anchor:
            raise InvalidInputError(
                f"method {quote(self.method)} has no anchor to ablate; use method"
                f" {StarConfig.method!r}"
            )
        for name, value, known in (
            ("anchor", self.anchor, CONTENTS),
            ("positions", self.anchor_positions, POSITIONS),
        ):
            if value not in (None, *known):
                raise InvalidInputError(
                    f"{name} {quote(value)} is unknown; choose one of {', '.join(known)}"
                )

    def _check_lookback(self) -> None:
        check_lookback(self.lookback)
        layers = parse_layers(self.lookback_layers) if self.lookback else ALL
        object.__setattr__(self, "lookback_layers", layers)
        methods.check_lookback(self.method, self.lookback)
        if self.lookback and self.is_ablation:
            raise InvalidInputError(
                f"lookback {self.lookback} does not work with another anchor or other positions,"
                " which are encoded as in the paper, without look-back; leave one of both out"
            )

    def _normalize_sizes(self) -> None:
        """Write every size in one way, so that equal variants have equal keys."""
        object.__setattr__(self, "block_size", _checked(self.block_size, "block_size"))
        if self.anchor_size != SAME:
            object.__setattr__(self, "anchor_size", _checked(self.anchor_size, "anchor_size"))
        elif self._shares_anchor and not self.lookback:
            object.__setattr__(self, "anchor_size", None)
        elif self.block_size is None:
            raise SizeError(
                f"anchor_size {SAME!r} copies the block size, which is missing; give a block_size"
            )
        if self.lookback:
            self._write_anchor()
        if isinstance(self.block_size, int) and isinstance(self.anchor_size, int):
            self.sizes(self.block_size)

    def _write_anchor(self) -> None:
        """Write the anchor of a variant that looks back as a number, where the block's size is."""
        anchor, block = self.anchor_size, self.block_size
        if anchor is None:
            anchor = sink_size(block) if isinstance(block, int) else LOOKBACK_ANCHOR
        elif anchor in (SAME, block):
            anchor = block if isinstance(block, int) else SAME
        object.__setattr__(self, "anchor_size", anchor)

    @property
    def has_sizes(self) -> bool:
        """True if the method takes a block and an anchor size (or window and sinks)."""
        return methods.get(self.method).takes_sizes

    @property
    def is_ablation(self) -> bool:
        """True if blocks are encoded after another anchor than the first block."""
        return (self.anchor, self.anchor_positions) != (None, None)

    @property
    def is_sweepable(self) -> bool:
        """True if accuracy may be drawn against this variant's block or anchor size."""
        return self._shares_anchor and not self.is_ablation

    @property
    def follows_rule(self) -> bool:
        """True if block and anchor size are left to the engine, as `generate` does by default."""
        sizes = self.block_size, self.anchor_size
        return self._shares_anchor and sizes == (None, LOOKBACK_ANCHOR if self.lookback else None)

    @property
    def _shares_anchor(self) -> bool:
        return methods.get(self.method).shares_anchor

    @property
    def key(self) -> str:
        """The text that `parse` reads back; predictions are stored under it."""
        sizes: list[str] = []
        if self.block_size is not None or self.anchor_size is not None:
            sizes.append(_written(self.block_size))
        if self.anchor_size is not None:
            sizes.append(_written(self.anchor_size))
        return ":".join([self.method, *sizes, *self.settings])

    @property
    def name(self) -> str:
        """The name in tables and figures: "dense", "star b=/4 a=1k"."""
        anchor = self.block_size if self.anchor_size == SAME else self.anchor_size
        labels = methods.get(self.method).size_names
        sizes = [
            f"{label}={_written(size)}"
            for label, size in zip(labels, (self.block_size, anchor), strict=True)
            if size is not None
        ]
        return " ".join([self.method, *sizes, *self.settings])

    @property
    def settings(self) -> tuple[str, ...]:
        """All but method and sizes, as written in the key: `("lookback=2@lower", "kv=fp8")`."""
        return tuple(self._written_settings())

    def _written_settings(self) -> Iterator[str]:
        if self.lookback:
            layers = "" if self.lookback_layers == ALL else f"@{self.lookback_layers}"
            yield f"{_LOOKBACK}={self.lookback}{layers}"
        if self.second_look:
            yield f"{_SECOND_LOOK}={self.second_look:g}"
        for name, field in _SETTINGS.items():
            value = getattr(self, field)
            if name not in (_LOOKBACK, _SECOND_LOOK) and value is not None:
                yield f"{name}={value}"

    def sizes(self, tokens: int) -> tuple[int | None, int | None]:
        """Return block and anchor size for a text of `tokens`, fractions rounded up.

        Returns:
            Both in tokens; None leaves the choice to the method.

        Raises:
            SizeError: If the anchor is larger than the block.
        """
        block, anchor = _resolved(self.block_size, tokens), _resolved(self.anchor_size, tokens)
        if self.anchor_size == SAME:
            anchor = block
        if self._shares_anchor and block is None:
            # Blocks are what is measured, also where a GPU encodes the text faster as one.
            block = default_block_size(tokens)
        if self.lookback and block is not None and anchor == LOOKBACK_ANCHOR:
            # The default, which a short text's blocks may be smaller than.
            anchor = sink_size(block)
        if self._shares_anchor and block is not None and anchor is not None and anchor > block:
            raise SizeError(
                f"variant {quote(self.key)} has an anchor of {anchor:,} tokens and blocks"
                f" of {block:,}"
                f" at {tokens:,} tokens; give an anchor no larger than the block"
            )
        return block, anchor


def parse(text: str) -> Variant:
    """Read one variant: `dense`, `star:4k:1k`, `star:/4:kv=fp8`, `star:/8:64:lookback=2@lower`.

    Raises:
        InvalidInputError: For unknown names and parts out of place.
        SizeError: For sizes out of range.
    """
    method, *parts = text.strip().split(":")
    sizes: list[str] = []
    settings: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if name and equals:
            if name not in _SETTINGS or _SETTINGS[name] in settings or not value:
                raise InvalidInputError(
                    f"variant {quote(text)} contains {quote(part)}, which is not a setting;"
                    f" {SYNTAX}"
                )
            settings |= _read(name, value)
        elif settings or len(sizes) == 2:
            raise InvalidInputError(
                f"variant {quote(text)} has {quote(part)} out of place; {SYNTAX}"
            )
        else:
            sizes.append(part)
    block, anchor = [*sizes, "", ""][:2]
    return Variant(method=method, block_size=block or None, anchor_size=anchor or None, **settings)


def _read(name: str, text: str) -> dict[str, Any]:
    """Return the fields that the value of a setting stands for."""
    if name == _SECOND_LOOK:
        try:
            return {_SETTINGS[name]: float(text)}
        except ValueError:
            # Refused by `Variant`.
            return {_SETTINGS[name]: text}
    if name != _LOOKBACK:
        return {_SETTINGS[name]: text}
    # `2` or `2@lower`: blocks, and the layers that look back.
    blocks, at, layers = text.partition("@")
    settings: dict[str, Any] = {"lookback": int(blocks) if blocks.isdecimal() else blocks}
    return settings | ({"lookback_layers": layers} if at else {})


def parse_all(text: str) -> list[Variant]:
    """Read several variants, separated by commas.

    Raises:
        InvalidInputError: For an empty variant, or one that is named twice; and as `parse` does.
    """
    parts = text.split(",")
    if not all(part.strip() for part in parts):
        raise InvalidInputError(
            f"variants {quote(text)} contain an empty entry; separate methods with single commas"
        )
    variants: list[Variant] = []
    for part in parts:
        variant = parse(part)
        if variant in variants:
            raise InvalidInputError(f"variant {quote(variant.key)} is named twice; name it once")
        variants.append(variant)
    return variants


def _checked(size: int | str | None, name: str) -> int | str | None:
    """Parse a size as tokens, or as a fraction such as "/4"."""
    if size is None:
        return None
    if isinstance(size, str) and _FRACTION.fullmatch(size.strip()):
        return size.strip()
    if isinstance(size, str) and size.strip().startswith("/"):
        raise SizeError(
            f"{name} {quote(size)} is not a fraction of the length; write /4 for a quarter"
        )
    tokens = parse_size(size, name)
    if tokens < (1 if name == "block_size" else 0):
        raise SizeError(f"{name} {tokens} is too small; give a positive number of tokens")
    return tokens


def _resolved(size: int | str | None, tokens: int) -> int | None:
    if isinstance(size, str):
        fraction = _FRACTION.fullmatch(size)
        return None if fraction is None else -(-tokens // int(fraction[1]))
    return size


def _written(size: int | str | None) -> str:
    """Format a size as `parse` reads it, without thousands separators."""
    if isinstance(size, int):
        return format_size(size).replace(",", "")
    return size or ""
