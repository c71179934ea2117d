"""The prompts of BABILong's tasks: what stands in front of a text and behind it, and how the question begins.

Those of our own have the published structure and sentences of our own. The published ones come from a file of their authors.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError

ASK = "Question: "
_TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\n"
    + ASK
    + "{question}"
)
_PARTS = ("instruction", "examples", "post_prompt")
_PUBLISHED = (
    "give babilong/prompts.py of github.com/booydar/babilong, or .json with its DEFAULT_PROMPTS"
)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """before, after: what stands around a text in the context. ask: what the question follows on in the query. sha256: of the
    published file that they are from, its beginning; empty for our own.
    """

    before: str
    after: str
    ask: str = ASK
    sha256: str = ""


_READ = "A few sentences about {} are hidden in a long text about other things. Use nothing but those sentences to answer."
_INSTRUCTION = {
    "qa1": _READ.format("where people go") + " A person is where they went last.",
    "qa2": _READ.format("people, where they go and what they carry")
    + " A thing is where its holder is, or where it was put down last.",
    "qa3": _READ.format("people, where they go and what they carry")
    + " A thing goes wherever its holder goes; you are asked in which room it was before it came to another.",
    "qa4": _READ.format("which room lies on which side of another"),
    "qa5": _READ.format("people, what they carry and what they give to each other"),
}
_EXAMPLES = {
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
            "Mary moved to the bedroom. Mary grabbed the apple. Mary dropped the apple. Mary went to the kitchen.",
            "Where is the apple?",
            "bedroom",
        ),
    ),
    "qa3": (
        (
            "John went to the kitchen. John got the football. John moved to the office. John journeyed to the hallway.",
            "Where was the football before the hallway?",
            "office",
        ),
        (
            "Sandra moved to the bathroom. Sandra picked up the milk. Sandra went to the garden. Sandra left the milk.",
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
            "Fred went to the office. Mary moved to the office. Fred took the milk. Fred gave the milk to Mary.",
            "Who did Fred give the milk to?",
            "Mary",
        ),
        (
            "Bill went to the garden. Jeff went to the garden. Jeff got the apple. Jeff handed the apple to Bill.",
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


def frame(task: str, path: str | None = None) -> Frame:
    """A task's prompt of our own, or by the published file at `path`.

    Raises `InvalidInputError` for a file that is not as published, and for a task that it does not have.
    """
    if path is None:
        examples = "\n\n".join(
            f"<example>\n{facts}\n{ASK}{asked}\nAnswer: {answer}\n</example>"
            for facts, asked, answer in _EXAMPLES[task]
        )
        parts = {
            "instruction": _INSTRUCTION[task],
            "examples": examples,
            "post_prompt": _ANSWER[task],
        }
        return _framed(_TEMPLATE, parts, "")
    template, prompts, sha256 = _published(path)
    if task not in prompts:
        raise InvalidInputError(f"{path} has no prompt for {task}; it has {', '.join(prompts)}")
    return _framed(template, prompts[task], sha256)


def _framed(template: str, parts: Mapping[str, str], sha256: str) -> Frame:
    """A template's text, cut around the context and in front of the question, whose line begins the query."""
    filled = re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), template)
    before, _, rest = filled.partition("{context}")
    middle, _, _ = rest.partition("{question}")
    after, line, ask = middle.rpartition("\n")
    return Frame(before=before.lstrip(), after=after + line, ask=ask, sha256=sha256)


@functools.cache
def _published(path: str) -> tuple[str, dict[str, dict[str, str]], str]:
    """The template, the prompts and the hash of a published file, whose code is read and not run."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        named: dict[str, Any] = (
            {"DEFAULT_PROMPTS": json.loads(text)} if path.endswith(".json") else _literals(text)
        )
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidInputError(
            f"{path} cannot be read as prompts ({error}); {_PUBLISHED}"
        ) from None
    prompts = named.get("DEFAULT_PROMPTS")
    if not isinstance(prompts, dict) or not prompts:
        raise InvalidInputError(f"{path} has no DEFAULT_PROMPTS; {_PUBLISHED}")
    for task, parts in prompts.items():
        if not isinstance(parts, dict) or not all(
            isinstance(parts.get(part), str) for part in _PARTS
        ):
            raise InvalidInputError(
                f"{path}: the prompt of {task} is not of texts {', '.join(_PARTS)}; {_PUBLISHED}"
            )
    template = named.get("DEFAULT_TEMPLATE", _TEMPLATE)
    if not isinstance(template, str) or not re.search(
        r"\{context\}.*\n.*\{question\}", template, re.DOTALL
    ):
        raise InvalidInputError(
            f"{path}: DEFAULT_TEMPLATE {template!r} has no question on a line below the context; {_PUBLISHED}"
        )
    return template, prompts, hashlib.sha256(text.encode()).hexdigest()[:16]


def _literals(code: str) -> dict[str, Any]:
    """The names of a module that are given plain values."""
    found = {}
    for one in ast.parse(code).body:
        if isinstance(one, ast.Assign) and isinstance(one.targets[0], ast.Name):
            try:
                found[one.targets[0].id] = ast.literal_eval(one.value)
            except ValueError:
                continue
    return found
