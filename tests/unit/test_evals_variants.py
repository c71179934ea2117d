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
        (
            "star:/8:64:lookback=2@lower",
            "star:/8:64:lookback=2@lower",
            "star b=/8 a=64 lookback=2@lower",
        ),
        ("star:/8:lookback=2", "star:/8:64:lookback=2", "star b=/8 a=64 lookback=2"),
        ("star:/8:second_look=0.10", "star:/8:second_look=0.1", "star b=/8 second_look=0.1"),
        ("star:second_look=1", "star:second_look=1", None),
        ("star:/8:second_look=0.0", "star:/8", None),
        (
            "star:/8:64:kv=fp8:second_look=.25:lookback=2@lower",
            "star:/8:64:lookback=2@lower:second_look=0.25:kv=fp8",
            None,
        ),
        ("star:/8:lookback=2@0.5", "star:/8:64:lookback=2@lower", None),
        ("star:/8:lookback=2@all", "star:/8:64:lookback=2", None),
        ("star:/8:lookback=2@0-2+3+8", "star:/8:64:lookback=2@0-3+8", None),
        ("star:/8:lookback=02@0.33", "star:/8:64:lookback=2@0.33", None),
        ("star:/8:kv=fp8:lookback=1", "star:/8:64:lookback=1:kv=fp8", None),
        ("star:lookback=1", "star::64:lookback=1", "star a=64 lookback=1"),
        ("star:/8:lookback=0", "star:/8", None),
        ("star:/8:lookback=0@lower", "star:/8", None),
        ("star:/8:=:lookback=1", "star:/8:=:lookback=1", "star b=/8 a=/8 lookback=1"),
        ("star:/8:/8:lookback=1", "star:/8:=:lookback=1", None),
        ("star:1k:=:lookback=1", "star:1k:1k:lookback=1", None),
        ("star:32:lookback=1", "star:32:32:lookback=1", None),
        ("star:32:=:lookback=1", "star:32:32:lookback=1", None),
    ],
)
def test_variants_are_read_back_from_their_keys(text: str, key: str, name: str | None) -> None:
    variant = parse(text)
    assert variant.key == key
    assert name is None or variant.name == name
    assert parse(variant.key) == variant


def test_fractions_are_rounded_up_so_that_no_block_is_added() -> None:
    assert parse("star:/4").sizes(1001) == (251, None)
    assert parse("star:/4:/8").sizes(1024) == (256, 128)
    assert parse("streaming_llm:/4:=").sizes(1024) == (256, 256)
    assert parse("dense").sizes(1024) == (None, None)
    assert parse("star:/8:lookback=1").sizes(1024) == (128, 64)
    assert parse("star:/8:lookback=1").sizes(256) == (32, 32)


def test_the_rules_of_generate_are_those_of_a_variant_without_sizes() -> None:
    assert parse("star").follows_rule
    assert parse("star:lookback=2@lower").follows_rule
    assert not parse("star:/4:lookback=2").follows_rule
    assert not parse("star::32:lookback=2").follows_rule


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
        ("dense:lookback=1", "lookback 1 does not work with method 'dense', which has no blocks"),
        ("streaming_llm:2k:lookback=1", "lookback 1 does not work with method 'streaming_llm'"),
        ("star:/4:lookback=1:anchor=random", "lookback 1 does not work with another anchor"),
        ("star:/4:positions=random:lookback=1", "lookback 1 does not work with another anchor"),
        ("star:/4:lookback=-1", "lookback '-1' is not a number of blocks"),
        ("star:/4:lookback=two", "lookback 'two' is not a number of blocks"),
        ("star:/4:lookback=2@", "lookback_layers '' names no layers"),
        ("star:/4:lookback=2@middle", "lookback_layers 'middle' names no layers"),
        ("star:/4:lookback=2@0,3", "method '3' is unknown"),
        ("star:/4:second_look=2", "second_look 2.0 is not a share from 0 to 1"),
        ("star:/4:second_look=nan", "second_look nan is not a share from 0 to 1"),
        ("star:/4:second_look=some", "second_look 'some': expected a number, got str"),
        ("dense:second_look=0.1", "second_look 0.1 does not work: every token of a dense context"),
        ("star:/4:second_look=0.1,star:/4:second_look=.1", "is named twice"),
        ("star:/4:lookback=1:lookback=2", "'lookback=2', which is not a setting"),
        ("star:/4:=:lookback=1,star:/4:/4:lookback=1", "is named twice"),
        ("star:256:512", "has an anchor of 512 tokens and blocks of 256"),
        ("dense,", "variants 'dense,' contain an empty entry; separate methods with single commas"),
        ("dense,star:4k,star:4096", "variant 'star:4k' is named twice"),
    ],
)
def test_bad_variants_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_all(text)
    assert message in str(caught.value)
