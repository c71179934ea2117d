"""RULER's tasks: the published prompts, lengths that are filled, answers that are in the context, and the official scores."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention import StarLLM, inputs
from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals import metrics, suites
from star_attention.evals.samples import sources
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import ruler
from star_attention.evals.suites.ruler import lists, needles
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import bundled_tokenizer, text_model

GOLDEN = Path(__file__).parents[1] / "golden" / "ruler_scores.json"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# RULER's templates and answer prefixes as published, in one piece.
MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I will quiz you about the {kind}s"
    " afterwards.\n{context}\nWhat are all the special magic {kind}s for {query} mentioned in the provided text? The special magic"
    " {kind}s for {query} mentioned in the provided text are"
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind}"
    " afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text? The special magic {kind}"
    " for {query} mentioned in the provided text is"
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: Find all"
    " variables that are assigned the value {query} in the text above. Answer: According to the chain(s) of variable assignment in"
    " the text above, 5 variables are assigned the value {query}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear most"
    " often.\n{context}\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most"
    " often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared coded words."
    " {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently"
    " appeared words in the above coded text? Answer: According to the coded text above, the three most frequently appeared words"
    " are:"
)
QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe following"
    " are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me the answer and do not"
    " output any other words.\n\nQuestion: {query} Answer:"
)
PROMPTS = {
    "niah_single_1": ONE.replace("{kind}", "number"),
    "niah_single_2": ONE.replace("{kind}", "number"),
    "niah_single_3": ONE.replace("{kind}", "uuid"),
    "niah_multikey_1": ONE.replace("{kind}", "number"),
    "niah_multikey_2": ONE.replace("{kind}", "number"),
    "niah_multikey_3": ONE.replace("{kind}", "uuid"),
    "niah_multivalue": MANY.replace("{kind}", "number"),
    "niah_multiquery": MANY.replace("{kind}", "number"),
    "vt": f"{VT} {{answers}}\n\n{VT.replace('{context}', '{text}').replace('{query}', '{value}')}",
    "cwe": f"{CWE} {{answers}}\n{CWE.replace('{context}', '{text}')}",
    "fwe": FWE,
    "qa_1": QA,
    "qa_2": QA,
}
NEEDLE_TASKS = [task for task in PROMPTS if task.startswith("niah")]
TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} | dict.fromkeys(
    NEEDLE_TASKS, 128
)
UNIT = {
    "cwe": 160,
    "qa_1": 100,
    "qa_2": 100,
}  # the most tokens of one word's repeats, or of one document; others: one line


def paragraph(name: str, number: int) -> str:
    return f"{name} number {number} was built in {1900 + number} by people of the town, and stands by the river to this day."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SQuAD and HotpotQA, a few of each, in their published formats."""
    folder = tmp_path_factory.mktemp("data")
    articles = []
    for name in ("Bridge", "Tower", "Mill", "Harbor", "Castle"):
        paragraphs = []
        for number in range(40):
            year = str(1900 + number)
            answers = [{"text": year, "answer_start": 0}, {"text": f"in {year}", "answer_start": 0}]
            answered = {
                "id": "a",
                "question": f"When was {name.lower()} {number} made?",
                "is_impossible": False,
            }
            impossible = {
                "id": "b",
                "question": "Who knows?",
                "is_impossible": True,
                "answers": answers,
            }
            unanswered = {"id": "c", "question": "Who knows?", "answers": []}
            qas = [answered | {"answers": [*answers, answers[0]]}, impossible, unanswered]
            paragraphs.append({"context": paragraph(name, number), "qas": qas})
        articles.append({"title": name, "paragraphs": paragraphs})
    squad = folder / "squad.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": articles}))
    asked = []
    for number in range(20):
        pages = [
            [f"Page {number * 10 + k}", [paragraph("Page", number * 10 + k), " It is old."]]
            for k in range(10)
        ]
        facts = [[pages[2][0], 0], [pages[7][0], 1]]
        asked.append(
            {
                "_id": str(number),
                "question": "Which of them is it?",
                "answer": str(1900 + number * 10 + 2),
                "supporting_facts": facts,
                "context": pages,
            }
        )
    hotpot = folder / "hotpot.json"
    hotpot.write_text(json.dumps(asked))
    return {"squad": str(squad), "hotpot": str(hotpot)}


