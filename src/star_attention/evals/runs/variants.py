"""What is compared on the same samples: an attention method with its sizes, written `star:/4` or `streaming_llm:2k:64`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from star_attention.config import KV_DTYPES, METHODS
from star_attention.errors import InvalidInputError, SizeError
from star_attention.planning.plan import format_size, parse_size

SAME = "="
"""An anchor as large as the block."""

_SHARE = re.compile(r"/([1-9][0-9]*)")
_BLOCKED = ("star", "streaming_llm")
_WORDS = {"anchor": "anchor", "positions": "anchor_positions", "kv": "kv_dtype"}

SYNTAX = (
    "write METHOD[:BLOCK[:ANCHOR]] with sizes as 4k, or /4 for a quarter of the length (anchor also =, as large as the block), then"
    " kv=fp8, anchor=NAME, positions=NAME"
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One attention method with its settings.

    block_size: tokens, "/4" for a quarter of a sample's length, or None for the paper's rule. anchor_size: the same, or "=" for the
    block size; None takes the method's own. (For `streaming_llm` they are window and sinks.)
    anchor, anchor_positions: names of an ablation of the anchor, see `ablations`; None is the method as it is.

    Raises `InvalidInputError` for unknown names and for sizes of a method that has none, `SizeError` for bad sizes.
    """

    method: str = "star"
    block_size: int | str | None = None
    anchor_size: int | str | None = None
    anchor: str | None = None
    anchor_positions: str | None = None
    kv_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidInputError(
                f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}"
            )
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise InvalidInputError(
                f"kv_dtype {self.kv_dtype!r} is unknown; choose {', '.join(KV_DTYPES)}, or none"
            )
        if not self.has_blocks and (self.block_size, self.anchor_size) != (None, None):
            raise InvalidInputError(
                f"method {self.method!r} takes no block and no anchor; leave the sizes out"
            )
        if self.ablates:
            if self.method != "star":
                raise InvalidInputError(
                    f"ablations of the anchor are of method 'star', not of {self.method!r}"
                )
            from star_attention.evals.runs import ablations

            for value, known in (
                (self.anchor, ablations.CONTENTS),
                (self.anchor_positions, ablations.POSITIONS),
            ):
                if value not in (None, *known):
                    raise InvalidInputError(
                        f"anchor {value!r} is unknown; choose one of {', '.join(known)}"
                    )
        # (One way to write a size, so that equal variants have equal keys.)
        object.__setattr__(self, "block_size", _checked(self.block_size, "block_size"))
        if self.anchor_size != SAME:
            object.__setattr__(self, "anchor_size", _checked(self.anchor_size, "anchor_size"))
        elif self.method == "star":
            object.__setattr__(self, "anchor_size", None)
        elif self.block_size is None:
            raise SizeError("anchor_size '=' is as large as the block; give a block_size with it")
        if isinstance(self.block_size, int) and isinstance(self.anchor_size, int):
            self.sizes(self.block_size)

    @property
    def has_blocks(self) -> bool:
        """Whether the method has a block size and an anchor size (or window and sinks)."""
        return self.method in _BLOCKED

    @property
    def ablates(self) -> bool:
        """Whether blocks are encoded behind an anchor of another kind."""
        return (self.anchor, self.anchor_positions) != (None, None)

    @property
    def key(self) -> str:
        """What `parse` reads back; results are kept under it."""
        sizes = (
            []
            if self.block_size is None and self.anchor_size is None
            else [_written(self.block_size)]
        )
        sizes += [] if self.anchor_size is None else [_written(self.anchor_size)]
        more = [
            f"{word}={value}"
            for word, name in _WORDS.items()
            if (value := getattr(self, name)) is not None
        ]
        return ":".join([self.method, *sizes, *more])

    @property
    def name(self) -> str:
        """For tables and pictures: "dense", "star b=/4 a=1k"."""
        sizes = [("b", self.block_size), ("a", self.anchor_size)]
        if self.method == "streaming_llm":
            sinks = self.block_size if self.anchor_size == SAME else self.anchor_size
            sizes = [("window", self.block_size), ("sinks", sinks)]
        words = [f"{word}={_written(size)}" for word, size in sizes if size is not None]
        words += [
            f"{word}={value}"
            for word, name in _WORDS.items()
            if (value := getattr(self, name)) is not None
        ]
        return " ".join([self.method, *words])

    def sizes(self, tokens: int) -> tuple[int | None, int | None]:
        """Block and anchor in tokens for a text of `tokens`; None is left to the method. A share is rounded up.

        Raises `SizeError` for an anchor that is larger than the block.
        """
        block, anchor = _resolved(self.block_size, tokens), _resolved(self.anchor_size, tokens)
        if self.anchor_size == SAME:
            anchor = block
        if self.method == "star" and block is not None and anchor is not None and anchor > block:
            raise SizeError(
                f"variant {self.key!r} has an anchor of {anchor:,} tokens and blocks of {block:,} at {tokens:,} tokens; give an"
                " anchor of at most the block"
            )
        return block, anchor


def parse(text: str) -> Variant:
    """`star:/4`, `star:4k:1k`, `dense`, `streaming_llm:2k:64`, `star:/4:kv=fp8`, `star:/4:anchor=random`.

    Raises `InvalidInputError` or `SizeError`.
    """
    method, *parts = text.strip().split(":")
    sizes: list[str] = []
    words: dict[str, str] = {}
    for part in parts:
        word, equals, value = part.partition("=")
        if word and equals:
            if word not in _WORDS or _WORDS[word] in words or not value:
                raise InvalidInputError(
                    f"variant {text!r} has {part!r}, which is no setting; {SYNTAX}"
                )
            words[_WORDS[word]] = value
        elif words or len(sizes) == 2:
            raise InvalidInputError(f"variant {text!r} has {part!r} out of place; {SYNTAX}")
        else:
            sizes.append(part)
    block, anchor = [*sizes, "", ""][:2]
    return Variant(method=method, block_size=block or None, anchor_size=anchor or None, **words)


def parse_all(text: str) -> list[Variant]:
    """Several, with commas between. Raises `InvalidInputError` for one that is named twice, or empty."""
    if not all(part.strip() for part in text.split(",")):
        raise InvalidInputError(
            f"variants {text!r} have an empty one; give methods with single commas between"
        )
    found = [parse(part) for part in text.split(",")]
    for index, variant in enumerate(found):
        if variant in found[:index]:
            raise InvalidInputError(f"variant {variant.key!r} is named twice; give it once")
    return found


def _checked(size: int | str | None, name: str) -> int | str | None:
    if size is None or (isinstance(size, str) and _SHARE.fullmatch(size.strip())):
        return size if size is None else str(size).strip()
    if isinstance(size, str) and size.strip().startswith("/"):
        raise SizeError(f"{name} {size!r} is no share of the length; write /4 for a quarter")
    tokens = parse_size(size, name)
    if tokens < (1 if name == "block_size" else 0):
        raise SizeError(f"{name} {tokens} is too small; give a positive number of tokens")
    return tokens


def _resolved(size: int | str | None, tokens: int) -> int | None:
    if isinstance(size, str):
        found = _SHARE.fullmatch(size)
        return None if found is None else -(-tokens // int(found[1]))
    return size


def _written(size: int | str | None) -> str:
    """As `parse` reads it (no thousands separators)."""
    if isinstance(size, int):
        return format_size(size).replace(",", "")
    return size or ""
