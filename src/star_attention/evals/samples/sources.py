"""Sources of words and prose: the user's files, or text that comes with Python."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from star_attention.errors import InvalidInputError, quote
from star_attention.files.text import read_text_file
from star_attention.tools.prose import SOURCE, prose_lines

PARTS = ("train", "eval")
"""Parts of the word lists: training words of the bundled model, and words it has not seen."""


@dataclass(frozen=True, kw_only=True)
class Prose:
    """A long text.

    Attributes:
        name: Where it comes from: "pydoc_data.topics", or the name of a file.
        text: The text.
        sha256: Hash of the text. Results on different texts are not the same measurement.
    """

    name: str
    text: str
    sha256: str

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The words, split at white space as in RULER."""
        return tuple(re.sub(r"\s+", " ", self.text).strip().split(" "))

    @functools.cached_property
    def sentences(self) -> tuple[str, ...]:
        """The sentences, without line breaks."""
        return split_sentences(self.text)

    @property
    def meta(self) -> dict[str, str]:
        """Entries of a sample's `meta` that describe the text."""
        return {"prose": self.name, "prose_sha256": self.sha256[:16]}


def split_sentences(text: str) -> tuple[str, ...]:
    """Split a text into sentences, with any run of white space replaced by one space."""
    flat = re.sub(r"\s+", " ", text).strip()
    if not flat:
        return ()
    return tuple(re.split(r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!e\.g\.)(?<!i\.e\.) (?=[A-Z\"'(])", flat))


@functools.cache
def prose(path: str | None = None) -> Prose:
    """Read a text.

    Args:
        path: A .json file with a field `text`, a folder of .txt files (read in the order of their
            names), or a text file. None for the language reference of the standard library, which
            differs between releases of Python.

    Raises:
        InvalidInputError: The path cannot be read as one of these, or its text is empty.
    """
    if path is None:
        return _prose(SOURCE, " ".join(line.strip() for line in prose_lines()))
    file = Path(path)
    try:
        if file.is_dir():
            files = sorted(file.glob("*.txt"))
            if not files:
                raise InvalidInputError(
                    f"{path} contains no .txt files; name a folder of them, a .json or a text file"
                )
            text = "\n".join(map(read_text_file, files))
        elif file.suffix == ".json":
            text = json.loads(read_text_file(file))["text"]
        else:
            text = read_text_file(file)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path} cannot be read as prose ({error}); name a .json file with a field text, a"
            " folder of .txt files, or a text file"
        ) from None
    if not isinstance(text, str) or not text.strip():
        raise InvalidInputError(f"{path} contains no text; name another file")
    return _prose(file.name, text)


def _prose(name: str, text: str) -> Prose:
    return Prose(name=name, text=text, sha256=hashlib.sha256(text.encode()).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Words:
    """English words for keys.

    Attributes:
        adjectives, nouns, verbs: The words.
        release: Package and release that they come from. Word lists differ between releases.
    """

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    release: str

    @functools.cached_property
    def all(self) -> tuple[str, ...]:
        """All words, each once, sorted."""
        return tuple(sorted({*self.adjectives, *self.nouns, *self.verbs}))


@functools.cache
def words(part: str | None = None) -> Words:
    """Return RULER's word lists, from the package wonderwords.

    Args:
        part: "train" for six in seven words, "eval" for the others, None for all.

    Raises:
        InvalidInputError: wonderwords is not installed, or the part is unknown.
    """
    if part is not None:
        if part not in PARTS:
            raise InvalidInputError(
                f"words {quote(part)} is unknown; choose one of {', '.join(PARTS)}, or leave it out"
            )
        every = words()
        adjectives, nouns, verbs = (
            tuple(word for word in words_of_kind if _part(word) == part)
            for words_of_kind in (every.adjectives, every.nouns, every.verbs)
        )
        return Words(
            adjectives=adjectives, nouns=nouns, verbs=verbs, release=f"{every.release}, {part}"
        )
    try:
        from wonderwords import random_word
    except ImportError:
        raise InvalidInputError(
            "the generators need the package wonderwords for their words;"
            " pip install star-attention[eval]"
        ) from None
    from importlib.metadata import version

    source = random_word.RandomWord()
    lists = {
        name: tuple(source.filter(include_parts_of_speech=[name]))
        for name in ("adjectives", "nouns", "verbs")
    }
    return Words(**lists, release=f"wonderwords {version('wonderwords')}")


def _part(word: str) -> str:
    return PARTS[zlib.crc32(word.encode()) % 7 == 3]
