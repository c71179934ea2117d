"""Perplexity of the tails of a text given their heads."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from star_attention.engine import StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError, SizeError, quote
from star_attention.evals import stats
from star_attention.evals.runs import run_folder
from star_attention.evals.runs.engines import encode_all, engine_for
from star_attention.evals.runs.predictions import sha256
from star_attention.evals.runs.progress import Progress
from star_attention.evals.runs.runner import versions
from star_attention.evals.runs.variants import Variant, parse
from star_attention.evals.stats import Difference, Mean, Scored
from star_attention.hf.text.tokens import context_ids, query_ids
from star_attention.planning.plan import BlockPlan
from star_attention.tools import machine

FILE = "perplexity.json"


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """One variant on all windows.

    Attributes:
        variant: `Variant.key`.
        windows: Mean negative log-likelihood of each window's tail, in nats per token.
        nll: Their mean with its standard error.
        difference: `nll` minus the first variant's, paired by window; None for the first. Its exp
            is the ratio of the perplexities.
        block_size: Tokens per block, as resolved.
        anchor_size: Tokens of the anchor, as resolved.
        lookback: Blocks before its own that each block saw.
        lookback_layers: The layers that looked back; None for none.
    """

    variant: str
    windows: tuple[float, ...]
    nll: Mean
    difference: Difference | None
    block_size: int
    anchor_size: int
    lookback: int = 0
    lookback_layers: str | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll.value)

    def as_dict(self) -> dict[str, Any]:
        """Return the row of perplexity.json."""
        return asdict(self) | {"perplexity": self.perplexity}


def windows_of(tokenizer: Any, text: str, *, length: int, count: int | None) -> list[list[int]]:
    """Cut a text into windows from its start; a rest that does not fill one is dropped.

    Args:
        tokenizer: The model's. If it starts texts with a BOS token, so does every window.
        text: The whole text.
        length: Tokens of each window.
        count: Number of windows; None takes all.

    Returns:
        Token ids of each window.

    Raises:
        SizeError: If the text is too short for `count` windows, or for one.
    """
    ids = query_ids(tokenizer, text)
    bos = tokenizer.bos_token_id
    prefix = [bos] if bos is not None and context_ids(tokenizer, "a")[:1] == [bos] else []
    step = length - len(prefix)
    available = len(ids) // step if step > 0 else 0
    if available < (count or 1):
        raise SizeError(
            f"the text has {len(ids):,} tokens, enough for {available:,} windows of {length:,} and"
            f" not for {count or 1:,}; give a longer text, fewer windows, or a smaller length"
        )
    return [prefix + ids[i * step : (i + 1) * step] for i in range(count or available)]


def run(
    star: StarLLM,
    windows: Sequence[Sequence[int]],
    variants: Sequence[Variant],
    *,
    tail: int,
    batch: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Perplexity]:
    """Measure the perplexity of the last `tail` tokens of each window given the others.

    The context's last token moves to the tail, as only tokens of phase 2 have logits: exactly
    `tail` tokens are scored, with every variant.

    Args:
        star: A loaded model. The variants replace its method and sizes.
        windows: Token ids, all of one length; the same on all ranks.
        variants: Methods to measure; differences are against the first.
        tail: Tokens to score.
        batch: Windows to encode at once, if they fit in one forward.
        seed: Seed of random anchors.
        progress: Called after every batch.

    Returns:
        One row for each variant; an empty list on other ranks than the first.

    Raises:
        SizeError: If the tail leaves no context.
        ContextLengthError: For windows beyond the model's positions.
        InvalidInputError: For a variant that the model cannot run.
    """
    _check_lengths(star, len(windows[0]), tail)
    # Variants that this model cannot run are refused before the first is measured.
    for variant in variants:
        if variant.second_look:
            raise InvalidInputError(
                f"variant {quote(variant.key)} has a second look, which is taken for a query;"
                " perplexity has none, so leave it out"
            )
        engine_for(star, variant, variant.sizes(len(windows[0])))
    rows: list[Perplexity] = []
    baseline: list[Scored] = []
    for variant in variants:
        losses: list[float] = []
        sizes = (0, 0)
        for plan, loss in _losses(
            star, windows, variant, tail=tail, batch=batch, seed=seed, progress=progress
        ):
            sizes = (plan.block_size, plan.anchor_size)
            losses += [] if loss is None else [loss]
        if not losses:
            # Only rank 0 has logits.
            continue
        scored = [
            Scored(sample=str(index), cell="", context=str(index), score=loss)
            for index, loss in enumerate(losses)
        ]
        rows.append(
            Perplexity(
                variant=variant.key,
                windows=tuple(losses),
                nll=stats.mean(scored),
                difference=stats.paired(scored, baseline) if baseline else None,
                block_size=sizes[0],
                anchor_size=sizes[1],
                lookback=variant.lookback,
                lookback_layers=variant.lookback_layers if variant.lookback else None,
            )
        )
        baseline = baseline or scored
    return rows


def _check_lengths(star: StarLLM, length: int, tail: int) -> None:
    if not 1 <= tail <= length - 2:
        raise SizeError(
            f"tail {tail:,} leaves windows of {length:,} tokens no context; give 1 to"
            f" {length - 2:,}"
        )
    limit = star.runtime.handle.max_positions
    if limit is not None and length > limit:
        raise ContextLengthError(
            f"windows have {length:,} tokens, more than the model's {limit:,} positions; use a"
            " smaller length"
        )


def _losses(
    star: StarLLM,
    windows: Sequence[Sequence[int]],
    variant: Variant,
    *,
    tail: int,
    batch: int,
    seed: int,
    progress: Progress | None,
) -> Iterator[tuple[BlockPlan, float | None]]:
    """Return the block plan of each window, and its loss; None on other ranks than the first."""
    engine = engine_for(star, variant, variant.sizes(len(windows[0])))
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        heads = [list(window[: -tail - 1]) for window in part]
        contexts = encode_all(engine, variant, heads, list(part[0][-tail - 1 : -1]), seed=seed)
        for context, window in zip(contexts, part, strict=True):
            logits_QV = engine.logits(context, list(window[-tail - 1 :]))
            loss = None
            if logits_QV is not None:
                targets_Q = torch.tensor(window[-tail:], device=logits_QV.device)
                loss = torch.nn.functional.cross_entropy(logits_QV[:-1], targets_Q).item()
            yield context.plan, loss
        # Frees their KV before the next batch.
        del contexts, context
        if progress is not None:
            done = min(start + batch, len(windows))
            progress(f"{variant.name}: {done:,} of {len(windows):,} windows")


# ---------------------------------------------------------------- results


def table(rows: Sequence[Perplexity]) -> list[tuple[str, ...]]:
    """Return rows of text, the head first: perplexity, loss, and the ratio to the first variant."""
    lines: list[tuple[str, ...]] = [("", "perplexity", "nll", "ratio", "95 % interval", "")]
    for row in rows:
        error = "" if row.nll.stderr is None else f" ± {row.nll.stderr:.4f}"
        loss = f"{row.nll.value:.4f}{error}"
        name = parse(row.variant).name
        lines.append((name, f"{row.perplexity:.3f}", loss, *_ratio(row.difference)))
    return lines


def _ratio(difference: Difference | None) -> tuple[str, str, str]:
    """Return the ratio of the perplexities, its interval, and the verdict."""
    if difference is None:
        return "", "", ""
    interval = ""
    if difference.low is not None and difference.high is not None:
        interval = f"{math.exp(difference.low):.4f} to {math.exp(difference.high):.4f}"
    return f"{math.exp(difference.value):.4f}", interval, difference.verdict


def check_output(out: Path) -> None:
    """Refuse a folder that cannot be written to, or that already has results."""
    run_folder.check_output(out)
    if (out / FILE).exists():
        raise InvalidInputError(f"{out / FILE} already exists; give another folder with --out")


def write(
    out: Path, star: StarLLM, rows: Sequence[Perplexity], *, text: str, **settings: Any
) -> None:
    """Write perplexity.json.

    Args:
        out: The folder, made if needed.
        star: The engine that was measured.
        rows: Results of `run`.
        text: The text, of which the hash is written.
        settings: Further fields: `file`, `length`, `tail`, `seed`.
    """
    out.mkdir(parents=True, exist_ok=True)
    content = settings | {
        "text_sha256": sha256(text),
        "command": machine.command(),
        "hardware": machine.hardware(star.device),
        "git": machine.git_revision(),
        "versions": versions(),
        "ranks": star.num_ranks,
        "model": star.runtime.identity,
        "rows": [row.as_dict() for row in rows],
    }
    (out / FILE).write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
