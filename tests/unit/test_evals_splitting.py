"""Splitting a whole prompt into context and query."""

from __future__ import annotations

from typing import Any

import pytest

from star_attention.evals.splitting import SENTINEL, split

RULER = {
    "niah_single_1": "What is the special magic number for a in the text?",
    "niah_multikey_2": "What are all the special magic numbers for a?",
    "ruler_vt": "Question: Find all variables that are",
    "ruler_cwe": "Question: What are the 10 most common words?",
    "ruler_fwe": "Question: Do not provide any explanation.",
    "ruler_qa_squad": "Answer the question based on the given documents. Who?",
}


@pytest.mark.parametrize("name", RULER)
def test_the_harnesss_own_tasks_are_split_before_their_question(name: str) -> None:
    example = f"An example.\n{RULER[name]} It is 3.\n"
    parts = split(example + f"Text.\n{RULER[name]} It is", {"input": "..."}, name)
    assert (parts.context, parts.query, parts.how) == (
        f"{example}Text.\n",
        f"{RULER[name]} It is",
        "pattern",
    )
    assert split(f"Text.\n{RULER[name]}", {}, "another_task").how == "last block"


@pytest.mark.parametrize(
    ("prompt", "doc", "task", "expected"),
    [
        ("CTX a? CTX b?", {"context": "CTX"}, "mine", ("CTX a? CTX", " b?", "column")),
        ("<u>CTX b?", {"context": " CTX\n"}, "mine", ("<u>CTX", " b?", "column")),
        ("CTX", {"context": "CTX"}, "mine", ("CTX", "", "column")),
        (f"CTX{SENTINEL}?{SENTINEL}!", {"context": "CTX"}, "mine", ("CTX", "?!", "column")),
        (f"CTX{SENTINEL}? CTX{SENTINEL}!", {}, "mine", ("CTX? CTX", "!", "sentinel")),
        (
            f"Text.{SENTINEL} Question: Find all variables",
            {},
            "ruler_vt",
            ("Text.", " Question: Find all variables", "sentinel"),
        ),
        (
            "Where? Facts. Where?",
            {"question": " Where? "},
            "babilong_qa1",
            ("Where? Facts. ", "Where?", "pattern"),
        ),
        ("Facts.", {}, "babilong_qa1", ("Facts.", "", "last block")),
        ("Where is he?", {"question": "Where"}, "babilong_qa1", ("Where is he?", "", "last block")),
        ("Text. b?", {"context": ["Text."]}, "mine", ("Text. b?", "", "last block")),
        ("Text. b?", {"context": ""}, "mine", ("Text. b?", "", "last block")),
        (f"{SENTINEL}b?", {}, "mine", ("b?", "", "last block")),
        ("Text. b?", "no columns", "mine", ("Text. b?", "", "last block")),
    ],
)
def test_where_a_prompt_is_split(
    prompt: str, doc: Any, task: str, expected: tuple[str, str, str]
) -> None:
    parts = split(prompt, doc, task)
    assert (parts.context, parts.query, parts.how) == expected


def test_column_and_sentinel_may_have_other_names() -> None:
    doc = {"passage": "CTX", "context": "b"}
    assert split("CTX a b?", doc, "mine", context_column="passage").query == " a b?"
    assert split("CTX @ b?", {}, "mine", sentinel="@").query == " b?"
