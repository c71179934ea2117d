"""Facts to plant in a text: words for their keys, and the wording of RULER's needles.

The bundled model was trained on this wording, and other models understand it.
"""

from __future__ import annotations

ADJECTIVES = tuple(
    """
amber ancient brisk calm clever crimson curious dusty eager faded gentle golden hidden humble icy
jolly lonely mellow misty noble patient quiet rusty scarlet shy silver solemn stormy sunny tidy
velvet vivid weary winter wooden
""".split()  # noqa: SIM905
)
NOUNS = tuple(
    """
badger barley beacon candle canyon castle cedar chimney clover comet copper falcon feather fiddle
fountain garden glacier hammer harbor kettle ladder lantern lemon marble meadow mirror orchard otter
paddle pebble pillow raven ribbon saddle sparrow teapot thistle tunnel violin walnut willow
""".split()  # noqa: SIM905
)


def needle(key: str, value: str, values: str) -> str:
    """Return a needle. The kind of its value is plural even if the question is singular."""
    return f"One of the special magic {values} for {key} is: {value}."


def head(values: str, *, single: bool) -> str:
    """Return the instruction before the text, for a single value or several."""
    article, verb, kind = ("A", "is", _singular(values)) if single else ("Some", "are", values)
    return (
        f"{article} special magic {kind} {verb} hidden within the following text. Make sure to"
        f" memorize it. I will quiz you about the {kind} afterwards.\n"
    )


def question(keys: list[str], values: str, *, single: bool) -> tuple[str, str]:
    """Return the question for the values of some keys, and the beginning of its answer."""
    verb, quantity, kind = (
        ("is", "is the", _singular(values)) if single else ("are", "are all the", values)
    )
    names = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return (
        f"What {quantity} special magic {kind} for {names} mentioned in the provided text?",
        f" The special magic {kind} for {names} mentioned in the provided text {verb}",
    )


def _singular(values: str) -> str:
    return values.removesuffix("s")
