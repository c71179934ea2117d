"""Perplexity: dense attention's is the plain model's, and windows that do not exist are refused."""

from __future__ import annotations

import pytest
import torch

from star_attention.errors import SizeError
from star_attention.evals.runs import perplexity
from star_attention.evals.runs.variants import parse_all
from star_attention.hf.text.tokens import query_ids
from tests.engines import text_model
from tests.evals_runs import VARIANTS, engine, samples


def test_perplexity_is_that_of_the_plain_model() -> None:
    star = engine()
    text = "".join(samples(3)[0].context for _ in range(4))
    windows = perplexity.windows_of(star.tokenizer, text, length=96, count=3)
    assert all(len(window) == 96 and window[0] == star.tokenizer.bos_token_id for window in windows)
    joined = [token for window in windows for token in window[1:]]
    assert joined == query_ids(star.tokenizer, text)[: len(joined)]
    dense, blocks, one_block = perplexity.run(
        star, windows, parse_all("dense,star:16,star:96"), tail=24, batch=2
    )
    with torch.no_grad():
        for window, loss in zip(windows, dense.windows, strict=True):
            logits_SV = text_model()(torch.tensor([window])).logits[0]
            expected = torch.nn.functional.cross_entropy(
                logits_SV[-25:-1], torch.tensor(window[-24:])
            )
            assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert one_block.windows == pytest.approx(dense.windows, abs=1e-4)
    assert blocks.windows != pytest.approx(dense.windows, abs=1e-4)
    assert dense.difference is None
    assert blocks.difference is not None
    assert blocks.difference.value == pytest.approx(blocks.nll.value - dense.nll.value)
    assert (blocks.block_size, blocks.anchor_size) == (16, 16)


def test_windows_without_enough_text_or_context_are_refused() -> None:
    star = engine()
    with pytest.raises(SizeError, match=r"enough for 0 windows of 64 and not for 1"):
        perplexity.windows_of(star.tokenizer, "short", length=64, count=None)
    windows = perplexity.windows_of(
        star.tokenizer, "one two three four five " * 30, length=64, count=1
    )
    with pytest.raises(
        SizeError, match="tail 63 leaves windows of 64 tokens no context; give 1 to 62"
    ):
        perplexity.run(star, windows, VARIANTS, tail=63)
