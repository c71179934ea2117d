"""Segments: a tuple of runs that counts and locates its tokens."""

from __future__ import annotations

import json
import pickle

import pytest

from star_attention.planning.segments import Segments

SINKS_AND_WINDOW = Segments([(0, 4), (96, 128)])


def test_tokens_are_counted_over_all_runs() -> None:
    assert SINKS_AND_WINDOW.tokens == 36
    assert Segments().tokens == 0
    assert Segments.prefix(7).tokens == 7


def test_offsets_number_the_tokens_in_order() -> None:
    tokens = [token for start, stop in SINKS_AND_WINDOW for token in range(start, stop)]
    assert [SINKS_AND_WINDOW.offset(token) for token in tokens] == list(range(36))
    assert all(SINKS_AND_WINDOW.holds(token) for token in tokens)


@pytest.mark.parametrize("token", [4, 95, 128, -1])
def test_a_token_outside_the_runs_has_no_offset(token: int) -> None:
    assert not SINKS_AND_WINDOW.holds(token)
    with pytest.raises(AssertionError, match=f"token {token} is not in segments"):
        SINKS_AND_WINDOW.offset(token)


def test_a_prefix_of_no_tokens_is_empty() -> None:
    assert not Segments.prefix(0)
    assert Segments.prefix(3) == ((0, 3),)


def test_only_the_last_run_grows() -> None:
    assert SINKS_AND_WINDOW.grow_to(140) == ((0, 4), (96, 140))


def test_segments_compare_pickle_and_serialize_as_tuples_of_pairs() -> None:
    """Forbids a change of saved headers, and of what ranks send each other."""
    assert SINKS_AND_WINDOW == ((0, 4), (96, 128))
    copy = pickle.loads(pickle.dumps(SINKS_AND_WINDOW))
    assert (type(copy), copy) == (Segments, SINKS_AND_WINDOW)
    assert json.dumps({"segments": SINKS_AND_WINDOW}) == '{"segments": [[0, 4], [96, 128]]}'
