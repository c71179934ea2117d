"""RULER: laws that hold for every task, and requests that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from star_attention import StarLLM, inputs
from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals import metrics
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import bundled_tokenizer, text_model
from tests.ruler import NEEDLE_TASKS, PROMPTS, RULER, generate, options_of, parts, write_data

TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32} | dict.fromkeys(
    NEEDLE_TASKS, 128
)
UNIT = {"cwe": 160, "qa_1": 100, "qa_2": 100}
"""Most tokens of one word's repeats, or of one document; 100 for a line of the other tasks."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_data(tmp_path_factory.mktemp("data"))


def gold(sample: Sample) -> str:
    return f"{sample.answer_prefix} {', '.join(sample.answers)}."


def test_the_tasks_are_all_and_in_order() -> None:
    assert tuple(PROMPTS) == RULER.tasks


@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("task", RULER.tasks)
def test_a_sample_fits_and_fills_its_length(
    task: str, length: int, data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One unit more would not fit, and the tokens left are fewer than those of a unit."""
    calls: list[tuple[Callable[[int], Sample], int]] = []
    largest = Size.largest

    def recorded(self: Size, build: Callable[[int], Sample], **bounds: Any) -> tuple[int, Sample]:
        count, sample = largest(self, build, **bounds)
        calls.append((build, count))
        return count, sample

    monkeypatch.setattr(Size, "largest", recorded)
    (sample,) = generate(task, length, **options_of(task, data))
    size = Size(tokenizer=bundled_tokenizer(), length=length)
    (build, count), *others = calls
    assert not others
    assert build(count) == sample
    assert size.fits(sample)
    assert not size.fits(build(count + 1))
    assert size.tokens(sample) > length - UNIT.get(task, 100)
    assert sample.length == length
    assert sample.max_new_tokens == TOKENS[task]


@pytest.mark.parametrize("task", RULER.tasks)
def test_samples_differ_by_index_and_seed_alone(task: str, data: dict[str, str]) -> None:
    """They are the same at each call, however many are generated."""
    options = options_of(task, data)
    samples = generate(task, 2048, 3, **options)
    assert generate(task, 2048, 2, **options) == samples[:2]
    assert len({sample.context for sample in samples}) == 3
    assert len({sample.id for sample in samples}) == 3
    (other,) = generate(task, 2048, seed=4, **options)
    assert other.context != samples[0].context
    assert other.id not in {sample.id for sample in samples}


@pytest.mark.parametrize("task", RULER.tasks)
def test_the_prompt_is_rulers(task: str, data: dict[str, str]) -> None:
    for length in (2048, 4096):
        for sample in generate(task, length, 2, **options_of(task, data)):
            filled = parts(sample)
            text = filled.get("text", filled["context"])
            assert sample.context.endswith(text + ("\n\n" if "qa" in task else "\n"))
            assert sample.answer_prefix.startswith((" The special magic", " Answer:"))


@pytest.mark.parametrize("task", RULER.tasks)
def test_answers_are_in_the_context_and_not_in_the_query(task: str, data: dict[str, str]) -> None:
    for sample in generate(task, 2048, 3, **options_of(task, data)):
        assert sample.answers
        assert any(answer in sample.context for answer in sample.answers)
        if sample.metric == "string_match_all":
            assert all(answer in sample.context for answer in sample.answers)
        assert not any(answer in sample.query + sample.answer_prefix for answer in sample.answers)


@pytest.mark.parametrize("task", RULER.tasks)
def test_scores_of_right_missing_and_wrong_answers(task: str, data: dict[str, str]) -> None:
    sample, other = generate(task, 2048, 2, **options_of(task, data))
    assert metrics.score(gold(sample), sample) == 1.0
    assert metrics.score("", sample) == 0.0
    assert metrics.score(sample.answer_prefix, sample) == 0.0
    assert metrics.score(gold(other), sample) < 1.0
    assert sample.metric == ("string_match_part" if task.startswith("qa") else "string_match_all")
    if sample.metric == "string_match_all" and len(sample.answers) > 1:
        share = 1 / len(sample.answers)
        assert metrics.score(sample.answers[0], sample) == pytest.approx(share)
    if sample.metric == "string_match_part":
        assert metrics.score(sample.answers[-1], sample) == 1.0


@pytest.mark.parametrize("task", RULER.tasks)
def test_a_sample_survives_json(task: str, data: dict[str, str]) -> None:
    (sample,) = generate(task, 2048, **options_of(task, data))
    assert Sample.from_dict(json.loads(json.dumps(sample.as_dict()))) == sample
    assert sample.group == {"vt": "multi-hop", "cwe": "aggregation", "fwe": "aggregation"}.get(
        task, "qa" if task.startswith("qa") else "retrieval"
    )


@pytest.mark.parametrize("task", RULER.tasks)
def test_the_split_is_what_the_model_sees(task: str, data: dict[str, str]) -> None:
    tokenizer = bundled_tokenizer()
    (sample,) = generate(task, 2048, **options_of(task, data))
    star = StarLLM(text_model(), tokenizer, block_size=512)
    context = star.encode(sample.context)
    head = context_ids(tokenizer, sample.context)
    tail = query_ids(tokenizer, sample.query + sample.answer_prefix)
    assert context.token_ids.tolist() == head
    after = inputs.ContextInput.of(context)
    assert inputs.prompt_ids(star.runtime, after, sample.query, sample.answer_prefix) == tail
    size = Size(tokenizer=tokenizer, length=0)
    assert len(head) + len(tail) + sample.max_new_tokens == size.tokens(sample)
    prompt = sample.context + sample.query + sample.answer_prefix
    assert tokenizer.decode(head + tail, skip_special_tokens=True) == prompt


@pytest.mark.parametrize("task", ["niah_multivalue", "cwe", "fwe"])
def test_a_long_sample_takes_few_attempts(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    tokens = Size.tokens
    monkeypatch.setattr(
        Size, "tokens", lambda self, sample: counted.append(tokens(self, sample)) or counted[-1]
    )
    generate(task, 32768)
    assert sum(counted) < 15 * 32768


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            "niah_single_4",
            {},
            r"task 'niah_single_4' of ruler is unknown; choose from niah_single_1, ",
        ),
        (
            "vt",
            {"essay": "x"},
            r"option 'essay' of ruler is unknown; it takes essays, squad, hotpot, words, compat",
        ),
        (
            "cwe",
            {"compat": "lm-eval"},
            r"compat 'lm-eval' is unknown; choose one of star-attention",
        ),
        (
            "qa_1",
            {},
            r"SQuAD is not part of this package; give its published file with --squad"
            r" \(option 'squad'\)",
        ),
        ("qa_2", {}, r"HotpotQA is not part .* with --hotpot \(option 'hotpot'\)"),
        ("vt", {"squad": "x"}, r"squad 'x' does not exist; check the path"),
        ("vt", {"words": "x"}, r"words 'x' is unknown; choose one of train, eval"),
        (
            "niah_single_2",
            {"essays": "/no/such/essays.txt"},
            r"essays '/no/such/essays\.txt' does not exist",
        ),
    ],
)
def test_unknown_tasks_and_options_are_refused(
    task: str, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        generate(task, 1024, **options)


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_lengths_that_are_too_short(task: str) -> None:
    message = (
        rf"length 192 is too short for a sample of {task}, which takes at least \d+ tokens; give a"
    )
    with pytest.raises(SizeError, match=message):
        generate(task, 192)


def test_wrong_arguments_are_refused_before_the_first_sample() -> None:
    size = Size(tokenizer=None, length=1)
    with pytest.raises(InvalidInputError, match="compat"):
        RULER.generate("vt", size=size, count=1, seed=0, options={"compat": "x"})
