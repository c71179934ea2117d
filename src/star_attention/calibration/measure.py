"""Measure how likely a model finds planted facts, and the text itself, with different look-back."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from star_attention import StarLLM
from star_attention.calibration.result import Loss, Measured, Variant
from star_attention.calibration.settings import CalibrationSettings
from star_attention.calibration.texts import Probe, Sample
from star_attention.planning.lookback import sink_size
from star_attention.storage.context import EncodedContext

Progress = Callable[[str], None]


def measure(
    star: StarLLM,
    variants: list[Variant],
    samples: list[Sample],
    settings: CalibrationSettings,
    progress: Progress,
) -> Iterator[Measured]:
    """Measure the variants on the same samples, one after another. Collective."""
    for variant in variants:
        engine = _engine(star, variant, settings)
        # Rank 0 has the logits, and all ranks choose the next variants by them.
        losses = star.from_rank_0([_loss(engine, sample) for sample in samples])
        measured = Measured(variant=variant, losses=tuple(losses))
        progress(f"{variant.name}: {measured.mean:.3f} nats")
        yield measured


def _engine(star: StarLLM, variant: Variant, settings: CalibrationSettings) -> StarLLM:
    block = settings.block_size
    return star.with_config(
        method="star",
        block_size=block,
        anchor_size=block if variant.large_anchor else sink_size(block),
        **asdict(variant.settings),
    )


def _loss(star: StarLLM, sample: Sample) -> Loss:
    context = star.encode(sample.context, progress=False)
    return Loss(
        facts=statistics.fmean(_nats(star, context, probe) for probe in sample.facts),
        text=_nats(star, context, sample.text),
    )


def _nats(star: StarLLM, context: EncodedContext, probe: Probe) -> float:
    """Return the mean negative log-likelihood of a probe's last tokens; on rank 0, else 0."""
    logits_QV: Any = star.logits(context, probe.ids)
    if logits_QV is None:
        return 0.0
    first = len(probe.ids) - probe.measured
    logs_QV = logits_QV[first - 1 : -1].log_softmax(-1)
    targets_Q1 = logs_QV.new_tensor(probe.ids[first:]).long()[:, None]
    return float(-logs_QV.gather(-1, targets_Q1).mean())