def make(task: str, length: int, count: int = 1, seed: int = 3, **options: Any) -> list[Sample]:
    size = Size(tokenizer=bundled_tokenizer(), length=length)
    return list(ruler.generate(task, size=size, count=count, seed=seed, options=options))


def for_task(task: str, files: dict[str, str]) -> dict[str, str]:
    option = {"qa_1": "squad", "qa_2": "hotpot"}.get(task)
    return {option: files[option]} if option else {}


def parts(sample: Sample) -> dict[str, str]:
    """What stands in the places of the published prompt; fails where the prompt is not of its form."""
    seen: set[str] = set()

    def place(match: re.Match[str]) -> str:
        name = match[1]
        first = name not in seen
        seen.add(name)
        return f"(?P<{name}>.*?)" if first else f"(?P={name})"

    pattern = re.sub(r"\\\{(\w+)\\\}", place, re.escape(PROMPTS[sample.task]))
    found = re.fullmatch(pattern, sample.context + sample.query + sample.answer_prefix, re.DOTALL)
    assert found, sample.task
    return found.groupdict()


def gold(sample: Sample) -> str:
    return f"{sample.answer_prefix} {', '.join(sample.answers)}."


# ------------------------------------------------------------------ every task


def test_the_tasks_are_all_and_in_order() -> None:
    assert tuple(PROMPTS) == ruler.TASKS


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_sample_fits_and_fills_its_length(
    task: str, length: int, files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit more would not fit, and the tokens left are fewer than those of a unit."""
    calls: list[tuple[Callable[[int], Sample], int]] = []
    largest = Size.largest

    def watched(self: Size, build: Callable[[int], Sample], **bounds: Any) -> tuple[int, Sample]:
        count, sample = largest(self, build, **bounds)
        calls.append((build, count))
        return count, sample

    monkeypatch.setattr(Size, "largest", watched)
    (sample,) = make(task, length, **for_task(task, files))
    size = Size(tokenizer=bundled_tokenizer(), length=length)
    (build, count), *others = calls
    assert not others
    assert build(count) == sample
    assert size.fits(sample)
    assert not size.fits(build(count + 1))
    assert size.tokens(sample) > length - UNIT.get(task, 100)
    assert sample.length == length
    assert sample.max_new_tokens == TOKENS[task]


@pytest.mark.parametrize("task", ruler.TASKS)
def test_samples_are_the_same_each_time(task: str, files: dict[str, str]) -> None:
    """Whatever their number; and differ by index and by seed."""
    options = for_task(task, files)
    samples = make(task, 2048, 3, **options)
    assert make(task, 2048, 2, **options) == samples[:2]
    assert len({sample.context for sample in samples}) == 3
    assert len({sample.id for sample in samples}) == 3
    (other,) = make(task, 2048, seed=4, **options)
    assert other.context != samples[0].context
    assert other.id not in {sample.id for sample in samples}


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_prompt_is_rulers(task: str, files: dict[str, str]) -> None:
    for length in (2048, 4096):
        for sample in make(task, length, 2, **for_task(task, files)):
            found = parts(sample)
            assert sample.context.endswith(
                found.get("text", found["context"]) + ("\n\n" if "qa" in task else "\n")
            )
            assert sample.answer_prefix.startswith((" The special magic", " Answer:"))


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_answer_is_in_the_context_alone(task: str, files: dict[str, str]) -> None:
    for sample in make(task, 2048, 3, **for_task(task, files)):
        assert sample.answers
        assert any(answer in sample.context for answer in sample.answers)
        if sample.metric == "string_match_all":
            assert all(answer in sample.context for answer in sample.answers)
        assert not any(answer in sample.query + sample.answer_prefix for answer in sample.answers)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_scores_of_the_right_answer_of_none_and_of_a_wrong_one(
    task: str, files: dict[str, str]
) -> None:
    one, other = make(task, 2048, 2, **for_task(task, files))
    assert metrics.score(gold(one), one) == 1.0
    assert metrics.score("", one) == 0.0
    assert metrics.score(one.answer_prefix, one) == 0.0
    assert metrics.score(gold(other), one) < 1.0
    assert one.metric == ("string_match_part" if task.startswith("qa") else "string_match_all")
    if one.metric == "string_match_all" and len(one.answers) > 1:
        assert metrics.score(one.answers[0], one) == pytest.approx(1 / len(one.answers))
    if one.metric == "string_match_part":
        assert metrics.score(one.answers[-1], one) == 1.0


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_sample_survives_json(task: str, files: dict[str, str]) -> None:
    (sample,) = make(task, 2048, **for_task(task, files))
    assert Sample.from_dict(json.loads(json.dumps(sample.as_dict()))) == sample
    assert sample.group == {"vt": "multi-hop", "cwe": "aggregation", "fwe": "aggregation"}.get(
        task, "qa" if task.startswith("qa") else "retrieval"
    )


@pytest.mark.parametrize("task", ruler.TASKS)
def test_the_split_is_what_the_model_sees(task: str, files: dict[str, str]) -> None:
    tokenizer = bundled_tokenizer()
    (sample,) = make(task, 2048, **for_task(task, files))
    star = StarLLM(text_model(), tokenizer, block_size=512)
    context = star.encode(sample.context)
    head, tail = (
        context_ids(tokenizer, sample.context),
        query_ids(tokenizer, sample.query + sample.answer_prefix),
    )
    assert context.token_ids.tolist() == head
    assert inputs.prompt_ids(star.runtime, context.chat, sample.query, sample.answer_prefix) == tail
    assert len(head) + len(tail) + sample.max_new_tokens == Size(
        tokenizer=tokenizer, length=0
    ).tokens(sample)
    prompt = sample.context + sample.query + sample.answer_prefix
    assert tokenizer.decode(head + tail, skip_special_tokens=True) == prompt


@pytest.mark.parametrize("task", ["niah_multivalue", "cwe", "fwe"])
def test_a_long_sample_takes_few_attempts(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    tokens = Size.tokens
    monkeypatch.setattr(
        Size, "tokens", lambda self, sample: counted.append(tokens(self, sample)) or counted[-1]
    )
    make(task, 32768)
    assert sum(counted) < 15 * 32768


# ------------------------------------------------------------------ needles


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_needles(task: str) -> None:
    expected = {"niah_multikey_1": (4, 1), "niah_multivalue": (1, 4), "niah_multiquery": (4, 4)}
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    value = uuid if task in ("niah_single_3", "niah_multikey_3") else r"\d{7}"
    kind = "uuids" if value == uuid else "numbers"
    needle = re.compile(rf"One of the special magic {kind} for (\S+(?: \S+)*?) is: ({value})\.")
    for sample in make(task, 2048, 3):
        found = parts(sample)
        hidden = needle.findall(found["context"])
        assert len(set(value for _, value in hidden)) == len(hidden)
        asked = re.split(r", and |, ", found["query"])
        assert {value for name, value in hidden if name in asked} == set(sample.answers)
        assert [name for value in sample.answers for name, other in hidden if other == value] == (
            asked * len(sample.answers) if len(asked) == 1 else asked
        )
        if sample.meta["haystack"] != "needle":
            keys, answers = expected.get(task, (1, 1))
            assert (len({key for key, _ in hidden}), len(sample.answers)) == (keys, answers)
            assert len(hidden) == max(keys, answers)
            places = [
                match.start() / len(found["context"]) for match in needle.finditer(found["context"])
            ]
            assert sorted(sample.meta["depths"]) == pytest.approx(
                [100 * place for place in places], abs=2
            )
        else:
            assert len({key for key, _ in hidden}) == len(hidden)
            assert needle.sub("", found["context"]).strip("\n") == ""
            assert len(sample.answers) == 1


def test_noise() -> None:
    (sample,) = make("niah_single_1", 1024)
    lines = parts(sample)["context"].split("\n")
    assert Counter(lines)[NOISE] == len(lines) - 1
    assert sample.meta["haystack"] == "repeat"
    assert sample.meta["words"].startswith("wonderwords ")


def test_prose_is_named(tmp_path: Path) -> None:
    """The standard library's does not pass for RULER's essays."""
    (ours,) = make("niah_single_2", 1024)
    assert ours.meta["haystack"] == "standard library prose"
    assert ours.meta["prose"] == "pydoc_data.topics"
    assert ours.meta["prose_sha256"] == sources.prose().sha256[:16]
    essays = tmp_path / "PaulGrahamEssays.json"
    essays.write_text(json.dumps({"text": "A short essay.\n\nIt ends here, after few words."}))
    (theirs,) = make("niah_single_2", 1024, essays=str(essays))
    assert theirs.meta["haystack"] == "essay"
    assert theirs.meta["prose"] == "PaulGrahamEssays.json"
    assert theirs.meta["prose_sha256"] != ours.meta["prose_sha256"]
    text = re.sub(r"One of the special magic .*?\. ?", "", parts(theirs)["context"])
    assert (
        text.count("A short essay. It ends here, after few words. ") > 20
    )  # repeated to fill the length


def test_prose_goes_round() -> None:
    essay = sources.Prose(name="x", text=" one two\n three ", sha256="")
    assert needles.opening(essay, 2) == "one two"
    assert needles.opening(essay, 3) == "one two three"
    assert needles.opening(essay, 7) == "one two three one two three one"


def test_nothing_is_drawn_twice() -> None:
    few = dataclasses.replace(sources.words(), adjectives=("red", "old"), nouns=("barn", "mill"))
    draw = needles.Draw(random.Random(1), few)
    assert {draw("words") for _ in range(4)} == {"red-barn", "red-mill", "old-barn", "old-mill"}


def test_planted_sentences_stand_at_their_places() -> None:
    assert needles.planted(["a", "b", "c"], ["x", "y", "z"], [0, 2, 3]) == [
        "x",
        "a",
        "b",
        "y",
        "c",
        "z",
    ]
    assert needles.planted(["a"], ["x", "y"], [1, 1]) == ["a", "x", "y"]


# ------------------------------------------------------------------ lists


def test_chains_of_variables() -> None:
    for sample in make("vt", 2048, 3):
        found = parts(sample)
        for text, value, names, letters in (
            (found["context"], found["query"], found["answers"].split(" "), 3),
            (found["text"], found["value"], list(sample.answers), 5),
        ):
            lines = text.split("\n")
            assert [line for line in lines if line != NOISE] == [
                f"VAR {names[0]} = {value}",
                *(f"VAR {name} = VAR {source} " for source, name in itertools.pairwise(names)),
            ]
            assert len(set(names)) == 5
            assert all(re.fullmatch(rf"[A-Z]{{{letters}}}", name) for name in names)
        assert found["query"] != found["value"]
        example = sample.context[: sample.context.index(f" {found['answers']}\n\n")]
        tokens = len(query_ids(bundled_tokenizer(), example))
        assert 500 - 40 < tokens <= 500


@pytest.mark.parametrize(
    ("length", "common", "shown"), [(2048, (6, 1), (3, 1)), (4096, (30, 3), (10, 3))]
)
def test_common_words(length: int, common: tuple[int, int], shown: tuple[int, int]) -> None:
    for sample in make("cwe", length, 2):
        found = parts(sample)
        answers = re.split(r" ?\d+\. ", found["answers"])[1:]
        for text, often, (many, few) in (
            (found["context"], answers, shown),
            (found["text"], list(sample.answers), common),
        ):
            entries = re.findall(r"(\d+)\. (.*?)(?= \d+\. |$)", text)
            assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
            counts = Counter(word for _, word in entries)
            assert {word for word, count in counts.items() if count == many} == set(often)
            assert {count for word, count in counts.items() if word not in often} == {few}
            assert len(often) == 10
        assert len(Counter(re.findall(r"\d+\. (.*?)(?= \d+\. |$)", found["context"]))) == (
            20 if length < 4096 else 40
        )
        assert sample.meta["pairs"] == 0


def test_common_words_beyond_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer lists than there are words go on with pairs of them, and say so."""
    known = sources.words()
    few = dataclasses.replace(
        known, adjectives=known.adjectives[:30], nouns=known.nouns[:30], verbs=known.verbs[:5]
    )
    monkeypatch.setattr(lists, "words", lambda part: few)
    (sample,) = make("cwe", 8192)
    counts = Counter(re.findall(r"\d+\. (.*?)(?= \d+\. |$)", parts(sample)["text"]))
    assert sample.meta["pairs"] == len(counts) - len(few.all) > 0
    assert len([word for word in counts if word not in few.all]) == sample.meta["pairs"]
    assert {counts[word] for word in sample.answers} == {30}
    assert set(sample.answers) <= set(few.all)
    assert set(counts.values()) == {30, 3}


def test_frequent_words() -> None:
    for length in (512, 1024, 4096):
        for sample in make("fwe", length, 2):
            counts = Counter(parts(sample)["context"].split(" "))
            ranked = counts.most_common(5)
            assert [word for word, _ in ranked[:4]] == ["...", *sample.answers]
            assert all(before > after for (_, before), (_, after) in itertools.pairwise(ranked))
            total = sum(counts.values())
            assert ranked[0][1] / total == pytest.approx(6 / 3.14159**2, abs=0.1)
            assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked[1:])


