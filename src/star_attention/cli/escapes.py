"""Escapes in texts that are typed on the command line."""

from __future__ import annotations

import re
import warnings

from star_attention.errors import quote


def unescape(text: str, option: str) -> str:
    r"""Read `\n`, `\t` and `\r` as a shell passes them: two characters. `\\n` stays `\n`.

    Args:
        text: the value of an option.
        option: its name, for a warning where a word may have been meant (`\nabla`).
    """
    if word := re.search(r"(?<!\\)\\[ntr][a-z]+", text):
        warnings.warn(
            f"{option} {quote(text)}: {word[0][:2]} is read as a control character; write"
            f" \\{word[0]} for the backslash",
            stacklevel=2,
        )
    characters = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(
        r"(\\?)\\([ntr])",
        lambda match: "\\" + match[2] if match[1] else characters[match[2]],
        text,
    )
