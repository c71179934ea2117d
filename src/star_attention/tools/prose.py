"""Prose that comes with every Python: the sentences of the language reference, `pydoc_data.topics`.

Only whole ASCII sentences are kept. Headings, grammar rules, tables and code are left out; the
sentences keep the identifiers and symbols in them. The text depends on the release of Python.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator

from star_attention.errors import InvalidInputError

SOURCE = "pydoc_data.topics"

_TO_ASCII = str.maketrans(
    {"“": '"', "”": '"', "\u2018": "'", "’": "'", "–": "-", "—": "-", "…": "...", "\xa0": " "}
)
_LEAD_IN = re.compile(r"^(?:[*-] |\d+\. |Note: |(?:Changed|New|Added|Deprecated)[^:]{0,60}: )+")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.) +(?=[A-Z\"'(])")
# Prompts, grammar rules, assignments and other statements, lines under headings and between table
# rows, links.
_NOT_PROSE = re.compile(
    r">>>|::=| == | = |\{|\}|\\|\*\*\*|---|===|~~~|\^\^\^|://|^(?:def|class|import|from|async) "
)


@functools.cache
def prose_lines() -> tuple[str, ...]:
    """Return the distinct sentences, one per line with its newline, topics in alphabetical order.

    Raises:
        InvalidInputError: this Python comes without `pydoc_data`, which some systems ship in a
            separate package.
    """
    try:
        topics: dict[str, str] = importlib.import_module(SOURCE).topics
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            f"the source of the text, {SOURCE} of the standard library, is missing from this"
            " Python; install the full standard library (on Debian and Ubuntu the package"
            " libpython3-stdlib), or use a Python from python.org"
        ) from error
    return tuple(
        dict.fromkeys(
            f"{sentence}\n" for name in sorted(topics) for sentence in _sentences(topics[name])
        )
    )


def _sentences(topic: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", topic):
        unbroken = re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", paragraph)
        joined = _LEAD_IN.sub("", " ".join(unbroken.split()).translate(_TO_ASCII))
        yield from filter(_is_prose, _SENTENCE_END.split(joined))


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        30 <= len(sentence) <= 300
        and sentence.isascii()
        and (sentence[0].isupper() or sentence[0] == '"')
        and sentence[-1] in ".!?"
        and letters >= 0.8 * len(sentence)
        and not _NOT_PROSE.search(sentence)
    )
