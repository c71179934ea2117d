"""The shell and Python blocks of documents, as a reader copies them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_SHELL = ("bash", "sh", "console")
_COMMAND = re.compile(r"(?:#|git|make|pip|python|curl|star-attention|torchrun|\w+=|export) ?")


@dataclass(frozen=True)
class Block:
    """A block of a document.

    Attributes:
        document: its path in the repository.
        line: the line that it begins on.
        language: "python" or "shell".
        text: what a reader copies.
    """

    document: str
    line: int
    language: str
    text: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block."""
        commands: list[list[str]] = []
        command = ""
        for line in self.text.replace("\\\n", " ").splitlines():
            command = f"{command}\n{line}" if command else line
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                # A quotation goes on in the next line.
                continue
            commands += [words] if words else []
            command = ""
        assert not command, f"{self} ends inside of a quotation"
        return commands

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """Yield the blocks of a document: fenced, or indented by four spaces and a command."""
    name = str(path.relative_to(ROOT))
    lines, number = path.read_text(encoding="utf-8").split("\n"), 0
    while number < len(lines):
        start, line = number, lines[number]
        number += 1
        if line.startswith("```"):
            while not lines[number].startswith("```"):
                number += 1
            text = "\n".join(lines[start + 1 : number])
            number += 1
            language = line[3:].strip()
            if language == "python":
                yield Block(name, start + 2, "python", text)
            elif language in _SHELL or (not language and _COMMAND.match(text)):
                yield Block(name, start + 2, "shell", text)
        elif line.startswith("    ") and (not start or not lines[start - 1].strip()):
            while lines[number].startswith("    "):
                number += 1
            text = "\n".join(part[4:] for part in lines[start:number])
            if _COMMAND.match(text):
                yield Block(name, start + 1, "shell", text)
