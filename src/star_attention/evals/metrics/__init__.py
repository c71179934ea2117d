"""Scores of predictions, from 0 to 1: of one sample's prediction, by the rule that its data set publishes."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable

from star_attention.errors import InvalidInputError
from star_attention.evals.samples.sample import Sample

Metric = Callable[[str, Sample], float]

METRICS = {
    "string_match_all": "star_attention.evals.metrics:string_match_all",
    "string_match_part": "star_attention.evals.metrics:string_match_part",
    "babilong": "star_attention.evals.suites.babilong:answer_match",
    "first_integer": "star_attention.evals.suites.infinitebench:first_integer",
    "last_integer": "star_attention.evals.suites.infinitebench:last_integer",
    "first_number": "star_attention.evals.suites.infinitebench:first_number",
    "leading_integers": "star_attention.evals.suites.infinitebench:leading_integers",
    "whole_word": "star_attention.evals.suites.infinitebench:whole_word",
    "name_word": "star_attention.evals.suites.infinitebench:name_word",
    "option_letter": "star_attention.evals.suites.infinitebench:option_letter",
    "option_function": "star_attention.evals.suites.infinitebench:option_function",
    "token_f1": "star_attention.evals.suites.infinitebench:token_f1",
    "character_f1": "star_attention.evals.suites.infinitebench:character_f1",
    "rouge_lsum": "star_attention.evals.suites.infinitebench:rouge_lsum",
}
"""By name, imported on use; suites add theirs."""


def score(prediction: str, sample: Sample) -> float:
    """Of one prediction, by the sample's own metric.

    Raises `InvalidInputError` for an unknown one.
    """
    if sample.metric not in METRICS:
        raise InvalidInputError(
            f"metric {sample.metric!r} of sample {sample.id} is unknown; choose one of {', '.join(METRICS)}"
        )
    module, _, name = METRICS[sample.metric].partition(":")
    metric: Metric = getattr(importlib.import_module(module), name)
    return metric(prediction, sample)


def string_match_all(prediction: str, sample: Sample) -> float:
    """RULER's: the share of the answers that stand somewhere in the prediction, in whatever case."""
    given = _cleaned(prediction)
    return sum(answer.lower() in given for answer in sample.answers) / len(sample.answers)


def string_match_part(prediction: str, sample: Sample) -> float:
    """RULER's for questions with several right answers: whether any of them stands in the prediction."""
    given = _cleaned(prediction)
    return float(any(answer.lower() in given for answer in sample.answers))


def _cleaned(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()
