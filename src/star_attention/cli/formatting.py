"""Numbers, tables and summaries for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from star_attention.generation.result import Generation
    from star_attention.storage.context import EncodedContext


def context_summary(context: EncodedContext) -> str:
    """Describe a context: `context 131,072 tok, 8 blocks x 16k, anchor 16k`."""
    from star_attention import methods

    plan = context.plan
    head = f"context {plan.context_tokens:,} tok, "
    if plan.ranks > 1:
        head += f"{plan.ranks} ranks, "
    return head + methods.get(context.method).describe(plan)


def answer_summary(*replies: Generation, shows_reasoning: bool = False) -> str:
    """Describe the speed of answers given at once: `first token 0.4 s, 41 tok/s`.

    The rate counts the tokens of all. Says what ended them early, and what is not printed.
    """
    timings = replies[0].timings
    summary = f"first token {format_seconds(timings.ttft_s)}"
    if timings.second_look_s is not None:
        summary += f" (second look {format_seconds(timings.second_look_s)})"
    rates = [reply.timings.tokens_per_s for reply in replies]
    if any(rate is not None for rate in rates):
        summary += f", {sum(rate or 0.0 for rate in rates):,.0f} tok/s"
    cut = [len(reply.token_ids) for reply in replies if reply.finish_reason == "length"]
    if cut:
        number = f"{len(cut)} " if len(replies) > 1 else ""
        summary += f", {number}ended by --max-new-tokens after {max(cut):,} tokens"
    reasoning = sum(reply.reasoning_tokens for reply in replies if reply.reasoning)
    if reasoning and not shows_reasoning:
        summary += f", {reasoning:,} tokens of reasoning not shown (see --show-reasoning)"
    return summary


def format_seconds(value: float) -> str:
    """Format seconds with one decimal, or two below a tenth."""
    return f"{value:,.1f} s" if value >= 0.1 else f"{value:.2f} s"


def format_bytes(size: int) -> str:
    """Format a number of bytes: `1.2 GiB`."""
    return format_quantity(size, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def format_quantity(size: float, units: tuple[str, ...], step: int) -> str:
    """Format a quantity in the largest unit that gives at least 1; units are a factor `step` apart.

    Example: `3.4 PFLOP`.
    """
    index = 0
    while size >= step and index < len(units) - 1:
        size, index = size / step, index + 1
    return f"{size:,.0f} {units[index]}" if index == 0 else f"{size:,.1f} {units[index]}"


def table(rows: list[tuple[str, ...]]) -> str:
    """Align rows in columns: the first column and remarks to the left, numbers to the right."""
    columns = list(zip(*rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    is_text = [not number or _is_text(column) for number, column in enumerate(columns)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        ]
        lines.append(f"  {cells[0]}  {'   '.join(cells[1:])}".rstrip())
    return "\n".join(lines)


def _is_text(column: tuple[str, ...]) -> bool:
    """Return True if no cell of a column begins with a number."""
    return not any(character.isdigit() for cell in column for character in cell.split(" ")[0])
