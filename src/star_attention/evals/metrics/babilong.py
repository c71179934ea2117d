"""BABILong's published comparison of a prediction with the target."""

from __future__ import annotations

import re
from collections.abc import Collection

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.samples.sample import Sample
from star_attention.evals.suites.babilong.stories import LABELS as GENERATED

_ROOMS = GENERATED["qa1"]
_DIRECTIONS = ("n", "e", "s", "w")
_TURNED_BACK = {"n": "s", "s": "n", "e": "w", "w": "e"}

LABELS = GENERATED | {
    "qa6": ("no", "yes"),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": ("no", "yes"),
    "qa10": ("maybe", "no", "yes"),
    "qa11": _ROOMS,
    "qa12": _ROOMS,
    "qa13": _ROOMS,
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa17": ("no", "yes"),
    "qa18": ("no", "yes"),
    # Two steps, none of which undoes the other.
    "qa19": tuple(
        f"{first},{second}"
        for first in _DIRECTIONS
        for second in _DIRECTIONS
        if second != _TURNED_BACK[first]
    ),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}
"""Everything that can be an answer of each published task."""


def label_match(prediction: str, sample: Sample) -> float:
    """Return 1 if the first sentence names the target, and no other label of the task.

    Labels that the question names do not count. A target with commas is a set of labels.

    Raises:
        InvalidInputError: The labels of the task are unknown.
    """
    if sample.task not in LABELS:
        raise InvalidInputError(
            f"metric babilong of sample {sample.id} has no labels for task {quote(sample.task)}; it"
            f" scores {', '.join(LABELS)}"
        )
    sentence = re.split(r"\.|<context>|<example>", prediction.lower(), maxsplit=1)[0]
    question = sample.query.lower()
    labels = [label.lower() for label in LABELS[sample.task]]
    predicted = {label for label in labels if label in sentence and label not in question}
    return float(any(predicted == _target(answer.lower(), labels) for answer in sample.answers))


def _target(answer: str, labels: Collection[str]) -> set[str]:
    """Return the labels of a target; those of qa19 contain a comma."""
    return {answer} if answer in labels else {part.strip() for part in answer.split(",")}
