"""RULER's questions about documents, on small data sets in the published formats."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.samples.sample import Sample
from tests.ruler import generate, options_of, paragraph, parts, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


def documents(sample: Sample) -> list[str]:
    numbered = re.findall(
        r"Document (\d+):\n(.*?)(?=\n\nDocument |$)", parts(sample)["context"], re.DOTALL
    )
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [document for _, document in numbered]


def test_squad(data: dict[str, str]) -> None:
    """The answering paragraph, others of its article, then any; each answer appears once.

    Only answerable questions are asked.
    """
    short, long = (
        generate("qa_1", 1024, 5, **options_of("qa_1", data)),
        generate("qa_1", 4096, 5, **options_of("qa_1", data)),
    )
    for sample in short + long:
        name, number = re.findall(r"Question: When was (\w+) (\d+) made\?$", sample.query)[0]
        shown = documents(sample)
        assert len(set(shown)) == len(shown) == sample.meta["documents"]
        paragraphs = {paragraph(name.capitalize(), k) for k in range(40)}
        right = paragraph(name.capitalize(), int(number))
        assert right in shown
        assert sample.answers == (str(1900 + int(number)), f"in {1900 + int(number)}")
        assert set(shown) <= paragraphs or paragraphs <= set(shown)
        assert sample.meta["depths"] == pytest.approx(
            [100 * shown.index(right) / (len(shown) - 1)], abs=5
        )
    assert all(len(documents(sample)) < 40 for sample in short)
    assert all(len(documents(sample)) > 40 for sample in long)
    assert [sample.query for sample in short] == [sample.query for sample in long]
    assert len({sample.query for sample in short}) == 5
    assert len({tuple(sample.meta["depths"]) for sample in short}) > 1


def test_hotpot(data: dict[str, str]) -> None:
    for sample in generate("qa_2", 2048, 3, **options_of("qa_2", data)):
        first = (int(sample.answers[0]) - 1902) // 10 * 10
        own = [f"Page {k}\n{paragraph('Page', k)} It is old." for k in range(first, first + 10)]
        shown = documents(sample)
        assert set(own) < set(shown)
        assert [
            round(depth / 100 * (len(shown) - 1)) for depth in sample.meta["depths"]
        ] == pytest.approx([shown.index(own[2]), shown.index(own[7])], abs=1)


def test_lengths_and_counts_beyond_the_data_set_are_refused(data: dict[str, str]) -> None:
    with pytest.raises(
        SizeError,
        match=r"length 32,768 is more than the file can fill: with all 200 documents the sample",
    ):
        generate("qa_1", 32768, **options_of("qa_1", data))
    with pytest.raises(
        InvalidInputError,
        match=r"sample 21 of qa_2 cannot be generated: the file has 20 answerable questions",
    ):
        generate("qa_2", 2048, 21, **options_of("qa_2", data))


@pytest.mark.parametrize(
    ("task", "option", "content", "message"),
    [
        ("qa_1", "squad", None, r"squad '.*squad\.json' does not exist; check the path"),
        ("qa_1", "squad", "{", r"squad\.json cannot be read as SQuAD \(Expecting"),
        (
            "qa_1",
            "squad",
            "[1]",
            r"not in SQuAD's published format \(TypeError: .*\); give dev-v2\.0\.json",
        ),
        ("qa_1", "squad", '{"data": [{"paragraphs": [{"qas": []}]}]}', r"KeyError: 'context'"),
        ("qa_1", "squad", '{"data": []}', r"contains no answerable question"),
        (
            "qa_1",
            "squad",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q",'
            ' "answers": [{"text": 1}]}]}]}]}',
            r"TypeError: expected a string, got 1",
        ),
        ("qa_2", "hotpot", None, r"hotpot '.*hotpot\.json' does not exist"),
        ("qa_2", "hotpot", '{"data": []}', r"not in HotpotQA's published format"),
        ("qa_2", "hotpot", '[{"context": [["a"]]}]', r"give hotpot_dev_distractor_v1\.json"),
        (
            "qa_2",
            "hotpot",
            '[{"context": [], "question": "q", "supporting_facts": []}]',
            r"KeyError: 'answer'",
        ),
    ],
)
def test_files_in_other_formats_are_refused(
    task: str, option: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{option}.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        generate(task, 1024, **{option: str(path)})
