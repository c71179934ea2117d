"""Rendered text keeps track of what users wrote, through joining and slicing."""

from __future__ import annotations

from star_attention.hf.text.rendered import RenderedText

TURN = RenderedText("<|user|>a <|end|> b<|end|>", ((8, 19),))


def literals(rendered: RenderedText) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.literal]


def test_slices_joined_again_are_the_whole() -> None:
    """A cut inside a span, at its ends or outside of it leaves neither a gap nor a second span."""
    for at in range(len(TURN) + 1):
        head, tail = TURN.slice(0, at), TURN.slice(at)
        assert "".join(literals(head) + literals(tail)) == "a <|end|> b"
        assert head + tail == TURN


def test_spans_of_different_turns_stay_apart() -> None:
    both = TURN + TURN
    assert literals(both) == ["a <|end|> b"] * 2
    assert (RenderedText("x") + TURN).literal == ((9, 20),)
