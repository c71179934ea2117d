"""RULER in tests: the published prompts, small data sets in published formats, and samples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from star_attention.evals.samples.sample import Sample
from star_attention.evals.samples.sizing import Size
from star_attention.evals.suites import get
from tests.engines import bundled_tokenizer

RULER = get("ruler")
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# RULER's templates and answer prefixes as published, in one piece.
MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. I"
    " will quiz you about the {kind}s afterwards.\n{context}\nWhat are all the special magic"
    " {kind}s for {query} mentioned in the provided text? The special magic {kind}s for {query}"
    " mentioned in the provided text are"
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will"
    " quiz you about the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for"
    " {query} mentioned in the provided text? The special magic {kind} for {query} mentioned in"
    " the provided text is"
)
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {query} in the text"
    " above. Answer: According to the chain(s) of variable assignment in the text above, 5"
    " variables are assigned the value {query}, they are: "
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common"
    " words in the above list? Answer: The top 10 words that appear most often in the list are:"
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most"
    " frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please"
    " ignore the dots '....'. What are the three most frequently appeared words in the above coded"
    " text? Answer: According to the coded text above, the three most frequently appeared words"
    " are:"
)
QA = (
    "Answer the question based on the given documents. Only give me the answer and do not output"
    " any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question"
    " based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query} Answer:"
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


def generate(task: str, length: int, count: int = 1, seed: int = 3, **options: Any) -> list[Sample]:
    size = Size(tokenizer=bundled_tokenizer(), length=length)
    return list(RULER.generate(task, size=size, count=count, seed=seed, options=options))


def options_of(task: str, data: dict[str, str]) -> dict[str, str]:
    """The options that a task needs."""
    option = {"qa_1": "squad", "qa_2": "hotpot"}.get(task)
    return {option: data[option]} if option else {}


def parts(sample: Sample) -> dict[str, str]:
    """Return what fills the placeholders of the published prompt; fails for any other prompt."""
    seen: set[str] = set()

    def placeholder(match: re.Match[str]) -> str:
        name = match[1]
        first = name not in seen
        seen.add(name)
        return f"(?P<{name}>.*?)" if first else f"(?P={name})"

    pattern = re.sub(r"\\\{(\w+)\\\}", placeholder, re.escape(PROMPTS[sample.task]))
    prompt = sample.context + sample.query + sample.answer_prefix
    match = re.fullmatch(pattern, prompt, re.DOTALL)
    assert match, sample.task
    return match.groupdict()


def paragraph(name: str, number: int) -> str:
    return (
        f"{name} number {number} was built in {1900 + number} by people of the town, and stands by"
        " the river to this day."
    )


def write_data(folder: Path) -> dict[str, str]:
    """Write SQuAD and HotpotQA, a few questions of each; returns the options that name them."""
    squad, hotpot = folder / "squad.json", folder / "hotpot.json"
    squad.write_text(json.dumps({"version": "v2.0", "data": _squad()}))
    hotpot.write_text(json.dumps(_hotpot()))
    return {"squad": str(squad), "hotpot": str(hotpot)}


def _squad() -> list[dict[str, Any]]:
    articles = []
    for name in ("Bridge", "Tower", "Mill", "Harbor", "Castle"):
        paragraphs = []
        for number in range(40):
            year = str(1900 + number)
            answers = [{"text": year, "answer_start": 0}, {"text": f"in {year}", "answer_start": 0}]
            answerable = {
                "id": "a",
                "question": f"When was {name.lower()} {number} made?",
                "is_impossible": False,
                "answers": [*answers, answers[0]],
            }
            impossible = {
                "id": "b",
                "question": "Who knows?",
                "is_impossible": True,
                "answers": answers,
            }
            unanswered = {"id": "c", "question": "Who knows?", "answers": []}
            qas = [answerable, impossible, unanswered]
            paragraphs.append({"context": paragraph(name, number), "qas": qas})
        articles.append({"title": name, "paragraphs": paragraphs})
    return articles


def _hotpot() -> list[dict[str, Any]]:
    questions = []
    for number in range(20):
        pages = [
            [f"Page {number * 10 + k}", [paragraph("Page", number * 10 + k), " It is old."]]
            for k in range(10)
        ]
        questions.append(
            {
                "_id": str(number),
                "question": "Which of them is it?",
                "answer": str(1900 + number * 10 + 2),
                "supporting_facts": [[pages[2][0], 0], [pages[7][0], 1]],
                "context": pages,
            }
        )
    return questions
