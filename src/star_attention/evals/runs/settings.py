"""The settings of a run: frozen, and recorded in run.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from star_attention.errors import InvalidInputError

FILES = "files"
"""The suite of samples that were read from data sets."""

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
"""Arguments of `generate` that override the model's own generation settings."""

SOURCES = ("files", "format", "essays", "squad", "hotpot", "background", "depths")
"""Options that say where samples come from, or which there are. They may change between sessions,
since the hash of a sample identifies it."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Settings of a run: its samples, and how it answers them.

    Attributes:
        suite: Name of the suite, for the record.
        options: Options of the suite, for the record.
        seed: Seed of the samples, for the record, and of random anchors.
        chat: Send context and query as one user message of the model's chat template.
        chat_template_kwargs: What the template reads beside messages.
        max_new_tokens: Tokens to generate at most, instead of the samples' own numbers.
        limit: Use only the first samples of each task, length and depth.
        skip_too_long: Skip, and list, samples beyond the model's positions.

    Raises:
        InvalidInputError: If `max_new_tokens` is below 1, or there are arguments of a template
            without `chat`.
    """

    suite: str = FILES
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    chat: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int | None = None
    limit: int | None = None
    skip_too_long: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise InvalidInputError(
                f"max_new_tokens {self.max_new_tokens} is not a positive number of tokens"
            )

        if self.chat_template_kwargs and not self.chat:
            raise InvalidInputError(
                "chat_template_kwargs have no effect without chat; add --chat, or leave them out"
            )

    @property
    def own_lengths(self) -> bool:
        """True if lengths were counted by other tokenizers: the context's own count is used."""
        return self.suite == FILES

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings that answers depend on, and that must not change when a run resumes."""
        recorded = {
            "suite": self.suite,
            "options": {name: value for name, value in self.options.items() if name not in SOURCES},
            "seed": self.seed,
            "chat": self.chat,
            "max_new_tokens": self.max_new_tokens,
        }
        # Left out where there are none, as in runs of earlier versions.
        kwargs = dict(self.chat_template_kwargs)
        return recorded | ({"chat_template_kwargs": kwargs} if kwargs else {})

    @property
    def sources(self) -> dict[str, Any]:
        """The options that may change between sessions."""
        return {name: value for name, value in self.options.items() if name in SOURCES}
