"""Means, standard errors and paired intervals: textbook numbers, and coverage on simulated data."""

from __future__ import annotations

import math
import random
from statistics import mean, stdev

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals import stats
from star_attention.evals.stats import Scored


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
    result = stats.mean(scored(values))
    assert result.value == pytest.approx(mean(values))
    assert result.stderr == pytest.approx(stdev(values) / math.sqrt(6))
    assert (result.n, result.contexts) == (6, 6)


def test_overall_is_the_mean_of_task_means() -> None:
    large, small = [1.0] * 8 + [0.0] * 2, [0.0, 1.0] * 3
    result = stats.mean(scored(large, "a") + scored(small, "b"))
    assert result.value == pytest.approx((0.8 + 0.5) / 2)
    errors = [stdev(large) / math.sqrt(10), stdev(small) / math.sqrt(6)]
    assert result.stderr == pytest.approx(math.hypot(*errors) / 2)


@pytest.mark.parametrize(("count", "sharing"), [(1, 1), (2, 1), (5, 1), (20, 4)])
def test_few_contexts_have_no_error_and_no_interval(count: int, sharing: int) -> None:
    ones, zeros = (scored([value] * count, sharing=sharing) for value in (1.0, 0.0))
    many = [scored([value] * 50, "many") for value in (1.0, 0.0)]
    assert stats.mean(ones).stderr is None
    assert stats.mean(ones + many[0]).stderr is None
    for difference in (stats.paired(ones, zeros), stats.paired(ones + many[0], zeros + many[1])):
        assert (difference.value, difference.low, difference.high) == (1.0, None, None)
        assert difference.verdict == "too few samples to say"


def test_six_contexts_are_enough() -> None:
    assert stats.mean(scored([1.0] * 6)).stderr == 0.0
    assert stats.paired(scored([1.0] * 6), scored([0.0] * 6)).verdict == "higher"


def test_questions_on_one_context_count_as_one_draw() -> None:
    """Forbids that ten questions that depend on their context look like ten samples."""
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
    ("scores", "baseline", "verdict"),
    [
        ([1.0, 0.0] * 4, [1.0, 0.0] * 4, "no difference seen"),
        ([1.0] * 10, [0.0] * 10, "higher"),
        ([0.0] * 10, [1.0] * 10, "lower"),
        ([1.0] * 10, [0.0] + [1.0] * 9, "no difference seen"),
    ],
)
def test_an_interval_that_contains_zero_shows_no_difference(
    scores: list[float], baseline: list[float], verdict: str
) -> None:
    assert stats.paired(scored(scores), scored(baseline)).verdict == verdict


def test_limits_clip_the_interval_and_nothing_else() -> None:
    """Losses, as of perplexity, differ without limits: `paired` must not clip by itself."""
    far = stats.paired(scored([0.0] * 7 + [9.0]), scored([10.0] * 8))
    assert far.low is not None
    assert far.low < -10.0 < far.value
    near = far.within(-10.0, 10.0)
    assert (near.value, near.low, near.high, near.n) == (far.value, -10.0, far.high, far.n)
    few = stats.paired(scored([1.0]), scored([0.0]))
    assert few.within(-1.0, 1.0) == few


def test_the_same_seed_gives_the_same_interval() -> None:
    rng = random.Random("seeds")
    scores, baseline = (scored([rng.random() for _ in range(30)]) for _ in range(2))
    assert stats.paired(scores, baseline, seed=3) == stats.paired(scores, baseline, seed=3)
    assert stats.paired(scores, baseline, seed=3) != stats.paired(scores, baseline, seed=4)


def test_pairing_is_by_sample_and_not_by_place() -> None:
    scores = scored([0.0, 1.0] * 4)
    assert stats.paired(scores, scores[::-1]) == stats.paired(scores, scores)


@pytest.mark.parametrize("tasks", [1, 3])
def test_intervals_cover(tasks: int) -> None:
    """95 % intervals contain the true difference in about 95 % of simulated runs.

    The scores are 0 or 1, paired and correlated.
    """
    rng = random.Random(f"coverage {tasks}")
    trials, covered = 500, 0
    for trial in range(trials):
        scores, baseline = [], []
        for task in range(tasks):
            pairs = []
            for _ in range(40):
                # Both find the same samples easy, so that their scores are correlated.
                easy = rng.random()
                pairs.append(
                    (
                        float(easy < 0.8 or rng.random() < 0.1),
                        float(easy < 0.6 or rng.random() < 0.2),
                    )
                )
            scores += scored([a for a, _ in pairs], f"{task}")
            baseline += scored([b for _, b in pairs], f"{task}")
        truth = (0.8 + 0.2 * 0.1) - (0.6 + 0.4 * 0.2)
        difference = stats.paired(scores, baseline, seed=trial, resamples=1000)
        assert difference.low is not None
        assert difference.high is not None
        covered += difference.low <= truth <= difference.high
    assert 0.925 <= covered / trials <= 0.975


@pytest.mark.parametrize(
    ("scores", "baseline", "message"),
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
def test_scores_that_do_not_pair_are_refused(
    scores: list[Scored], baseline: list[Scored], message: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        stats.paired(scores, baseline)
    assert message in str(caught.value)


# ------------------------------------------------------------------ shares of a way


def three_methods(rng: random.Random, count: int) -> list[list[Scored]]:
    """Draw scores of a method, of a worse one and of a better one; its true share is 0.75."""
    methods: list[list[float]] = [[], [], []]
    for _ in range(count):
        easy = rng.random()
        for scores, limit in zip(methods, (0.7, 0.4, 0.8), strict=True):
            scores.append(float(easy < limit))
    return [scored(scores) for scores in methods]


def test_a_share_is_none_of_the_way_or_all_of_it() -> None:
    scores, worst, best = three_methods(random.Random("share"), 60)
    for own, share in ((worst, 0.0), (best, 1.0)):
        found = stats.share(own[::-1], worst, best)
        assert (found.value, found.low, found.high, found.n) == (share, share, share, 60)
    found = stats.share(scores, worst, best)
    way = stats.paired(best, worst).value
    assert found.value == pytest.approx(stats.paired(scores, worst).value / way)


def test_intervals_of_a_share_cover() -> None:
    rng, trials, covered = random.Random("coverage of shares"), 400, 0
    for trial in range(trials):
        found = stats.share(*three_methods(rng, 80), seed=trial, resamples=1000)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0.75 <= found.high
    assert 0.91 <= covered / trials <= 0.98


def test_there_is_no_share_of_nothing() -> None:
    scores, worst, best = three_methods(random.Random("nothing"), 60)
    with pytest.raises(InvalidInputError, match="a share of nothing is no number"):
        stats.share(scores, best, worst)
    few = stats.share(*(side[:5] for side in (scores, worst, scored([1.0] * 60))))
    assert few.low is None
    # One sample of sixty makes the way: two of three resamples hold it.
    narrow = scored([1.0] + [0.0] * 59)
    assert stats.share(narrow, scored([0.0] * 60), narrow).high is None


def test_no_scores_have_no_mean() -> None:
    with pytest.raises(InvalidInputError, match="no scores"):
        stats.mean([])
