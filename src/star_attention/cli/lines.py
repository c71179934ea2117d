"""Lines that users type at a prompt, or that a pipe brings."""

from __future__ import annotations

import contextlib
import sys

from star_attention.errors import TextError


def edit_lines() -> None:
    """Give `input` a history, and keys to edit the line, where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def read_line(prompt: str) -> str | None:
    """Return the next line of stdin, without its end; None at the end of input.

    On a terminal it prompts for it: on stdout, or on stderr if answers go to a file.

    Raises:
        TextError: If it is not UTF-8.
    """
    from star_attention.cli.inputs import check_utf8

    is_typed = sys.stdin.isatty()
    try:
        if not is_typed:
            line = sys.stdin.readline()
            if not line:
                return None
            line = line.rstrip("\r\n")
        elif sys.stdout.isatty():
            line = input(prompt)
        else:
            print(prompt, end="", file=sys.stderr, flush=True)
            line = input()
    except EOFError:
        print(file=sys.stderr)
        return None
    except UnicodeDecodeError:
        raise TextError("the typed query is not UTF-8; check the terminal's locale") from None
    check_utf8("typed query", line)
    return line
