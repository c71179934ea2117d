"""InfiniteBench's 12 tasks: prompt and metric of each.

A published line has `context, input, answer, options`. In our prompts a short instruction precedes
the context, and the whole question is in the query. This holds for math_find and code_run as well,
whose published prompts name the number or the function before the context, where Star Attention's
first phase would see it. The instructions are our own, so that scores come close to published ones
without being the same measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from star_attention.evals.samples.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompt and metric of a task.

    Attributes:
        metric: Name in `metrics.METRICS`.
        max_new_tokens: Most tokens of an answer, as published.
        instruction: What precedes the context.
        question: The question, if a line has no `input`.
        prefix: The answer prefix, if the question does not end with one.
    """

    metric: str
    max_new_tokens: int
    instruction: str
    question: str = ""
    prefix: str = ""


TASKS = {
    "passkey": Task(
        metric="first_integer",
        max_new_tokens=6,
        instruction="Somewhere in the text below stands a pass key, among sentences that do not"
        " matter. You will be asked for it.",
        question="What is the pass key?",
        prefix="\nThe pass key is",
    ),
    "number_string": Task(
        metric="first_integer",
        max_new_tokens=12,
        instruction="Somewhere in the text below stands a string of digits, among sentences that do"
        " not matter. You will be asked for it.",
        question="What is the string of digits?",
        prefix="\nThe string of digits is",
    ),
    "kv_retrieval": Task(
        metric="whole_word",
        max_new_tokens=50,
        instruction="Below is a JSON object. You will be asked for the value of one of its keys.",
        prefix="\nThe value of this key is",
    ),
    "longbook_sum_eng": Task(
        metric="rouge_lsum",
        max_new_tokens=1200,
        instruction="Read the book below. You will be asked to summarize it.",
        question="Summarize the book.",
        prefix="\nSummary:",
    ),
    "longbook_qa_eng": Task(
        metric="token_f1",
        max_new_tokens=40,
        instruction="Read the book below. You will be asked a question about it; answer in as few"
        " words as you can.",
        prefix="\nAnswer:",
    ),
    "longbook_qa_chn": Task(
        metric="character_f1",
        max_new_tokens=40,
        instruction="请阅读下面的书，然后用尽量少的字回答一个问题。",  # noqa: RUF001
        prefix="\n回答：",  # noqa: RUF001
    ),
    "longbook_choice_eng": Task(
        metric="option_letter",
        max_new_tokens=40,
        instruction="Read the book below. You will be asked a question about it, with four options"
        " of which one is right; answer with its letter.",
        prefix="\nThe letter of the right option is",
    ),
    "longdialogue_qa_eng": Task(
        metric="name_word",
        max_new_tokens=40,
        instruction="Below is the script of a dialogue in which the name of one character is"
        ' replaced by "$$MASK$$" in one place.',
        question='Which character is "$$MASK$$"? Answer with the name as it stands in the script'
        " and nothing else.",
        prefix="\nThe name is",
    ),
    "code_debug": Task(
        metric="option_function",
        max_new_tokens=5,
        instruction="Below is the code of a project in which one function was given an error on"
        " purpose.",
        question="Which of these functions has the error? Answer with its letter and its name.",
        prefix="\nThe right option is:",
    ),
    "code_run": Task(
        metric="last_integer",
        max_new_tokens=5,
        instruction="Below are functions in Python that call each other. You will be asked what one"
        " of them returns.",
        prefix="\nThe value that it returns is",
    ),
    "math_find": Task(
        metric="first_number",
        max_new_tokens=3,
        instruction="Below is a list of numbers. You will be asked to find one of them.",
    ),
    "math_calc": Task(
        metric="leading_integers",
        max_new_tokens=30000,
        instruction="Below is a long sum. You will be asked for its value after each of its steps.",
        question="Give the values after each step as a list, beginning with the first number.",
        prefix="\nValues:",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a sample that its task does not determine."""

    context: str
    question: str
    answers: tuple[str, ...]
    prefix: str
    meta: Mapping[str, Any] = field(default_factory=dict)

    def sample(self, *, id: str, task: str, length: int) -> Sample:
        """Return the sample of a task with these parts."""
        return Sample(
            id=id,
            task=task,
            length=length,
            context=f"{TASKS[task].instruction}\n\n{self.context}\n\n",
            query=self.question,
            answer_prefix=self.prefix,
            answers=self.answers,
            max_new_tokens=TASKS[task].max_new_tokens,
            metric=TASKS[task].metric,
            meta=self.meta,
        )
