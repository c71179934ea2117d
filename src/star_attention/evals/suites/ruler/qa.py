"""RULER's questions on documents: a data set's own, the ones that answer them among others."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, SizeError
from star_attention.evals.samples.sample import Sample
from star_attention.evals.suites.ruler.case import Case, depths

_ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"


@dataclass(frozen=True, kw_only=True)
class Question:
    """answers: any of which is right. given: numbers of the documents that come with it; gold: of those that answer it; related:
    of further ones on its subject.
    """

    text: str
    answers: tuple[str, ...]
    given: tuple[int, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """documents: each once, sorted, and numbered so."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def qa_1(case: Case) -> Sample:
    """SQuAD."""
    return _qa(case, _read("squad", "SQuAD", _squad, case.options.get("squad")))


def qa_2(case: Case) -> Sample:
    """HotpotQA."""
    return _qa(case, _read("hotpot", "HotpotQA", _hotpot, case.options.get("hotpot")))


def _qa(case: Case, source: Questions) -> Sample:
    """The given documents, then related ones, then any, as many as fit; in random order."""
    # Neighbours in the file are on the same documents. The order is the same for all lengths, which are then compared on the
    # same questions.
    order = list(range(len(source.questions)))
    random.Random(f"{case.suite} {case.task} {case.seed}").shuffle(order)
    if case.index >= len(order):
        raise InvalidInputError(
            f"sample {case.index + 1} of {case.task} cannot be made: the file holds {len(order)} answerable questions; ask for"
            " fewer samples"
        )
    question = source.questions[order[case.index]]
    rng = case.rng()
    related = rng.sample(question.related, len(question.related))
    known = {*question.given, *related}
    others = [number for number in range(len(source.documents)) if number not in known]
    rng.shuffle(others)
    chosen = [*question.given, *related, *others]

    def build(count: int) -> Sample:
        shown = chosen[:count]
        case.rng("order").shuffle(shown)
        text = "\n\n".join(
            f"Document {place}:\n{source.documents[number]}"
            for place, number in enumerate(shown, 1)
        )
        titles = [
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
            depths=depths(text, titles),
        )

    count, sample = case.size.largest(build, least=len(question.given), most=len(chosen))
    if count == len(chosen):
        raise SizeError(
            f"length {case.size.length:,} is more than the file has: {count:,} documents, with which the sample takes"
            f" {case.size.tokens(sample):,} tokens; give a smaller length, or a file with more documents"
        )
    return sample


def _read(option: str, name: str, parse: Callable[[Any], Questions], path: str | None) -> Questions:
    if path is None:
        raise InvalidInputError(
            f"{name} does not come with this package; give its published file with --{option} (the option {option})"
        )
    return _parsed(name, parse, path)


@functools.cache
def _parsed(name: str, parse: Callable[[Any], Questions], path: str) -> Questions:
    try:
        found = parse(json.loads(Path(path).read_text(encoding="utf-8")))
        for question in found.questions:
            for text in (question.text, *question.answers):
                if not isinstance(text, str):
                    raise TypeError(f"{text!r} is no text")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidInputError(f"{path} cannot be read as {name} ({error})") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{path} is not in {name}'s published format ({type(error).__name__}: {error}); give {_FILES[name]}"
        ) from None
    if not found.questions:
        raise InvalidInputError(f"{path} holds no question with an answer; give {_FILES[name]}")
    return found


_FILES = {"SQuAD": "dev-v2.0.json", "HotpotQA": "hotpot_dev_distractor_v1.json"}


def _squad(values: Any) -> Questions:
    """`{"data": [{"paragraphs": [{"context", "qas": [{"question", "is_impossible", "answers": [{"text"}]}]}]}]}`."""
    articles = [article["paragraphs"] for article in values["data"]]
    documents = sorted(
        {paragraph["context"] for paragraphs in articles for paragraph in paragraphs}
    )
    number = {document: place for place, document in enumerate(documents)}
    questions = []
    for paragraphs in articles:
        article = dict.fromkeys(number[paragraph["context"]] for paragraph in paragraphs)
        for paragraph in paragraphs:
            here = number[paragraph["context"]]
            related = tuple(place for place in article if place != here)
            questions += [
                Question(
                    text=asked["question"],
                    answers=tuple(dict.fromkeys(answer["text"] for answer in asked["answers"])),
                    given=(here,),
                    gold=(here,),
                    related=related,
                )
                for asked in paragraph["qas"]
                if asked["answers"] and not asked.get("is_impossible", False)
            ]
    return Questions(documents=tuple(documents), questions=tuple(questions))


def _hotpot(values: Any) -> Questions:
    """`[{"question", "answer", "supporting_facts": [[title, sentence], ...], "context": [[title, [sentence, ...]], ...]}]`."""
    pages = [
        [(title, f"{title}\n{''.join(lines)}") for title, lines in asked["context"]]
        for asked in values
    ]
    documents = sorted({document for page in pages for _, document in page})
    number = {document: place for place, document in enumerate(documents)}
    questions = []
    for asked, page in zip(values, pages, strict=True):
        supporting = {title for title, _ in asked["supporting_facts"]}
        questions.append(
            Question(
                text=asked["question"],
                answers=(asked["answer"],),
                given=tuple(dict.fromkeys(number[document] for _, document in page)),
                gold=tuple(
                    dict.fromkeys(
                        number[document] for title, document in page if title in supporting
                    )
                ),
            )
        )
    return Questions(documents=tuple(documents), questions=tuple(questions))
