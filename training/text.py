"""Text of training documents: the tokenizer, ids piece by piece, and prose.

The prose is docstrings of the standard library; evaluations use its language reference.
"""

from __future__ import annotations

import ast
import functools
import re
import sysconfig
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from star_attention.evals.samples.sources import split_sentences

TOKENIZER = Path(__file__).parents[1] / "models" / "needle-17m"

_PIECE = re.compile(r"\n| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s")
"""Where the bundled tokenizer splits text before anything else (`TOKENIZER`'s tokenizer.json)."""

_SPECIAL = re.compile(r"(<\|q\|>|<\|a\|>)")
_NO_PROSE = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"}


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer."""
    return AutoTokenizer.from_pretrained(folder)


class Encoder:
    """Tokenizes text piece by piece, each distinct piece once.

    The joined ids are those of the joined text, because pieces end where the tokenizer splits.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.bos, self.eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self._tokenizer = tokenizer
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text; the only special tokens are those written in it."""
        ids: list[int] = []
        for part in _SPECIAL.split(text):
            for piece in [part] if _SPECIAL.fullmatch(part) else _PIECE.findall(part):
                known = self._known.get(piece)
                if known is None:
                    known = tuple(self._tokenizer(piece, add_special_tokens=False).input_ids)
                    self._known[piece] = known
                ids += known
        return ids


@functools.cache
def docstring_sentences() -> tuple[str, ...]:
    """Return the sentences of the standard library's docstrings, in the order of its files."""
    sentences: dict[str, None] = {}
    for file in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if _NO_PROSE & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                text := ast.get_docstring(node)
            ):
                for paragraph in text.split("\n\n"):
                    sentences |= dict.fromkeys(filter(_is_prose, split_sentences(paragraph)))
    return tuple(sentences)


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return (
        30 <= len(sentence) <= 300
        and sentence.isascii()
        and sentence[0].isupper()
        and sentence[-1] in ".!?"
        and letters >= 0.9 * len(sentence)
    )
