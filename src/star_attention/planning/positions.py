"""Whether context, query and answer fit into a model's positions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from star_attention.errors import ContextLengthError
from star_attention.planning.sizes import counted


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """A length up to which a model works for sure, below the limit that its config gives.

    Attributes:
        length: the length in tokens.
        reason: why it may end there, as a sentence about the config.
    """

    length: int
    reason: str

    def warning(self, count: int, subject: str) -> str:
        """Return the warning for a number of tokens beyond it; `subject` says of what."""
        return (
            f"{subject} {count:,} tokens, but the model may be good for {self.length:,} only:"
            f" {self.reason}; keep to the length on its card"
        )


@dataclass(frozen=True)
class Positions:
    """The positions of a model.

    Attributes:
        limit: how many there are; None for no limit.
        reserve_tokens: tokens after a context that its rotary frequencies are pinned for.
        short_length: most tokens that LongRoPE rotates by its short factors; None without it.
        doubt: a length below the limit that may be the real one; None where the limit is sure.
        warned: names of what has been warned of, to say it once.
    """

    limit: int | None
    reserve_tokens: int
    short_length: int | None = None
    doubt: Doubt | None = None
    warned: set[str] = field(default_factory=set)

    def check(self, count: int, subject: str, remedy: str) -> None:
        """Raise `ContextLengthError` for more tokens than the model has positions.

        Warns where it may have fewer than its config says.
        """
        if self.limit is not None and count > self.limit:
            raise ContextLengthError(
                f"{subject} {count:,} tokens, more than the model's {self.limit:,} positions;"
                f" {remedy}"
            )
        if self.doubt is not None and count > self.doubt.length and "doubt" not in self.warned:
            self.warned.add("doubt")
            warnings.warn(self.doubt.warning(count, subject), stacklevel=3)

    def check_room(
        self,
        context_tokens: int,
        rope_length: int | None,
        prompts: list[list[int]],
        max_new_tokens: int,
        turns: int = 0,
    ) -> None:
        """Raise `ContextLengthError` where context, query and answer need too many positions.

        Args:
            context_tokens: tokens of the context.
            rope_length: tokens that its rotary frequencies are pinned to, or None.
            prompts: token ids after it, of each query.
            max_new_tokens: most tokens of an answer.
            turns: earlier turns of a conversation in each prompt.
        """
        query_tokens = max(len(prompt) for prompt in prompts)
        longest = context_tokens + query_tokens + max_new_tokens
        subject = f"context ({context_tokens:,}), query and answer ({max_new_tokens:,}) need"
        query, shorten = f"the query has {query_tokens:,}", "shorten the query or the context"
        if turns:
            query += f" with {counted(turns, 'turn')} before it"
            shorten = "undo turns, or begin another conversation"
        self.check(longest, subject, f"{query}: lower max_new_tokens, or {shorten}")
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
                f" {rope_length:,}; {query}: lower max_new_tokens, or encode"
                f" the context with a larger reserve_tokens (now {self.reserve_tokens:,})"
            )
