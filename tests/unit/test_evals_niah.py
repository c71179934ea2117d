"""The grid of depths: one needle in prose, at each of its depths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals import metrics
from star_attention.evals.samples import sources
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from tests.engines import bundled_tokenizer

SUITE = get("niah")
NEEDLE = re.compile(r"One of the special magic numbers for (.+?) is: (\d{7})\. ?")


def generate(length: int, count: int = 1, seed: int = 0, **options: Any) -> list[Sample]:
    size = Size(tokenizer=bundled_tokenizer(), length=length)
    return list(SUITE.generate("niah_grid", size=size, count=count, seed=seed, options=options))


def text(sample: Sample) -> str:
    """The prose with its needle, from a prompt in RULER's form."""
    head = (
        "A special magic number is hidden within the following text. Make sure to memorize it. I"
        " will quiz you about the number afterwards.\n"
    )
    assert sample.context.startswith(head)
    assert sample.context.endswith("\n")
    return sample.context[len(head) : -1]


def test_each_depth_has_its_samples() -> None:
    samples = generate(1024, 2)
    assert [sample.meta["depth"] for sample in samples] == list(range(0, 101, 10)) * 2
    assert len({sample.id for sample in samples}) == 22
    assert generate(1024, 1) == samples[:11]
    assert generate(1024, 1, seed=1)[0].answers != samples[0].answers


def test_the_needle_is_at_its_depth() -> None:
    """Between the two sentences closest to it; at 0 before the first, at 100 after the last."""
    for length in (1024, 4096):
        for sample in generate(length, depths="0,12.5,50,75,100"):
            prose = text(sample)
            match = NEEDLE.search(prose)
            assert match
            rest = NEEDLE.sub("", prose)
            sentences = sources.split_sentences(rest)
            at = match.start()
            assert at in {
                len(" ".join(sentences[:count])) + (0 < count)
                for count in range(len(sentences) + 1)
            }
            longest = max(map(len, sentences)) + 1
            assert abs(at - len(rest) * sample.meta["depth"] / 100) <= longest / 2 + 1
            assert sample.meta["depths"] == [
                round(100 * at / (len(prose) - len(match[0].rstrip(" "))), 1)
            ]
        assert at == len(rest) + 1 - rest.endswith(" ")
    assert generate(1024, depths="0")[0].meta["depths"] == [0.0]
    assert generate(1024, depths="100")[0].meta["depths"] == [100.0]


def test_depths_differ_in_nothing_else() -> None:
    """The same needle in the same text, so that a difference between depths is the depth's."""
    samples = generate(2048, depths="0,40,100")
    assert len({sample.query for sample in samples}) == 1
    assert len({sample.answers for sample in samples}) == 1
    assert len({sample.context for sample in samples}) == 3
    words = [NEEDLE.sub("", text(sample)).split() for sample in samples]
    shortest = min(map(len, words))
    assert all(own[:shortest] == words[0][:shortest] for own in words)
    assert shortest > max(map(len, words)) - 10


def test_depths_of_one_text_are_one_cluster() -> None:
    """Their scores depend on one another, although their contexts differ.

    Those of another index, length or seed do not.
    """
    depths = "0,50"
    samples = [
        *generate(512, 2, depths=depths),
        *generate(513, depths=depths),
        *generate(512, seed=1, depths=depths),
    ]
    clusters = [sample.meta["cluster"] for sample in samples]
    assert clusters == [sample.id.removesuffix(f"-{sample.meta['depth']:g}") for sample in samples]
    assert len(set(clusters)) == 4


@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_a_sample_fits_and_is_answered(length: int) -> None:
    size = Size(tokenizer=bundled_tokenizer(), length=length)
    for sample in generate(length, depths="30,90"):
        assert length - 30 < size.tokens(sample) <= length
        assert sample.max_new_tokens == 128
        (key, value), *others = NEEDLE.findall(sample.context)
        assert not others
        assert sample.answers == (value,)
        assert (
            sample.query
            == f"What is the special magic number for {key} mentioned in the provided text?"
        )
        assert (
            sample.answer_prefix
            == f" The special magic number for {key} mentioned in the provided text is"
        )
        assert metrics.score(f"{sample.answer_prefix} {value}.", sample) == 1.0
        assert metrics.score("", sample) == metrics.score("1111111", sample) == 0.0
        assert Sample.from_dict(json.loads(json.dumps(sample.as_dict()))) == sample


def test_prose_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("It rains. It pours. Nobody minds.")
    (sample,) = generate(1024, depths="50", essays=str(path))
    assert sample.meta["prose"] == "mine.txt"
    assert sample.meta["haystack"] == "essay"
    assert "It rains. It pours. Nobody minds. It rains." in sample.context
    assert generate(1024, depths="50")[0].meta["haystack"] == "standard library prose"


@pytest.mark.parametrize("depths", ["deep", "0,,10", "-1", "0,101", "nan", "10,10.0"])
def test_malformed_depths_are_refused(depths: str) -> None:
    with pytest.raises(
        InvalidInputError,
        match="are not percentages; give different numbers from 0 to 100, separated by commas",
    ):
        generate(1024, depths=depths)


def test_unknown_tasks_options_and_files_are_refused() -> None:
    size = Size(tokenizer=bundled_tokenizer(), length=1024)
    with pytest.raises(
        InvalidInputError, match="task 'niah' of niah is unknown; choose from niah_grid"
    ):
        SUITE.generate("niah", size=size, count=1, seed=0, options={})
    with pytest.raises(
        InvalidInputError, match="option 'depth' of niah is unknown; it takes depths, essays"
    ):
        generate(1024, depth="1")
    with pytest.raises(InvalidInputError, match=r"gone\.txt. does not exist; check the path"):
        generate(1024, essays="gone.txt")
    with pytest.raises(SizeError, match="length 150 is too short for a sample of niah_grid"):
        generate(150)