def test_frequent_words_of_the_shortest_list() -> None:
    """The third of the answers is never as frequent as the next word: 20 words would do for a sample, but not for one answer."""
    made = []
    for length in range(180, 420, 20):
        with contextlib.suppress(SizeError):
            made += make("fwe", length)
    assert made
    for sample in made:
        counts = Counter(parts(sample)["context"].split(" "))
        fourth = counts[sample.answers[2]]
        assert all(
            count < fourth for word, count in counts.items() if word not in ("...", *sample.answers)
        )


def test_the_official_variant() -> None:
    """300 and 30 repeats from 4096 tokens on, vt as its older code joins and spells it, 120 tokens for fwe."""
    official = {"compat": "star-attention"}
    (cwe,) = make("cwe", 32768, **official)
    counts = Counter(
        re.findall(r"\d+\. (.*?)(?= \d+\. |$)", cwe.context.rpartition("often.\n")[2].rstrip())
    )
    assert {counts[word] for word in cwe.answers} == {300}
    assert set(counts.values()) == {300, 30}
    assert re.search(r"in the list are:1\. \S+ 2\. ", cwe.context), "the example's answer"
    assert re.search(r"in the list are: 1\. \S+ 2\. ", make("cwe", 32768)[0].context)
    assert make("cwe", 2048, **official)[0].meta["repeats"] == make("cwe", 2048)[0].meta["repeats"]
    (vt,) = make("vt", 1024, **official)
    assert f"{NOISE}\n {NOISE}\n" in vt.context
    assert vt.answer_prefix.startswith(" Answer: According")
    assert "5 variables are assgined the value" in vt.answer_prefix
    assert re.match(r" Memorize and track", vt.context)
    assert re.search(
        r"they are:  \w{3} \w{3} \w{3} \w{3} \w{3}\n\n\n\nMemorize and track", vt.context
    )
    (fwe,) = make("fwe", 1024, **official)
    assert fwe.max_new_tokens == 120
    assert make("niah_single_1", 1024, **official) == make("niah_single_1", 1024)


