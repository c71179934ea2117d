"""Whether context, query and answer fit into a model's positions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from star_attention.errors import ContextLengthError


@dataclass(frozen=True)
class Positions:
    """The positions of a model.

    Attributes:
        limit: how many there are; None for no limit.
        reserve_tokens: tokens after a context that its rotary frequencies are pinned for.
        short_length: most tokens that LongRoPE rotates by its short factors; None without it.
    """

    limit: int | None
    reserve_tokens: int
    short_length: int | None = None

    def check(self, count: int, subject: str, remedy: str) -> None:
        """Raise `ContextLengthError` for more tokens than the model has positions."""
        if self.limit is not None and count > self.limit:
            raise ContextLengthError(
                f"{subject} {count:,} tokens, more than the model's {self.limit:,} positions;"
                f" {remedy}"
            )

    def check_room(
        self,
        context_tokens: int,
        rope_length: int | None,
        prompts: list[list[int]],
        max_new_tokens: int,
    ) -> None:
        """Raise `ContextLengthError` where context, query and answer need too many positions."""
        query_tokens = max(len(prompt) for prompt in prompts)
        longest = context_tokens + query_tokens + max_new_tokens
        subject = f"context ({context_tokens:,}), query and answer ({max_new_tokens:,}) need"
        self.check(
            longest,
            subject,
            f"the query has {query_tokens:,}: lower max_new_tokens, or shorten the query or the"
            " context",
        )
        if rope_length is None:
            return
        if self.short_length is not None and longest <= self.short_length < rope_length:
            warnings.warn(
                f"context, query and answer ({longest:,} tokens) fit the {self.short_length:,}"
                " tokens of the model's short rotary factors, but the context was encoded for"
                f" {rope_length:,} and got the long ones; give encode the query and its settings,"
                " or lower reserve_tokens",
                stacklevel=2,
            )
        if longest > rope_length:
            raise ContextLengthError(
                f"{subject} {longest:,} tokens, but the context's rotary frequencies are pinned to"
                f" {rope_length:,}; the query has {query_tokens:,}: lower max_new_tokens, or encode"
                f" the context with a larger reserve_tokens (now {self.reserve_tokens:,})"
            )
