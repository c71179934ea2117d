"""Means, standard errors and paired intervals: the textbook's numbers, and coverage on simulated data."""

from __future__ import annotations

import math
import random
from statistics import mean, stdev

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.reports import stats
from star_attention.evals.reports.stats import Scored


def scored(
    scores: list[float], cell: str = "task", *, sharing: int = 1, prose: str = ""
) -> list[Scored]:
    """`sharing` samples in a row have one context."""
    return [
        Scored(
            sample=f"{cell}-{i}",
            cell=cell,
            context=f"{cell}-{i // sharing}",
            score=score,
            prose=prose,
        )
        for i, score in enumerate(scores)
    ]


def test_mean_and_standard_error_are_the_textbooks() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.5, 0.75]
    found = stats.mean(scored(values))
    assert found.value == pytest.approx(mean(values))
    assert found.stderr == pytest.approx(stdev(values) / math.sqrt(6))
    assert (found.n, found.contexts) == (6, 6)


def test_overall_is_the_mean_of_task_means() -> None:
    large, small = [1.0] * 8 + [0.0] * 2, [0.0, 1.0] * 3
    found = stats.mean(scored(large, "a") + scored(small, "b"))
    assert found.value == pytest.approx((0.8 + 0.5) / 2)
    errors = [stdev(large) / math.sqrt(10), stdev(small) / math.sqrt(6)]
    assert found.stderr == pytest.approx(math.hypot(*errors) / 2)


@pytest.mark.parametrize(("count", "sharing"), [(1, 1), (2, 1), (5, 1), (20, 4)])
def test_few_contexts_have_no_error_and_no_interval(count: int, sharing: int) -> None:
    ones, zeros = (scored([value] * count, sharing=sharing) for value in (1.0, 0.0))
    many = [scored([value] * 50, "many") for value in (1.0, 0.0)]
    assert stats.mean(ones).stderr is None
    assert stats.mean(ones + many[0]).stderr is None
    for found in (stats.paired(ones, zeros), stats.paired(ones + many[0], zeros + many[1])):
        assert (found.value, found.low, found.high) == (1.0, None, None)
        assert found.verdict == "too few samples to say"


def test_six_contexts_are_enough() -> None:
    assert stats.mean(scored([1.0] * 6)).stderr == 0.0
    assert stats.paired(scored([1.0] * 6), scored([0.0] * 6)).verdict == "higher"


def test_questions_on_one_context_count_as_one_draw() -> None:
    """Ten questions that all fall with their context must not look like ten samples."""
    values = [float(context % 2) for context in range(6) for _ in range(10)]
    shared, alone = stats.mean(scored(values, sharing=10)), stats.mean(scored(values))
    assert shared.value == alone.value
    assert shared.stderr == pytest.approx(stdev([0.0, 1.0] * 3) / math.sqrt(6))
    assert shared.contexts == 6
    zero = [0.0] * 60
    wide = stats.paired(scored(values, sharing=10), scored(zero, sharing=10))
    narrow = stats.paired(scored(values), scored(zero))
    assert wide.high is not None
    assert wide.low is not None
    assert narrow.high is not None
    assert narrow.low is not None
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ([1.0, 0.0] * 4, [1.0, 0.0] * 4, "no difference seen"),
        ([1.0] * 10, [0.0] * 10, "higher"),
        ([0.0] * 10, [1.0] * 10, "lower"),
        ([1.0] * 10, [0.0] + [1.0] * 9, "no difference seen"),
    ],
)
def test_an_interval_that_holds_zero_is_no_difference(
    one: list[float], other: list[float], verdict: str
) -> None:
    assert stats.paired(scored(one), scored(other)).verdict == verdict


def test_limits_cut_an_interval_and_nothing_else() -> None:
    """Losses, as perplexity has them, differ by as much as they like: `paired` must not cut by itself."""
    far = stats.paired(scored([0.0] * 7 + [9.0]), scored([10.0] * 8))
    assert far.low is not None
    assert far.low < -10.0 < far.value
    near = far.within(-10.0, 10.0)
    assert (near.value, near.low, near.high, near.n) == (far.value, -10.0, far.high, far.n)
    few = stats.paired(scored([1.0]), scored([0.0]))
    assert few.within(-1.0, 1.0) == few


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = random.Random("seeds")
    one, other = (scored([rng.random() for _ in range(30)]) for _ in range(2))
    assert stats.paired(one, other, seed=3) == stats.paired(one, other, seed=3)
    assert stats.paired(one, other, seed=3) != stats.paired(one, other, seed=4)


def test_pairing_is_by_sample_and_not_by_place() -> None:
    one = scored([0.0, 1.0] * 4)
    assert stats.paired(one, one[::-1]) == stats.paired(one, one)


@pytest.mark.parametrize("tasks", [1, 3])
def test_intervals_cover(tasks: int) -> None:
    """95 % intervals hold the true difference in about 95 % of simulated runs (0/1 scores, paired, correlated)."""
    rng = random.Random(f"coverage {tasks}")
    trials, held = 500, 0
    for trial in range(trials):
        one, other = [], []
        for task in range(tasks):
            pairs = []
            for _ in range(40):
                easy = rng.random()  # (what both find easy, so that they are correlated)
                pairs.append(
                    (
                        float(easy < 0.8 or rng.random() < 0.1),
                        float(easy < 0.6 or rng.random() < 0.2),
                    )
                )
            one += scored([a for a, _ in pairs], f"{task}")
            other += scored([b for _, b in pairs], f"{task}")
        truth = (0.8 + 0.2 * 0.1) - (0.6 + 0.4 * 0.2)
        found = stats.paired(one, other, seed=trial, resamples=1000)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    assert 0.925 <= held / trials <= 0.975


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            scored([1.0, 0.0]),
            scored([1.0]),
            "1 samples have a score on one side only, task-1 first",
        ),
        (scored([1.0], prose="ab"), scored([1.0], prose="cd"), "made of different prose (ab, cd)"),
        (
            scored([1.0]),
            [Scored(sample="task-0", cell="task", context="x", score=1.0)],
            "differs between both sides",
        ),
        ([], [], "no scores to compare"),
    ],
)
def test_what_is_no_pair_is_refused(one: list[Scored], other: list[Scored], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        stats.paired(one, other)
    assert message in str(caught.value)


def test_no_scores_have_no_mean() -> None:
    with pytest.raises(InvalidInputError, match="no scores"):
        stats.mean([])