@pytest.mark.parametrize("length", [4096, 16384])
def test_the_official_variant_where_its_list_would_be_empty(length: int) -> None:
    with pytest.raises(
        SizeError, match=r"leave out compat: the official variant repeats its 10 answers 300 times"
    ):
        make("cwe", length, compat="star-attention")


# ------------------------------------------------------------------ questions on documents


def documents(sample: Sample) -> list[str]:
    numbered = re.findall(
        r"Document (\d+):\n(.*?)(?=\n\nDocument |$)", parts(sample)["context"], re.DOTALL
    )
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [document for _, document in numbered]


def test_squad(files: dict[str, str]) -> None:
    """The answering paragraph, those of its article, then others; answerable questions only, each answer once."""
    short, long = (
        make("qa_1", 1024, 5, **for_task("qa_1", files)),
        make("qa_1", 4096, 5, **for_task("qa_1", files)),
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


def test_hotpot(files: dict[str, str]) -> None:
    for sample in make("qa_2", 2048, 3, **for_task("qa_2", files)):
        first = (int(sample.answers[0]) - 1902) // 10 * 10
        own = [f"Page {k}\n{paragraph('Page', k)} It is old." for k in range(first, first + 10)]
        shown = documents(sample)
        assert set(own) < set(shown)
        assert [
            round(depth / 100 * (len(shown) - 1)) for depth in sample.meta["depths"]
        ] == pytest.approx([shown.index(own[2]), shown.index(own[7])], abs=1)


def test_more_than_the_documents_can_fill(files: dict[str, str]) -> None:
    with pytest.raises(
        SizeError,
        match=r"length 32,768 is more than the file has: 200 documents, with which the sample takes",
    ):
        make("qa_1", 32768, **for_task("qa_1", files))
    with pytest.raises(
        InvalidInputError,
        match=r"sample 21 of qa_2 cannot be made: the file holds 20 answerable questions",
    ):
        make("qa_2", 2048, 21, **for_task("qa_2", files))


@pytest.mark.parametrize(
    ("task", "option", "content", "message"),
    [
        ("qa_1", "squad", None, r"squad '.*squad\.json' is not there; check the path"),
        ("qa_1", "squad", "{", r"squad\.json cannot be read as SQuAD \(Expecting"),
        (
            "qa_1",
            "squad",
            "[1]",
            r"not in SQuAD's published format \(TypeError: .*\); give dev-v2\.0\.json",
        ),
        ("qa_1", "squad", '{"data": [{"paragraphs": [{"qas": []}]}]}', r"KeyError: 'context'"),
        ("qa_1", "squad", '{"data": []}', r"holds no question with an answer"),
        (
            "qa_1",
            "squad",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": 1}]}]}]}]}',
            r"TypeError: 1 is no text",
        ),
        ("qa_2", "hotpot", None, r"hotpot '.*hotpot\.json' is not there"),
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
def test_files_that_are_not_as_published(
    task: str, option: str, content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{option}.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        make(task, 1024, **{option: str(path)})


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "niah_single_4",
            {},
            r"task 'niah_single_4' of RULER is unknown; choose from niah_single_1, ",
        ),
        (
            "vt",
            {"essay": "x"},
            r"option 'essay' of RULER is unknown; it takes essays, squad, hotpot, words, compat",
        ),
        ("cwe", {"compat": "lm-eval"}, r"compat 'lm-eval' is unknown; give star-attention"),
        (
            "qa_1",
            {},
            r"SQuAD does not come with this package; give its published file with --squad \(the option squad\)",
        ),
        ("qa_2", {}, r"HotpotQA does not come .* with --hotpot \(the option hotpot\)"),
        ("vt", {"squad": "x"}, r"squad 'x' is not there; check the path"),
        ("vt", {"words": "x"}, r"words 'x' are unknown; choose one of train, eval"),
        (
            "niah_single_2",
            {"essays": "/no/such/essays.txt"},
            r"essays '/no/such/essays\.txt' is not there",
        ),
    ],
)
def test_what_cannot_be_asked_for(task: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(task, 1024, **options)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_lengths_that_are_too_short(task: str) -> None:
    with pytest.raises(
        SizeError,
        match=rf"length 192 is too short for a sample of {task}, which takes \d+ tokens at least",
    ):
        make(task, 192)


def test_wrong_arguments_are_told_before_the_first_sample() -> None:
    size = Size(tokenizer=None, length=1)
    with pytest.raises(InvalidInputError, match="compat"):
        suites.get("ruler").generate("vt", size=size, count=1, seed=0, options={"compat": "x"})


# ------------------------------------------------------------------ scores


def golden() -> list[dict[str, Any]]:
    sets: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["sets"]
    return sets


@pytest.mark.parametrize("wanted", golden(), ids=lambda one: one["name"])
def test_scores_are_the_official_ones(wanted: dict[str, Any]) -> None:
    scores = []
    for prediction, answers, (found, of) in wanted["rows"]:
        sample = Sample(
            id="1",
            task="vt",
            length=0,
            context="",
            query="",
            answer_prefix="",
            answers=tuple(answers),
            max_new_tokens=1,
            metric=wanted["metric"],
        )
        scores.append(metrics.score(prediction, sample))
        assert scores[-1] == pytest.approx(found / of), (prediction, answers)
    assert round(100 * sum(scores) / len(scores), 2) == wanted["score"]


# ------------------------------------------------------------------ sizes


class Letters:
    """A tokenizer of one token a character, which puts one in front."""

    bos_token_id, eos_token_id = 0, None

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[0] * add_special_tokens + [1] * len(text))


def sized(context: int) -> Sample:
    return Sample(
        id="1",
        task="vt",
        length=0,
        context="x" * context,
        query="ab",
        answer_prefix="c",
        answers=("d",),
        max_new_tokens=5,
        metric="string_match_all",
    )


def test_tokens_of_a_sample() -> None:
    assert Size(tokenizer=Letters(), length=0).tokens(sized(10)) == 1 + 10 + 3 + 5
    assert Size(tokenizer=Letters(), length=0, reserve=7).tokens(sized(10)) == 1 + 10 + 3 + 5 + 7
    bare = dataclasses.replace(sized(10), query="", answer_prefix="")
    assert Size(tokenizer=Letters(), length=0).tokens(bare) == 1 + 10 + 5


def test_the_length_itself_fits() -> None:
    assert Size(tokenizer=Letters(), length=19).fits(sized(10))
    assert not Size(tokenizer=Letters(), length=18).fits(sized(10))
    for length in range(10, 80):
        assert Size(tokenizer=Letters(), length=length).largest(sized)[0] == length - 9


def test_no_more_than_the_most() -> None:
    size = Size(tokenizer=Letters(), length=1009)
    for most in (1, 2, 3, 7, 999, 1000, 1001, 5000):
        count, sample = size.largest(sized, most=most)
        assert count == min(most, 1000)
        assert sample == sized(count)
    built: list[int] = []
    size.largest(lambda count: built.append(count) or sized(count), least=3, most=20)
    assert min(built) == 3
    assert max(built) == 20


def test_too_short_for_the_least() -> None:
    size = Size(tokenizer=Letters(), length=1019)
    assert size.largest(sized, least=1010)[0] == 1010
    with pytest.raises(
        SizeError,
        match=r"length 1,019 is too short for a sample of vt, which takes 1,020 tokens at least",
    ):
        size.largest(sized, least=1011)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=3, max_size=80), st.integers(0, 900), st.integers(1, 3)
)
def test_the_largest_is_what_trying_each_finds(units: list[int], room: int, least: int) -> None:
    """Whatever the units take, and in few steps."""

    def build(count: int) -> Sample:
        built.append(count)
        return sized(sum(units[place % len(units)] for place in range(count)))

    built: list[int] = []
    size = Size(tokenizer=Letters(), length=sum(units[:least]) + 9 + room)
    expected = least
    while size.fits(build(expected + 1)):
        expected += 1
    built = []
    assert size.largest(build, least=least) == (expected, build(expected))
    assert len(built) <= 40


