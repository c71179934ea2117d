"""A calibration on several ranks: all measure the same variants, and find what one finds."""

from __future__ import annotations

from typing import Any

from star_attention import StarLLM
from star_attention.calibration.run import calibrate
from star_attention.calibration.settings import CalibrationSettings
from star_attention.distributed import SoloComm
from tests.dist.pool import Pool
from tests.engines import bundled_tokenizer, text_model

PROSE = "The hill is tall and the road is long. A letter lies unopened on the desk. " * 200


def calibrated(comm: Any, seed: int) -> Any:
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm)
    settings = CalibrationSettings(length=128, blocks=4, samples=3, seed=seed)
    found, result = calibrate(star, settings, text=PROSE)
    half = result.best_half.variant.settings.lookback_layers
    losses = [round(measured.mean, 3) for measured in (result.paper, *result.halves, result.far)]
    return half, losses, found.settings


def test_ranks_take_the_half_that_rank_0_found_best(pool: Pool) -> None:
    """Forbids ranks without losses that look further back in a half of their own."""
    halves = []
    for seed in range(3):
        alone = calibrated(SoloComm(), seed)
        assert pool.run(calibrated, 2, seed=seed) == [alone] * 2
        halves.append(alone[0])
    assert "1" in halves, "the first half of two layers is what ranks without losses would take"
