"""Training documents: a context and questions on it, and helpers for their generators.

Keys and lists use the words that `eval --words eval` leaves out (`sources.words("train")`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from star_attention.evals.samples.building import insert
from star_attention.evals.samples.sources import Words, words
from training.text import Encoder, docstring_sentences


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question on a context.

    Attributes:
        task: Task whose answer it asks for, one of `data.TASKS`.
        text: Query and answer prefix.
        answer: The answer, with the space before it.
    """

    task: str
    text: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """A context and the questions that follow it.

    Attributes:
        context: The context.
        questions: The questions, in order.
        hint: An answer within the context, of a worked example; it is learned as an answer of the
            task of `questions[0]`. Empty if there is none.
    """

    context: str
    questions: list[Question]
    hint: str = ""


@dataclass(kw_only=True)
class Maker:
    """Random choices and sizes of documents.

    Attributes:
        rng: Source of all random choices.
        encode: Counts tokens.
        part: Part of the words, "train" or "eval".
        bos: "document" if `<bos>` precedes each document of a row, "row" if only the first.
    """

    rng: random.Random
    encode: Encoder
    part: str = "train"
    bos: str = "document"

    @property
    def words(self) -> Words:
        """Words for keys and lists."""
        return words(self.part)

    def size(self, text: str) -> int:
        """Return the number of tokens in a text."""
        return len(self.encode(text))

    def size_of(self, questions: list[Question]) -> int:
        """Return the number of tokens in questions and answers, each with its `<eos>`."""
        return sum(
            self.size(question.text) + self.size(question.answer) + 1 for question in questions
        )

    def num_questions(self, room: int, tokens: int = 60) -> int:
        """Draw the number of questions: at most one per `tokens` tokens, and 32.

        Half of the documents have the most, the others any smaller number.
        """
        most = max(1, min(32, room // tokens))
        return most if self.rng.random() < 0.5 else self.rng.randint(1, most)

    def fill(self, sentence: Callable[[], str], room: int, joint: str) -> list[str]:
        """Return as many sentences as fit into `room` tokens."""
        sentences: list[str] = []
        joint_size = self.size(joint) if joint.strip() else 0
        while True:
            candidate = sentence()
            taken = self.size(joint + candidate) + joint_size
            if taken > room:
                return sentences
            room -= taken
            sentences.append(candidate)

    def prose(self) -> Callable[[], str]:
        """Return a function whose calls return successive sentences of prose, from a random one."""
        lines = docstring_sentences()
        place = self.rng.randrange(len(lines))

        def following() -> str:
            nonlocal place
            place = (place + 1) % len(lines)
            return lines[place]

        return following

    def scatter(self, hidden: list[str], filler: list[str]) -> list[str]:
        """Insert the hidden sentences, in their order, at random places of the filler."""
        places = sorted(self.rng.randrange(len(filler) + 1) for _ in hidden)
        return insert(hidden, filler, places)
