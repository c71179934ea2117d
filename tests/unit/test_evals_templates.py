"""Data sets whose prompts have been through a chat template, and answer prefixes given twice."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.formats.files import read, write
from star_attention.evals.runs.prompts import PromptCounter, TemplateMarks
from star_attention.evals.samples.sample import Sample
from tests.engines import bundled_tokenizer
from tests.evals_runs import VARIANTS, engine, lines, run, samples
from tests.jsonl import write_lines

TEXT = "".join(f"The number of box {box} is {box * 37}.\n" for box in range(12))
OFFICIAL = {
    "index": 0,
    "input_context": f"<bos>{TEXT}",
    "input_query": "<|q|>What is the number of box 3?<|a|>",
    "outputs": ["111"],
}
"""As Star Attention's own data: rendered by the model's template, and cut before the question."""


def official(folder: Path, **changes: Any) -> Sample:
    (sample,) = read(write_lines(folder / "vt.jsonl", [OFFICIAL | changes]))
    return replace(sample, max_new_tokens=2)


def test_a_rendered_prompt_is_sent_as_it_is_with_one_bos(tmp_path: Path) -> None:
    tokenizer = bundled_tokenizer()
    sample = official(tmp_path)
    whole = tokenizer(OFFICIAL["input_context"] + OFFICIAL["input_query"]).input_ids
    assert whole.count(tokenizer.bos_token_id) == 2
    assert sum(PromptCounter(tokenizer, chat=False).count(sample)) == len(whole) - 1
    run(engine(), [sample], VARIANTS[:1], tmp_path / "run")
    (line,) = lines(tmp_path / "run")
    assert line["context_tokens"] + line["query_tokens"] == len(whole) - 1


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        ({}, "<bos>"),
        ({"input_context": f" \n<bos>{TEXT}", "input_query": "What?"}, "<bos>"),
        ({"input_context": TEXT}, r"<\|q\|>"),
        ({"input_context": TEXT, "input_query": "What is it?<|a|>\n"}, r"<\|a\|>"),
    ],
)
def test_a_rendered_prompt_is_refused_in_a_chat(
    tmp_path: Path, changes: dict[str, str], mark: str
) -> None:
    """Forbids two BOS and turns in turns, without a word."""
    sample = official(tmp_path, **changes)
    with pytest.raises(InvalidInputError, match=rf"vt-0 has been .*'{mark}'.*leave --chat out"):
        run(engine(), [*samples(1), sample], VARIANTS[:1], tmp_path / "run", chat=True)
    assert not (tmp_path / "run").exists()


def test_texts_that_mention_a_mark_are_no_prompts() -> None:
    marks = TemplateMarks(bundled_tokenizer())
    (sample,) = samples(1)
    for changes in (
        {"context": "A log has <bos> and <|q|> in it."},
        {"query": "What does <|a|> mean?"},
        {"context": "bos q a"},
    ):
        assert marks.mark_of(replace(sample, **changes)) == ""


def test_templates_without_special_tokens_are_known_by_both_ends() -> None:
    tokenizer = copy.deepcopy(bundled_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Assistant:"
    )
    marks = TemplateMarks(tokenizer)
    (sample,) = samples(1)
    rendered = replace(sample, context=f"User: {TEXT}", query="What?\nAssistant: ")
    assert marks.mark_of(rendered) == "User:"
    assert marks.mark_of(replace(rendered, query="What?")) == ""
    assert marks.mark_of(replace(rendered, context=TEXT)) == ""
    assert marks.mark_of(sample) == ""
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert TemplateMarks(tokenizer).mark_of(rendered) == ""


# ---------------------------------------------------------------- answer prefixes


@pytest.mark.parametrize(
    ("query", "prefix", "parts"),
    [
        ("Which? Answer:", " Answer:", ("Which?", " Answer:")),
        ("Which? Answer: ", " Answer:", ("Which?", " Answer: ")),
        ("Which?\nAnswer:", " Answer:", ("Which?", "\nAnswer:")),
        ("Which? Answer:", "Answer:", ("Which? ", "Answer:")),
        ("Which?<|a|>", " Answer:", ("Which?<|a|>", " Answer:")),
        ("Which?", "", ("Which?", "")),
        ("Which? ", " ", ("Which? ", " ")),
    ],
)
def test_a_prefix_that_the_query_ends_with_is_sent_once(
    tmp_path: Path, query: str, prefix: str, parts: tuple[str, str]
) -> None:
    """In files with a field `answer_prefix`, beside the prompt that ends with it or not."""
    sample = official(tmp_path, input_query=query, answer_prefix=prefix)
    assert (sample.query, sample.answer_prefix) == parts
    prompt = f"{TEXT}Question: Find all variables. {query}"
    row = {"index": 0, "input": prompt, "outputs": ["x"], "answer_prefix": prefix}
    (sample,) = read(write_lines(tmp_path / "ruler" / "vt.jsonl", [row]))
    assert sample.context + sample.query + sample.answer_prefix == (
        prompt if query + prefix != "".join(parts) else prompt + prefix
    )


def test_our_own_samples_are_warned_of_a_prefix_sent_twice(tmp_path: Path) -> None:
    (first, second) = samples(2)
    twice = replace(second, query=f"{second.query} It is", answer_prefix=" It is")
    write(tmp_path / "own.jsonl", [first, twice], format="samples")
    read_again = read(tmp_path / "own.jsonl")
    assert read_again == [first, twice]
    with pytest.warns(UserWarning, match="1 sample, the first needles-1, .*' It is' twice"):
        run(engine(), read_again, VARIANTS[:1], tmp_path / "run")
