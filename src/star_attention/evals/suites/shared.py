"""Many questions on one context, the shape of SCBench (Li et al., arXiv 2412.10319): what encoding a context once is for.

Samples that share a context have the very same `context` text and come one after another, so that a runner encodes it once. A
question does not see the ones before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from star_attention.errors import InvalidInputError
from star_attention.evals import suites
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import Prose, Words, prose, words
from star_attention.evals.suites.babilong import scattered
from star_attention.evals.suites.infinitebench import KINDS, asked_for_key, leads_in, listed
from star_attention.evals.suites.ruler.needles import Draw, head, question, sentence
from star_attention.hf.text.tokens import query_ids

TASKS = ("shared_kv", "shared_niah")
OPTIONS = {
    "questions": "questions on each context (10)",
    "essays": "the text that shared_niah's needles are scattered in: .json, a folder of .txt, or a text file",
    "words": "of shared_niah's keys: train or eval, those that the bundled model was trained on, or the others",
}

SCBENCH = {
    "scbench_kv": ("string_match_part", 150),
    "scbench_kv_hard": ("string_match_part", 150),
    "scbench_kv_compressible": ("string_match_part", 150),
    "scbench_hashhop": ("string_match_part", 150),
    "scbench_prefix_suffix": ("string_match_part", 150),
    "scbench_qa_eng": ("string_match_part", 40),
    "scbench_qa_chn": ("character_f1", 40),
    "scbench_choice_eng": ("option_letter", 40),
    "scbench_many_shot": ("string_match_part", 10),
    "scbench_mf": ("first_number", 5),
    "scbench_passkey": ("first_integer", 15),
    "scbench_summary": ("rouge_lsum", 200),
    "scbench_vt": ("string_match_all", 30),
}
"""Metric and tokens to generate of SCBench's tasks. (Its comparison of hashes and keys heeds case; string_match_part does not.)"""
_METRIC = {"shared_kv": "whole_word", "shared_niah": "string_match_all"}
_MAX_NEW_TOKENS = {"shared_kv": KINDS["kv_retrieval"].max_new_tokens, "shared_niah": 32}
_OTHERS = ("string_match_all", 128)
"""Of files in SCBench's shape that are none of its own."""


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """`count` samples, `questions` of them on each context (on the last one as many as are left).

    shared_kv: InfiniteBench's kv_retrieval; shared_niah: RULER's needles between sentences of `essays`, one for each question.
    A context is sized for the longest of its questions. meta: `context`, its number; of shared_niah also what its text and
    words are.

    Raises `SizeError` for a length that is too short, `InvalidInputError` for an unknown task or an option that cannot be.
    """
    suites.check(suites.get("shared"), "shared", task, options)
    questions = _positive(options.get("questions", 10))
    source = (
        (prose(options.get("essays")), words(options.get("words")))
        if task == "shared_niah"
        else None
    )
    return _generated(task, size, count, seed, questions, source)


