"""Where words and prose come from: files that a user names, or what is found in the running Python, under a name that says so."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from star_attention.errors import InvalidInputError
from star_attention.tools.prose import prose_lines


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A long text. name: where it is from ("pydoc_data.topics", or a file's name); sha256: of the text, because results on
    different texts are not the same measurement. words: split at white space, as RULER does.
    """

    name: str
    text: str
    sha256: str

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        return tuple(re.sub(r"\s+", " ", self.text).strip().split(" "))

    @functools.cached_property
    def sentences(self) -> tuple[str, ...]:
        return split_sentences(self.text)

    @property
    def described(self) -> dict[str, str]:
        """For a sample's `meta`."""
        return {"prose": self.name, "prose_sha256": self.sha256[:16]}


def split_sentences(text: str) -> tuple[str, ...]:
    """Sentences of a text, by their ends; white space within becomes single spaces."""
    flat = re.sub(r"\s+", " ", text).strip()
    return (
        tuple(re.split(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z\"'(])", flat))
        if flat
        else ()
    )


@functools.cache
def prose(path: str | None = None) -> Prose:
    """The text of a file: `.json` with a field `text`, a folder of `.txt` files (in the order of their names), or plain text.
    Without one, the sentences of the language reference in the standard library, which differ from one Python to the next.

    Raises `InvalidInputError` for a file that is none of these.
    """
    if path is None:
        return _prose("pydoc_data.topics", " ".join(line.strip() for line in prose_lines()))
    place = Path(path)
    try:
        if place.is_dir():
            files = sorted(place.glob("*.txt"))
            if not files:
                raise InvalidInputError(
                    f"{path} holds no .txt files; name a folder of texts, a .json or a text file"
                )
            text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        elif place.suffix == ".json":
            text = json.loads(place.read_text(encoding="utf-8"))["text"]
        else:
            text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read as prose ({error}); give .json with a field text, a folder of .txt, or a text file"
        ) from None
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f"{path} holds no text")
    return _prose(place.name, text)


def _prose(name: str, text: str) -> Prose:
    return Prose(name=name, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Words:
    """English words that keys are made of; release: of the list, whose words differ from one to the next."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    release: str

    @functools.cached_property
    def all(self) -> tuple[str, ...]:
        """All of them once, sorted."""
        return tuple(sorted({*self.adjectives, *self.nouns, *self.verbs}))


PARTS = ("train", "eval")
"""Six in seven words, and the others: what the bundled model is trained on, and what it has not seen."""


def check_part(part: str | None) -> None:
    """Raises `InvalidInputError` for what is none of `PARTS`."""
    if part not in (None, *PARTS):
        raise InvalidInputError(
            f"words {part!r} are unknown; choose one of {', '.join(PARTS)}, or leave it out for all"
        )


@functools.cache
def words(part: str | None = None) -> Words:
    """The word lists that RULER uses (the package wonderwords, of the extra `eval`); of `PARTS` one, or all.

    Raises `InvalidInputError` where it is not installed, and for an unknown part.
    """
    check_part(part)
    if part is not None:
        every = words()
        lists = (
            tuple(word for word in some if _part(word) == part)
            for some in (every.adjectives, every.nouns, every.verbs)
        )
        adjectives, nouns, verbs = lists
        return Words(
            adjectives=adjectives, nouns=nouns, verbs=verbs, release=f"{every.release}, {part}"
        )
    try:
        from wonderwords import random_word
    except ImportError:
        raise InvalidInputError(
            "the generators take their words from the package wonderwords; install star-attention[eval]"
        ) from None
    source = random_word.RandomWord()
    found = {
        name: tuple(source.filter(include_parts_of_speech=[name]))
        for name in ("adjectives", "nouns", "verbs")
    }
    return Words(**found, release=f"wonderwords {version('wonderwords')}")


def _part(word: str) -> str:
    return PARTS[zlib.crc32(word.encode()) % 7 == 3]
