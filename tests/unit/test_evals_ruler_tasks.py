"""RULER's tasks one by one: needles, chains of variables, common and frequent words."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.samples import sources
from star_attention.evals.suites.ruler import lists
from star_attention.hf.text.tokens import query_ids
from tests.engines import bundled_tokenizer
from tests.ruler import NEEDLE_TASKS, NOISE, generate, parts


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needles(task: str) -> None:
    expected = {"niah_multikey_1": (4, 1), "niah_multivalue": (1, 4), "niah_multiquery": (4, 4)}
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    value = uuid if task in ("niah_single_3", "niah_multikey_3") else r"\d{7}"
    kind = "uuids" if value == uuid else "numbers"
    needle = re.compile(rf"One of the special magic {kind} for (\S+(?: \S+)*?) is: ({value})\.")
    for sample in generate(task, 2048, 3):
        filled = parts(sample)
        hidden = needle.findall(filled["context"])
        assert len(set(value for _, value in hidden)) == len(hidden)
        queried = re.split(r", and |, ", filled["query"])
        assert {value for name, value in hidden if name in queried} == set(sample.answers)
        assert [name for value in sample.answers for name, other in hidden if other == value] == (
            queried * len(sample.answers) if len(queried) == 1 else queried
        )
        if sample.meta["haystack"] != "needle":
            keys, answers = expected.get(task, (1, 1))
            assert (len({key for key, _ in hidden}), len(sample.answers)) == (keys, answers)
            assert len(hidden) == max(keys, answers)
            places = [
                match.start() / len(filled["context"])
                for match in needle.finditer(filled["context"])
            ]
            assert sorted(sample.meta["depths"]) == pytest.approx(
                [100 * place for place in places], abs=2
            )
        else:
            assert len({key for key, _ in hidden}) == len(hidden)
            assert needle.sub("", filled["context"]).strip("\n") == ""
            assert len(sample.answers) == 1


def test_noise() -> None:
    (sample,) = generate("niah_single_1", 1024)
    lines = parts(sample)["context"].split("\n")
    assert Counter(lines)[NOISE] == len(lines) - 1
    assert sample.meta["haystack"] == "repeat"
    assert sample.meta["words"].startswith("wonderwords ")


def test_prose_is_named(tmp_path: Path) -> None:
    """Prose of the standard library is not reported as RULER's essays."""
    (default,) = generate("niah_single_2", 1024)
    assert default.meta["haystack"] == "standard library prose"
    assert default.meta["prose"] == "pydoc_data.topics"
    assert default.meta["prose_sha256"] == sources.prose().sha256[:16]
    essays = tmp_path / "PaulGrahamEssays.json"
    essays.write_text(json.dumps({"text": "A short essay.\n\nIt ends here, after few words."}))
    (sample,) = generate("niah_single_2", 1024, essays=str(essays))
    assert sample.meta["haystack"] == "essay"
    assert sample.meta["prose"] == "PaulGrahamEssays.json"
    assert sample.meta["prose_sha256"] != default.meta["prose_sha256"]
    text = re.sub(r"One of the special magic .*?\. ?", "", parts(sample)["context"])
    repeats = text.count("A short essay. It ends here, after few words. ")
    assert repeats > 20, "the essay is repeated to fill the length"


def test_words_of_training_and_evaluation_are_disjoint() -> None:
    """Every word is in one of the parts, and samples of a part have words of that part only."""
    every, train, held_out = (sources.words(part) for part in (None, "train", "eval"))
    assert set(train.all) | set(held_out.all) == set(every.all)
    assert not set(train.all) & set(held_out.all)
    (needles,) = generate("niah_multikey_2", 2048, words="eval")
    keys = re.findall(r" for (.+?) is: ", needles.context)
    assert len(keys) > 10
    assert set(keys) <= {
        f"{adjective}-{noun}" for adjective in held_out.adjectives for noun in held_out.nouns
    }
    (common,) = generate("cwe", 2048, words="eval")
    assert set(re.findall(r"\d+\. (.+?)(?= \d+\.|\n)", common.context)) <= set(held_out.all)
    assert needles.meta["words"] == common.meta["words"] == held_out.release
    with pytest.raises(
        InvalidInputError, match="words 'test' is unknown; choose one of train, eval"
    ):
        sources.words("test")
    with pytest.raises(
        InvalidInputError, match="words 'test' is unknown; choose one of train, eval"
    ):
        generate("cwe", 2048, words="test")


def test_chains_of_variables() -> None:
    for sample in generate("vt", 2048, 3):
        filled = parts(sample)
        for text, value, names, letters in (
            (filled["context"], filled["query"], filled["answers"].split(" "), 3),
            (filled["text"], filled["value"], list(sample.answers), 5),
        ):
            lines = text.split("\n")
            assert [line for line in lines if line != NOISE] == [
                f"VAR {names[0]} = {value}",
                *(f"VAR {name} = VAR {source} " for source, name in itertools.pairwise(names)),
            ]
            assert len(set(names)) == 5
            assert all(re.fullmatch(rf"[A-Z]{{{letters}}}", name) for name in names)
        assert filled["query"] != filled["value"]
        example = sample.context[: sample.context.index(f" {filled['answers']}\n\n")]
        tokens = len(query_ids(bundled_tokenizer(), example))
        assert 500 - 40 < tokens <= 500


