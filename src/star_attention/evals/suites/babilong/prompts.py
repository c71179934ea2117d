"""The prompts of BABILong's tasks: the text around the context, and the lead of the question.

Our own prompts have the published structure with other sentences. The published ones are read from
their authors' file.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from star_attention.errors import InvalidInputError, TextError, quote
from star_attention.files.text import read_text_file

QUESTION_LEAD = "Question: "
_TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\n"
    + QUESTION_LEAD
    + "{question}"
)
_PARTS = ("instruction", "examples", "post_prompt")
_PUBLISHED = (
    "give babilong/prompts.py of github.com/booydar/babilong, or its DEFAULT_PROMPTS as .json"
)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The prompt around a text and its question.

    Attributes:
        before: What precedes the text in the context.
        after: What follows the text in the context.
        question_lead: What precedes the question in the query.
        sha256: Beginning of the published file's hash; empty for our own prompts.
    """

    before: str
    after: str
    question_lead: str = QUESTION_LEAD
    sha256: str = ""


_READ = (
    "A few sentences about {} are hidden in a long text about other things. Use nothing but those"
    " sentences to answer."
)
_INSTRUCTION = {
    "qa1": _READ.format("where people go") + " A person is where they went last.",
    "qa2": _READ.format("people, where they go and what they carry")
    + " A thing is where its holder is, or where it was put down last.",
    "qa3": _READ.format("people, where they go and what they carry")
    + " A thing goes wherever its holder goes; you are asked in which room it was before it came"
    " to another.",
    "qa4": _READ.format("which room lies on which side of another"),
    "qa5": _READ.format("people, what they carry and what they give to each other"),
}
EXAMPLES = {
    "qa1": (
        (
            "Mary went to the office. John moved to the garden. Mary moved to the kitchen.",
            "Where is Mary?",
            "kitchen",
        ),
        (
            "Sandra journeyed to the hallway. Daniel went to the bedroom.",
            "Where is Sandra?",
            "hallway",
        ),
    ),
    "qa2": (
        (
            "Daniel went to the office. Daniel took the milk. Daniel travelled to the garden.",
            "Where is the milk?",
            "garden",
        ),
        (
            "Mary moved to the bedroom. Mary grabbed the apple."
            " Mary dropped the apple. Mary went to the kitchen.",
            "Where is the apple?",
            "bedroom",
        ),
    ),
    "qa3": (
        (
            "John went to the kitchen. John got the football."
            " John moved to the office. John journeyed to the hallway.",
            "Where was the football before the hallway?",
            "office",
        ),
        (
            "Sandra moved to the bathroom. Sandra picked up the milk."
            " Sandra went to the garden. Sandra left the milk.",
            "Where was the milk before the garden?",
            "bathroom",
        ),
    ),
    "qa4": (
        (
            "The office is north of the kitchen. The kitchen is east of the garden.",
            "What is north of the kitchen?",
            "office",
        ),
        (
            "The bedroom is west of the hallway. The bathroom is south of the hallway.",
            "What is the hallway east of?",
            "bedroom",
        ),
    ),
    "qa5": (
        (
            "Fred went to the office. Mary moved to the office. Fred took the milk."
            " Fred gave the milk to Mary.",
            "Who did Fred give the milk to?",
            "Mary",
        ),
        (
            "Bill went to the garden. Jeff went to the garden. Jeff got the apple."
            " Jeff handed the apple to Bill.",
            "What did Jeff give to Bill?",
            "apple",
        ),
    ),
}
_ANSWER = {
    "qa1": "Answer with the name of one room and nothing else.",
    "qa2": "Answer with the name of one room and nothing else.",
    "qa3": "Answer with the name of one room and nothing else.",
    "qa4": "Answer with the name of one room and nothing else.",
    "qa5": "Answer with the name of one person or one thing and nothing else.",
}


def read_frame(task: str, path: str | None = None) -> Frame:
    """Return a task's prompt: our own, or that of the published file at `path`.

    Raises:
        InvalidInputError: The file is not as published, or has no prompt for the task.
    """
    if path is None:
        examples = "\n\n".join(
            f"<example>\n{facts}\n{QUESTION_LEAD}{question}\nAnswer: {answer}\n</example>"
            for facts, question, answer in EXAMPLES[task]
        )
        parts = {
            "instruction": _INSTRUCTION[task],
            "examples": examples,
            "post_prompt": _ANSWER[task],
        }
        return _frame(_TEMPLATE, parts, "")
    template, prompts, sha256 = _read_published(path)
    if task not in prompts:
        raise InvalidInputError(f"{path} has no prompt for {task}; it has {', '.join(prompts)}")
    return _frame(template, prompts[task], sha256)


def _frame(template: str, parts: Mapping[str, str], sha256: str) -> Frame:
    """Fill a template and cut it around the context, and before the line of the question."""
    filled = re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), template)
    before, _, rest = filled.partition("{context}")
    middle, _, _ = rest.partition("{question}")
    after, line, lead = middle.rpartition("\n")
    return Frame(before=before.lstrip(), after=after + line, question_lead=lead, sha256=sha256)


@functools.cache
def _read_published(path: str) -> tuple[str, dict[str, dict[str, str]], str]:
    """Return template, prompts and hash of a published file, whose code is not executed."""
    try:
        text = read_text_file(path)
        values: dict[str, Any] = (
            {"DEFAULT_PROMPTS": json.loads(text)} if path.endswith(".json") else _literals(text)
        )
    except TextError:
        raise
    except (ValueError, SyntaxError) as error:
        raise InvalidInputError(
            f"{path} cannot be read as prompts ({error}); {_PUBLISHED}"
        ) from None
    prompts = values.get("DEFAULT_PROMPTS")
    if not isinstance(prompts, dict) or not prompts:
        raise InvalidInputError(f"{path} has no DEFAULT_PROMPTS; {_PUBLISHED}")
    for task, parts in prompts.items():
        if not isinstance(parts, dict) or not all(
            isinstance(parts.get(part), str) for part in _PARTS
        ):
            raise InvalidInputError(
                f"{path}: the prompt of {task} does not consist of strings {', '.join(_PARTS)};"
                f" {_PUBLISHED}"
            )
    template = values.get("DEFAULT_TEMPLATE", _TEMPLATE)
    if not isinstance(template, str) or not re.search(
        r"\{context\}.*\n.*\{question\}", template, re.DOTALL
    ):
        raise InvalidInputError(
            f"{path}: DEFAULT_TEMPLATE {quote(template)} does not have the question on a"
            " line below the"
            f" context; {_PUBLISHED}"
        )
    return template, prompts, hashlib.sha256(text.encode()).hexdigest()[:16]


def _literals(code: str) -> dict[str, Any]:
    """Return the names of a module that are assigned literals, with their values."""
    values = {}
    for node in ast.parse(code).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                continue
    return values
