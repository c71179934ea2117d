"""RULER's 13 tasks, generated: canonical templates, needles, answer prefixes, numbers of tokens and metrics (arXiv 2404.06654).

A sample's context ends before the question, so that context, query and answer prefix behind one another are RULER's prompt.
Keys and words come from its word lists, which differ from one release to the next, and needles of five tasks stand in essays that
may not be passed on: `essays` names them; without it the standard library's prose takes their place, and `meta` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals import suites
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites.ruler.case import Case
from star_attention.evals.suites.ruler.lists import cwe, fwe, vt
from star_attention.evals.suites.ruler.needles import NEEDLES, needles
from star_attention.evals.suites.ruler.qa import qa_1, qa_2

_MAKERS: dict[str, Callable[[Case], Sample]] = {
    **dict.fromkeys(NEEDLES, needles),
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
    "qa_1": qa_1,
    "qa_2": qa_2,
}
TASKS = tuple(_MAKERS)
OPTIONS = {
    "essays": "prose for the needles: a .json with a field text (PaulGrahamEssays.json), a folder of .txt, or a text file",
    "squad": "path of SQuAD's dev-v2.0.json, for qa_1",
    "hotpot": "path of HotpotQA's hotpot_dev_distractor_v1.json, for qa_2",
    "words": "train or eval: the words that the bundled model was trained on, or the others",
    "compat": "star-attention: vt, cwe and fwe as in the official implementation",
}


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """`count` samples of a task, each as long as whole units of it (sentences, words, documents) let it be within `size`.

    `meta`: category, and where they apply haystack, depths of the needles in percent of the characters, prose and its hash, and
    the release of the word lists.

    Raises `InvalidInputError` for an unknown task or option, and for files that are missing or not as published; `SizeError` for a
    length that the task does not fit in or cannot fill.
    """
    suites.check(suites.get("ruler"), "RULER", task, options)
    compat = options.get("compat")
    if compat not in (None, "star-attention"):
        raise InvalidInputError(
            f"compat {compat!r} is unknown; give star-attention, or leave it out"
        )
    cases = (
        Case(suite="ruler", task=task, size=size, seed=seed, index=index, options=options)
        for index in range(count)
    )
    return map(_MAKERS[task], cases)
