"""RULER's questions about documents: a data set's own, hidden among its other documents."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from star_attention.errors import InvalidInputError, SizeError, TextError, quote
from star_attention.evals.samples.building import depths
from star_attention.evals.samples.case import Case
from star_attention.evals.samples.sample import Sample
from star_attention.files.text import read_text_file

_ASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output"
    " any other words.\n\n"
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a data set. Documents are indices into `Questions.documents`.

    Attributes:
        text: The question.
        answers: Right answers.
        context: Documents that the data set gives with the question.
        gold: The ones among them that answer it.
        related: Further documents on its subject.
    """

    text: str
    answers: tuple[str, ...]
    context: tuple[int, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A data set: its documents, each once and sorted, and its questions."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def squad(case: Case) -> Sample:
    """Generate a qa_1 sample, from SQuAD."""
    return _generate(case, _read("squad", "SQuAD", _parse_squad, case.options.get("squad")))


def hotpot(case: Case) -> Sample:
    """Generate a qa_2 sample, from HotpotQA."""
    return _generate(case, _read("hotpot", "HotpotQA", _parse_hotpot, case.options.get("hotpot")))


def _generate(case: Case, source: Questions) -> Sample:
    """Generate a sample of as many documents as fit: the question's, related ones, then others."""
    # Shuffled, because neighbors in the file are about the same documents; and in the same order
    # for all lengths, which are then compared on the same questions.
    order = list(range(len(source.questions)))
    random.Random(f"{case.suite} {case.task} {case.seed}").shuffle(order)
    if case.index >= len(order):
        raise InvalidInputError(
            f"sample {case.index + 1} of {case.task} cannot be generated: the file has"
            f" {len(order)} answerable questions; ask for fewer samples"
        )
    question = source.questions[order[case.index]]
    rng = case.rng()
    related = rng.sample(question.related, len(question.related))
    known = {*question.context, *related}
    others = [number for number in range(len(source.documents)) if number not in known]
    rng.shuffle(others)
    chosen = [*question.context, *related, *others]

    def build(count: int) -> Sample:
        shown = chosen[:count]
        case.rng("order").shuffle(shown)
        text = "\n\n".join(
            f"Document {place}:\n{source.documents[number]}"
            for place, number in enumerate(shown, 1)
        )
        gold = [
            f"Document {shown.index(number) + 1}:\n{source.documents[number]}"
            for number in question.gold
        ]
        return case.sample(
            f"{_ASK}The following are given documents.\n\n{text}\n\n",
            f"{_ASK}Question: {question.text}",
            " Answer:",
            question.answers,
            max_new_tokens=32,
            metric="string_match_part",
            category="qa",
            documents=count,
            depths=depths(text, gold),
        )

    count, sample = case.size.largest(build, least=len(question.context), most=len(chosen))
    if count == len(chosen):
        raise SizeError(
            f"length {case.size.length:,} is more than the file can fill: with all {count:,}"
            f" documents the sample takes {case.size.tokens(sample):,} tokens; give a smaller"
            " length, or a file with more documents"
        )
    return sample


def _read(option: str, name: str, parse: Callable[[Any], Questions], path: str | None) -> Questions:
    if path is None:
        raise InvalidInputError(
            f"{name} is not part of this package; give its published file with --{option}"
            f" (option {quote(option)})"
        )
    return _read_file(name, parse, path)


@functools.cache
def _read_file(name: str, parse: Callable[[Any], Questions], path: str) -> Questions:
    try:
        data = parse(json.loads(read_text_file(path)))
        for question in data.questions:
            for text in (question.text, *question.answers):
                if not isinstance(text, str):
                    raise TypeError(f"expected a string, got {quote(text)}")
    except TextError:
        raise
    except json.JSONDecodeError as error:
        raise InvalidInputError(f"{path} cannot be read as {name} ({error})") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{path} is not in {name}'s published format ({type(error).__name__}: {error});"
            f" give {_FILES[name]}"
        ) from None
    if not data.questions:
        raise InvalidInputError(f"{path} contains no answerable question; give {_FILES[name]}")
    return data


_FILES = {"SQuAD": "dev-v2.0.json", "HotpotQA": "hotpot_dev_distractor_v1.json"}


def _parse_squad(values: Any) -> Questions:
    """Parse `{"data": [{"paragraphs": [{"context", "qas": [QUESTION, ...]}]}]}`.

    A question is `{"question", "is_impossible", "answers": [{"text"}]}`.
    """
    articles = [article["paragraphs"] for article in values["data"]]
    documents = sorted(
        {paragraph["context"] for paragraphs in articles for paragraph in paragraphs}
    )
    number_of = {document: number for number, document in enumerate(documents)}
    questions = []
    for paragraphs in articles:
        article = dict.fromkeys(number_of[paragraph["context"]] for paragraph in paragraphs)
        for paragraph in paragraphs:
            own = number_of[paragraph["context"]]
            related = tuple(number for number in article if number != own)
            questions += [
                Question(
                    text=entry["question"],
                    answers=tuple(dict.fromkeys(answer["text"] for answer in entry["answers"])),
                    context=(own,),
                    gold=(own,),
                    related=related,
                )
                for entry in paragraph["qas"]
                if entry["answers"] and not entry.get("is_impossible", False)
            ]
    return Questions(documents=tuple(documents), questions=tuple(questions))


def _parse_hotpot(values: Any) -> Questions:
    """Parse a list of `{"question", "answer", "supporting_facts", "context"}`.

    `supporting_facts` is `[[title, sentence number], ...]`, `context` is
    `[[title, [sentence, ...]], ...]`.
    """
    contexts = [
        [(title, f"{title}\n{''.join(sentences)}") for title, sentences in entry["context"]]
        for entry in values
    ]
    documents = sorted({document for context in contexts for _, document in context})
    number_of = {document: number for number, document in enumerate(documents)}
    questions = []
    for entry, context in zip(values, contexts, strict=True):
        supporting = {title for title, _ in entry["supporting_facts"]}
        gold = [number_of[document] for title, document in context if title in supporting]
        questions.append(
            Question(
                text=entry["question"],
                answers=(entry["answer"],),
                context=tuple(dict.fromkeys(number_of[document] for _, document in context)),
                gold=tuple(dict.fromkeys(gold)),
            )
        )
    return Questions(documents=tuple(documents), questions=tuple(questions))
