"""Metrics: the score of one prediction, from 0 to 1, by the rule that its data set publishes."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.samples.sample import Sample

Metric = Callable[[str, Sample], float]

METRICS = {
    "string_match_all": "star_attention.evals.metrics.matching:string_match_all",
    "string_match_part": "star_attention.evals.metrics.matching:string_match_part",
    "contains": "star_attention.evals.metrics.matching:contains",
    "babilong": "star_attention.evals.metrics.babilong:label_match",
    "first_integer": "star_attention.evals.metrics.numbers:first_integer",
    "last_integer": "star_attention.evals.metrics.numbers:last_integer",
    "first_number": "star_attention.evals.metrics.numbers:first_number",
    "first_number_truncated": "star_attention.evals.metrics.numbers:first_number_truncated",
    "leading_integers": "star_attention.evals.metrics.numbers:leading_integers",
    "whole_word": "star_attention.evals.metrics.matching:whole_word",
    "name_word": "star_attention.evals.metrics.matching:name_word",
    "option_letter": "star_attention.evals.metrics.multiple_choice:option_letter",
    "option_function": "star_attention.evals.metrics.multiple_choice:option_function",
    "token_f1": "star_attention.evals.metrics.overlap:token_f1",
    "character_f1": "star_attention.evals.metrics.overlap:character_f1",
    "rouge_lsum": "star_attention.evals.metrics.rouge:rouge_lsum",
}
"""Functions by name, imported when they are first used."""


def score(prediction: str, sample: Sample) -> float:
    """Score a prediction by its sample's metric.

    Raises:
        InvalidInputError: The metric is unknown, or the answers are not of the kind it needs.
    """
    if sample.metric not in METRICS:
        raise InvalidInputError(
            f"metric {quote(sample.metric)} of sample {sample.id} is unknown;"
            f" choose one of {', '.join(METRICS)}"
        )
    module, _, name = METRICS[sample.metric].partition(":")
    metric: Metric = getattr(importlib.import_module(module), name)
    return metric(prediction, sample)
