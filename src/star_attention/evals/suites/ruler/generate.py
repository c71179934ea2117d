"""RULER's generators: the published templates, needles, answer prefixes and metrics.

A sample's context ends before the question, so that context, query and answer prefix joined are
RULER's prompt. Keys and words come from RULER's word lists, which differ between releases. The
needles of five tasks are hidden in essays that may not be redistributed: the option `essays` names
them; without it, prose of the standard library takes their place, and `meta` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from star_attention.evals.samples.case import Case
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites.ruler import SUITE, lists, needles, qa

GENERATORS: dict[str, Callable[[Case], Sample]] = {
    **dict.fromkeys(needles.NEEDLES, needles.generate),
    "vt": lists.variable_tracking,
    "cwe": lists.common_words,
    "fwe": lists.frequent_words,
    "qa_1": qa.squad,
    "qa_2": qa.hotpot,
}


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """Generate samples, each as long as whole units (sentences, words, documents) allow.

    `meta` has the category and, where they apply, the kind of haystack, the depths of the needles
    in percent of the characters, the prose with its hash, and the release of the word lists.

    Raises:
        InvalidInputError: A file is missing or not in its published format.
        SizeError: The task does not fit into the length, or cannot fill it.
    """
    generator = GENERATORS[task]
    return (
        generator(
            Case(suite=SUITE.name, task=task, size=size, seed=seed, index=index, options=options)
        )
        for index in range(count)
    )
