"""A parsed variant is written back unchanged; others are refused."""

from __future__ import annotations

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.runs.variants import parse, parse_all


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [
        ("star", "star", "star"),
        ("star:/4", "star:/4", "star b=/4"),
        ("star:4096:1024", "star:4k:1k", "star b=4k a=1k"),
        ("star:1000:=", "star:1000", "star b=1000"),
        ("star::64", "star::64", "star a=64"),
        ("star:/4:0:kv=fp8", "star:/4:0:kv=fp8", "star b=/4 a=0 kv=fp8"),
        ("star:/4:anchor=random", "star:/4:anchor=random", "star b=/4 anchor=random"),
        ("streaming_llm:2k:64", "streaming_llm:2k:64", "streaming_llm window=2k sinks=64"),
        ("streaming_llm:2k:=", "streaming_llm:2k:=", "streaming_llm window=2k sinks=2k"),
        (" dense", "dense", "dense"),
    ],
)
def test_variants_are_read_back_from_their_keys(text: str, key: str, name: str) -> None:
    variant = parse(text)
    assert (variant.key, variant.name) == (key, name)
    assert parse(variant.key) == variant


def test_fractions_are_rounded_up_so_that_no_block_is_added() -> None:
    assert parse("star:/4").sizes(1001) == (251, None)
    assert parse("star:/4:/8").sizes(1024) == (256, 128)
    assert parse("streaming_llm:/4:=").sizes(1024) == (256, 256)
    assert parse("dense").sizes(1024) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "method 'magic' is unknown; choose one of star, dense"),
        ("dense:4k", "method 'dense' takes no block and no anchor size"),
        ("star:/x", "'/x' is not a fraction of the length"),
        ("star:0", "block_size 0 is too small"),
        ("star:4k:-1", "anchor_size -1 is too small"),
        ("star:many", "block_size 'many' is not a number of tokens"),
        ("star:4k:1k:2", "has '2' out of place"),
        ("star:/4:color=red", "'color=red', which is not a setting"),
        ("star:/4:kv=fp3", "kv_dtype 'fp3' is unknown"),
        ("star:/4:anchor=magic", "anchor 'magic' is unknown; choose one of first-block"),
        (
            "streaming_llm:1k:anchor=random",
            "method 'streaming_llm' has no anchor to ablate; use method 'star'",
        ),
        ("star:/4:positions=magic", "positions 'magic' is unknown; choose one of first-block"),
        (
            "streaming_llm::=",
            "anchor_size '=' copies the block size, which is missing; give a block_size",
        ),
        ("star:256:512", "has an anchor of 512 tokens and blocks of 256"),
        ("dense,", "variants 'dense,' contain an empty entry; separate methods with single commas"),
        ("dense,star:4k,star:4096", "variant 'star:4k' is named twice"),
    ],
)
def test_bad_variants_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_all(text)
    assert message in str(caught.value)
