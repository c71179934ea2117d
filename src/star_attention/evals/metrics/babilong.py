"""BABILong's published comparison of a prediction with the target."""

from __future__ import annotations

import re

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.samples.sample import Sample
from star_attention.evals.suites.babilong.stories import LABELS


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
    targets = [{part.strip() for part in answer.lower().split(",")} for answer in sample.answers]
    return float(predicted in targets)