def test_few_samples_are_built_for_a_long_one() -> None:
    counted: list[int] = []

    def build(count: int) -> Sample:
        counted.append(count)
        return sized(7 * count)

    assert Size(tokenizer=Letters(), length=1_000_000).largest(build)[0] == 142_855
    assert len(counted) < 25
    assert sum(counted) < 8 * 142_855


def test_few_samples_are_built_where_units_differ_much() -> None:
    """A last unit that takes more than all the others tells nothing of what they take."""
    counted: list[int] = []

    def build(count: int) -> Sample:
        counted.append(count)
        return sized(count if count <= 1000 else 1_000_000)

    assert Size(tokenizer=Letters(), length=5000).largest(build)[0] == 1000
    assert len(counted) < 60


def test_words_are_held_apart() -> None:
    """All of them are in one part or the other, and a part's samples hold words of that part alone."""
    every, train, held = (sources.words(part) for part in (None, "train", "eval"))
    assert set(train.all) | set(held.all) == set(every.all)
    assert not set(train.all) & set(held.all)
    size = Size(tokenizer=bundled_tokenizer(), length=2048)
    (needles,) = ruler.generate(
        "niah_multikey_2", size=size, count=1, seed=0, options={"words": "eval"}
    )
    keys = re.findall(r" for (.+?) is: ", needles.context)
    assert len(keys) > 10
    assert set(keys) <= {
        f"{adjective}-{noun}" for adjective in held.adjectives for noun in held.nouns
    }
    (common,) = ruler.generate("cwe", size=size, count=1, seed=0, options={"words": "eval"})
    assert set(re.findall(r"\d+\. (.+?)(?= \d+\.|\n)", common.context)) <= set(held.all)
    assert needles.meta["words"] == common.meta["words"] == held.release
    with pytest.raises(
        InvalidInputError, match="words 'test' are unknown; choose one of train, eval"
    ):
        list(ruler.generate("cwe", size=size, count=1, seed=0, options={"words": "test"}))