@pytest.mark.parametrize(
    ("length", "repeats", "example_repeats"), [(2048, (6, 1), (3, 1)), (4096, (30, 3), (10, 3))]
)
def test_common_words(
    length: int, repeats: tuple[int, int], example_repeats: tuple[int, int]
) -> None:
    for sample in generate("cwe", length, 2):
        filled = parts(sample)
        answers = re.split(r" ?\d+\. ", filled["answers"])[1:]
        for text, often, (many, few) in (
            (filled["context"], answers, example_repeats),
            (filled["text"], list(sample.answers), repeats),
        ):
            entries = re.findall(r"(\d+)\. (.*?)(?= \d+\. |$)", text)
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            counts = Counter(word for _, word in entries)
            assert {word for word, count in counts.items() if count == many} == set(often)
            assert {count for word, count in counts.items() if word not in often} == {few}
            assert len(often) == 10
        assert len(Counter(re.findall(r"\d+\. (.*?)(?= \d+\. |$)", filled["context"]))) == (
            20 if length < 4096 else 40
        )
        assert sample.meta["pairs"] == 0


def test_common_words_beyond_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists longer than there are words continue with pairs of words, and say so."""
    known = sources.words()
    few = dataclasses.replace(
        known, adjectives=known.adjectives[:30], nouns=known.nouns[:30], verbs=known.verbs[:5]
    )
    monkeypatch.setattr(lists, "words", lambda part: few)
    (sample,) = generate("cwe", 8192)
    counts = Counter(re.findall(r"\d+\. (.*?)(?= \d+\. |$)", parts(sample)["text"]))
    assert sample.meta["pairs"] == len(counts) - len(few.all) > 0
    assert len([word for word in counts if word not in few.all]) == sample.meta["pairs"]
    assert {counts[word] for word in sample.answers} == {30}
    assert set(sample.answers) <= set(few.all)
    assert set(counts.values()) == {30, 3}


def test_frequent_words() -> None:
    for length in (512, 1024, 4096):
        for sample in generate("fwe", length, 2):
            counts = Counter(parts(sample)["context"].split(" "))
            ranked = counts.most_common(5)
            assert [word for word, _ in ranked[:4]] == ["...", *sample.answers]
            assert all(before > after for (_, before), (_, after) in itertools.pairwise(ranked))
            total = sum(counts.values())
            assert ranked[0][1] / total == pytest.approx(6 / 3.14159**2, abs=0.1)
            assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])


def test_frequent_words_of_the_shortest_list() -> None:
    """The third answer is more frequent than the next word.

    A list of 20 words would make a sample, but not one with a single answer.
    """
    samples = []
    for length in range(180, 420, 20):
        with contextlib.suppress(SizeError):
            samples += generate("fwe", length)
    assert samples
    for sample in samples:
        counts = Counter(parts(sample)["context"].split(" "))
        fourth = counts[sample.answers[2]]
        assert all(
            count < fourth for word, count in counts.items() if word not in ("...", *sample.answers)
        )


def test_the_official_variant() -> None:
    """300 and 30 repeats from 4096 tokens on; vt as older code joins and spells it; longer fwe."""
    official = {"compat": "star-attention"}
    (cwe,) = generate("cwe", 32768, **official)
    counts = Counter(
        re.findall(r"\d+\. (.*?)(?= \d+\. |$)", cwe.context.rpartition("often.\n")[2].rstrip())
    )
    assert {counts[word] for word in cwe.answers} == {300}
    assert set(counts.values()) == {300, 30}
    assert re.search(r"in the list are:1\. \S+ 2\. ", cwe.context), "the example's answer"
    assert re.search(r"in the list are: 1\. \S+ 2\. ", generate("cwe", 32768)[0].context)
    (short,), (short_cwe,) = generate("cwe", 2048), generate("cwe", 2048, **official)
    assert short_cwe.meta["repeats"] == short.meta["repeats"]
    (vt,) = generate("vt", 1024, **official)
    assert f"{NOISE}\n {NOISE}\n" in vt.context
    assert vt.answer_prefix.startswith(" Answer: According")
    assert "5 variables are assgined the value" in vt.answer_prefix
    assert re.match(r" Memorize and track", vt.context)
    assert re.search(
        r"they are:  \w{3} \w{3} \w{3} \w{3} \w{3}\n\n\n\nMemorize and track", vt.context
    )
    (fwe,) = generate("fwe", 1024, **official)
    assert fwe.max_new_tokens == 120
    assert generate("niah_single_1", 1024, **official) == generate("niah_single_1", 1024)


@pytest.mark.parametrize("length", [4096, 16384])
def test_the_official_variant_where_its_list_would_be_empty(length: int) -> None:
    with pytest.raises(
        SizeError, match=r"leave out compat: the official variant repeats its 10 answers 300 times"
    ):
        generate("cwe", length, compat="star-attention")
