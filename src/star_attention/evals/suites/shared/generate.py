"""The generator of shared contexts: several questions on each context.

Samples that share a context have exactly the same `context` text and follow one another, so that a
runner encodes it once. A question does not see the ones before it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from star_attention.errors import InvalidInputError, quote
from star_attention.evals.samples.building import Draw, scatter
from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.samples.sources import Prose, Words, prose, words
from star_attention.evals.suites.infinitebench.generate import key_question
from star_attention.evals.suites.infinitebench.tasks import TASKS
from star_attention.evals.suites.shared import QUESTIONS
from star_attention.hf.text.tokens import query_ids
from star_attention.tools import needles

_METRIC = {"shared_kv": "whole_word", "shared_niah": "string_match_all"}
_MAX_NEW_TOKENS = {"shared_kv": TASKS["kv_retrieval"].max_new_tokens, "shared_niah": 32}


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question on a context, the beginning of its answer, and the answer."""

    query: str
    prefix: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The samples that share context `number`."""

    task: str
    size: Size
    seed: int
    number: int
    questions: int
    prose: Prose | None = None
    words: Words | None = None

    def samples(self, units: int) -> list[Sample]:
        """Return the samples on a context of this many pairs or sentences."""
        rng = random.Random(f"shared {self.task} {self.size.length} {self.seed} {self.number}")
        meta: dict[str, Any] = {"context": self.number}
        if self.prose is None or self.words is None:
            context, questions = key_values(units, self.questions, rng)
        else:
            context, questions = _needles(units, self.questions, rng, self.prose, self.words)
            meta |= self.prose.meta | {"words": self.words.release}
        first = self.number * self.questions
        return [
            Sample(
                id=f"{self.task}-{self.size.length}-{self.seed}-{index}",
                task=self.task,
                length=self.size.length,
                context=context,
                query=question.query,
                answer_prefix=question.prefix,
                answers=(question.answer,),
                max_new_tokens=_MAX_NEW_TOKENS[self.task],
                metric=_METRIC[self.task],
                meta=meta,
            )
            for index, question in enumerate(questions, first)
        ]

    def longest(self, units: int) -> Sample:
        """Return the sample with the longest question."""
        return max(
            self.samples(units),
            key=lambda sample: len(
                query_ids(self.size.tokenizer, sample.query + sample.answer_prefix)
            ),
        )


def generate(
    task: str, *, size: Size, count: int, seed: int, options: Mapping[str, Any]
) -> Iterator[Sample]:
    """Generate samples, `questions` of them on each context; the last may have fewer.

    shared_kv is InfiniteBench's kv_retrieval; shared_niah has RULER's needles between sentences of
    `essays`, one for each question. A context is sized for the longest of its questions.

    `meta` has `context`, the context's number; for shared_niah also prose and words.

    Raises:
        InvalidInputError: `questions` is not a positive integer, or the prose cannot be read.
        SizeError: The length is too short.
    """
    questions = _parse_questions(options.get("questions", QUESTIONS))
    sources: dict[str, Any] = {}
    if task == "shared_niah":
        sources = {"prose": prose(options.get("essays")), "words": words(options.get("words"))}
    return _generate(task, size, count, seed, questions, sources)


def _generate(
    task: str, size: Size, count: int, seed: int, questions: int, sources: Mapping[str, Any]
) -> Iterator[Sample]:
    for number in range(-(-count // questions)):
        group = _Group(
            task=task, size=size, seed=seed, number=number, questions=questions, **sources
        )
        units, _ = size.largest(group.longest, least=0 if sources else questions)
        yield from group.samples(units)[: count - number * questions]


def _parse_questions(questions: Any) -> int:
    try:
        if int(questions) == float(questions) and int(questions) >= 1:
            return int(questions)
    except (TypeError, ValueError):
        pass
    raise InvalidInputError(
        f"questions {quote(questions)} is not a positive integer; give 1 or more questions for each"
        " context"
    )


def key_values(pairs: int, count: int, rng: random.Random) -> tuple[str, list[Question]]:
    """Return a context of key-value pairs, and questions for the values of `count` keys."""
    task = TASKS["kv_retrieval"]
    draw = Draw(rng, None)
    table = [(draw("uuids"), draw("uuids")) for _ in range(pairs)]
    questions = [
        Question(query=key_question(key), prefix=task.prefix, answer=value)
        for key, value in table[:count]
    ]
    rng.shuffle(table)
    return f"{task.instruction}\n\n{json.dumps(dict(table))}\n\n", questions


def _needles(
    sentences: int, count: int, rng: random.Random, prose: Prose, words: Words
) -> tuple[str, list[Question]]:
    """Return a context in RULER's template for several needles, each asked for by itself."""
    draw = Draw(rng, words)
    pairs = [(draw("words"), draw("numbers")) for _ in range(count)]
    hidden = [needles.needle(key, value, "numbers") for key, value in pairs]
    start = rng.randrange(len(prose.sentences))
    filler = [prose.sentences[(start + i) % len(prose.sentences)] for i in range(sentences)]
    text = " ".join(scatter(hidden, filler, rng))
    questions = []
    for key, value in pairs:
        query, prefix = needles.question([key], "numbers", single=True)
        questions.append(Question(query=query, prefix=prefix, answer=value))
    return f"{needles.head('numbers', single=False)}{text}\n", questions
