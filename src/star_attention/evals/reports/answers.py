"""The questions of a run, with right answers and those of all variants side by side."""

from __future__ import annotations

from star_attention.evals.reports.results import Results, variant_name
from star_attention.evals.reports.tables import MAX_SIDE_BY_SIDE, Table
from star_attention.evals.runs.predictions import Prediction

MOST_QUESTIONS = 100
"""Questions that a report shows."""

_MOST_CHARACTERS = 500
"""Characters of a text that a cell shows."""


def answers_table(results: Results) -> Table:
    """Return a row for each question, those first that some variant has not fully right.

    With many variants there is a row for each answer instead.
    """
    questions = _questions(results)[:MOST_QUESTIONS]
    names = [variant_name(key) for key in results.variants]
    if len(names) <= MAX_SIDE_BY_SIDE:
        head = ("question", "right answers", *names)
        return (
            head,
            *(
                (*_asked(predictions), *(_answer(predictions.get(key)) for key in results.variants))
                for predictions in questions
            ),
        )
    rows = [
        (*(_asked(predictions) if index == 0 else ("", "")), names[index], _answer(prediction))
        for predictions in questions
        for index, prediction in enumerate(predictions.get(key) for key in results.variants)
    ]
    return (("question", "right answers", "variant", "answer"), *rows)


def count_questions(results: Results) -> int:
    """Return the number of samples that have an answer."""
    return len({prediction.sample for prediction in results.predictions})


def _questions(results: Results) -> list[dict[str, Prediction]]:
    """Return the predictions of each sample by variant, in the order of the run."""
    by_sample: dict[str, dict[str, Prediction]] = {}
    for prediction in results.predictions:
        by_sample.setdefault(prediction.sample, {})[prediction.variant] = prediction

    def is_right(predictions: dict[str, Prediction]) -> bool:
        return all(prediction.score == 1 for prediction in predictions.values())

    return sorted(by_sample.values(), key=is_right)


def _asked(predictions: dict[str, Prediction]) -> tuple[str, str]:
    """Return the cells of a sample's question and of its right answers."""
    first = next(iter(predictions.values()))
    question = "" if first.query is None else _shortened(first.query.strip())
    return f"{question} [{first.sample}]".strip(), _shortened(" / ".join(first.answers))


def _answer(prediction: Prediction | None) -> str:
    if prediction is None:
        return "–"
    text = _shortened(prediction.prediction.strip()) or "(empty)"
    cut = ", cut off" if prediction.finish_reason == "length" and prediction.score < 1 else ""
    return f"{text} ({100 * prediction.score:.0f} %{cut})"


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} …"
