"""`star-attention bench`: speed, with the machine's ceilings and the alternatives."""

from __future__ import annotations

from typing import ClassVar

from star_attention.cli.lazy import Entry, LazyGroup

_COMMANDS = "star_attention.cli.bench.commands"


class Group(LazyGroup):
    """The commands of `bench`."""

    entries: ClassVar = {
        "prefill": Entry(
            "Time to encode a context, compared with dense attention and the official"
            " implementation.",
            f"{_COMMANDS}:prefill",
        ),
        "decode": Entry(
            "Time per token of an answer, compared with reading weights, keys and values once.",
            f"{_COMMANDS}:decode",
        ),
        "questions": Entry(
            "Time for many questions on one text, compared with transformers, which rereads it"
            " each time.",
            f"{_COMMANDS}:questions",
        ),
        "rows": Entry(
            "Tokens per second of many rows at once, compared with reading all they read once a"
            " step.",
            f"{_COMMANDS}:rows",
        ),
        "serve": Entry(
            "Clients of a server over loopback, compared with the same work in Python.",
            f"{_COMMANDS}:serve",
        ),
        "ranks": Entry(
            "Both phases on several ranks, next to rank 0 alone: prefill, decode and questions in"
            " one run.",
            f"{_COMMANDS}:ranks",
        ),
        "kernels": Entry(
            "Attention kernels one by one in the model's shapes, each with the ceiling that bounds"
            " it.",
            f"{_COMMANDS}:kernels",
        ),
        "startup": Entry(
            "Extra time of the first context, query and token, with empty and with filled caches"
            " on disk.",
            f"{_COMMANDS}:startup",
        ),
        "plot": Entry(
            "Draw the pictures of earlier measurements; several files share a picture.",
            f"{_COMMANDS}:plot",
        ),
    }