def _positive(questions: Any) -> int:
    try:
        if int(questions) == float(questions) and int(questions) >= 1:
            return int(questions)
    except (TypeError, ValueError):
        pass
    raise InvalidInputError(f"questions {questions!r} is no number of questions; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class Question:
    query: str
    prefix: str
    answer: str


def _generated(
    task: str, size: Size, count: int, seed: int, questions: int, source: tuple[Prose, Words] | None
) -> Iterator[Sample]:
    described = {} if source is None else source[0].described | {"words": source[1].release}
    for number in range(-(-count // questions)):
        name = f"shared {task} {size.length} {seed} {number}"

        def samples(units: int, *, name: str = name, number: int = number) -> list[Sample]:
            rng = random.Random(name)
            context, asked = (
                key_values(units, questions, rng)
                if source is None
                else _niah(units, questions, rng, *source)
            )
            return [
                Sample(
                    id=f"{task}-{size.length}-{seed}-{number * questions + i}",
                    task=task,
                    length=size.length,
                    context=context,
                    query=one.query,
                    answer_prefix=one.prefix,
                    answers=(one.answer,),
                    max_new_tokens=_MAX_NEW_TOKENS[task],
                    metric=_METRIC[task],
                    meta={"context": number} | described,
                )
                for i, one in enumerate(asked)
            ]

        def longest(units: int, *, samples: Callable[[int], list[Sample]] = samples) -> Sample:
            return max(
                samples(units),
                key=lambda one: len(query_ids(size.tokenizer, one.query + one.answer_prefix)),
            )

        units, _ = size.largest(longest, least=questions if source is None else 0)
        yield from samples(units)[: count - number * questions]


def key_values(pairs: int, questions: int, rng: random.Random) -> tuple[str, list[Question]]:
    """A context of so many pairs, and questions for the values of some of them."""
    kind = KINDS["kv_retrieval"]
    draw = Draw(rng, None)
    table = [(draw("uuids"), draw("uuids")) for _ in range(pairs)]
    asked = [
        Question(query=asked_for_key(key), prefix=kind.prefix, answer=value)
        for key, value in table[:questions]
    ]
    rng.shuffle(table)
    return f"{kind.instruction}\n\n{json.dumps(dict(table))}\n\n", asked


def _niah(
    sentences: int, questions: int, rng: random.Random, text: Prose, known: Words
) -> tuple[str, list[Question]]:
    """RULER's templates for several needles; each of them is asked for by itself."""
    draw = Draw(rng, known)
    pairs = [(draw("words"), draw("numbers")) for _ in range(questions)]
    needles = [sentence(key, value, "numbers") for key, value in pairs]
    start = rng.randrange(len(text.sentences))
    between = [text.sentences[(start + i) % len(text.sentences)] for i in range(sentences)]
    context = f"{head('numbers', one=False)}{' '.join(scattered(needles, between, rng))}\n"
    asked = []
    for key, value in pairs:
        query, prefix = question([key], "numbers", one=True)
        asked.append(Question(query=query, prefix=prefix, answer=value))
    return context, asked


def samples_of_row(row: Mapping[str, Any], *, task: str, id: str) -> list[Sample]:
    """Of a line of SCBench's files, `context, multi_turns: [{input, answer, options}]`: one sample a turn, on the context alone.

    A turn's own `task` (in files of mixed ones) goes before the file's. `length` is 0.

    Raises `InvalidInputError` for fields that are missing or of the wrong kind, and for SCBench's tasks without a metric here.
    """
    context, turns = row.get("context"), row.get("multi_turns")
    if isinstance(context, list) and all(isinstance(one, int | float) for one in context):
        context = json.dumps(context)  # scbench_mf's numbers
    if not isinstance(context, str):
        raise InvalidInputError(f"context {context!r} of SCBench is no text")
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, Mapping) for turn in turns)
    ):
        raise InvalidInputError("multi_turns of SCBench is no list of questions")
    return [
        _turn(turn, context=f"{context}\n\n", task=str(turn.get("task", task)), id=f"{id}-{i}")
        for i, turn in enumerate(turns)
    ]


def _turn(turn: Mapping[str, Any], *, context: str, task: str, id: str) -> Sample:
    if task.startswith("scbench_") and task not in SCBENCH:
        raise InvalidInputError(
            f"task {task!r} of SCBench has no metric here; choose from {', '.join(SCBENCH)}"
        )
    metric, max_new_tokens = SCBENCH.get(task, _OTHERS)
    question, answer, options = turn.get("input"), turn.get("answer"), turn.get("options") or []
    if not isinstance(question, str) or not question.strip():
        raise InvalidInputError(f"input {question!r} of a turn is no question")
    answers = [
        str(one)
        for one in (answer if isinstance(answer, list) else [answer])
        if one not in (None, "")
    ]
    if not answers:
        raise InvalidInputError(f"answer {answer!r} of a turn is empty")
    lines = listed(options)
    if lines:
        answers += ["ABCD"[options.index(one)] for one in answers if one in options]
    return Sample(
        id=id,
        task=task,
        length=0,
        context=context,
        query=question + lines,
        answer_prefix="" if leads_in(question) else "\nAnswer:",
        answers=tuple(answers),
        max_new_tokens=max_new_tokens,
        metric=metric,
    )
