"""Models whose rotary frequencies depend on the length are evaluated as they are generated with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from star_attention import StarLLM
from star_attention.evals.runs import perplexity
from star_attention.evals.runs.variants import parse_all
from star_attention.evals.samples.sample import Sample
from tests.engines import bundled_tokenizer
from tests.evals_runs import lines, run, samples
from tests.families import build

DENSE = parse_all("dense")


def longrope(original: int) -> StarLLM:
    """Long factors from `original` tokens on, far above what `reserve_tokens` adds to a sample."""
    tokenizer = bundled_tokenizer()
    model = build(
        "phi3_longrope", vocab_size=len(tokenizer), original_max_position_embeddings=original
    )
    return StarLLM(model, tokenizer)


def plain_answer(star: StarLLM, sample: Sample) -> list[int]:
    """What transformers' own `generate` answers."""
    text = sample.context + sample.query + sample.answer_prefix
    ids = star.tokenizer(text, return_tensors="pt").input_ids
    out = star.model.generate(ids, max_new_tokens=sample.max_new_tokens, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def tokens_of(star: StarLLM, text: str) -> int:
    return len(star.tokenizer(text).input_ids)


def test_short_samples_get_the_short_factors(tmp_path: Path) -> None:
    """Forbids the long ones, because of room that no sample needs, and their warning."""
    (sample,) = samples(1)
    sample = replace(sample, max_new_tokens=8)
    star = longrope(400)
    run(star, [sample], DENSE, tmp_path)
    expected = star.tokenizer.decode(plain_answer(star, sample), skip_special_tokens=True)
    assert lines(tmp_path)[0]["prediction"] == expected
    # The factors make a difference.
    assert plain_answer(longrope(100), sample) != plain_answer(star, sample)


def test_the_longest_sample_on_a_context_decides(tmp_path: Path, monkeypatch: Any) -> None:
    """Answered or not, so that a run that resumes encodes as before."""
    lengths = []
    encode = StarLLM.encode

    def recorded(self: StarLLM, *arguments: Any, **options: Any) -> Any:
        context = encode(self, *arguments, **options)
        lengths.append(context.rope_length)
        return context

    monkeypatch.setattr(StarLLM, "encode", recorded)
    short, long = samples(2, sharing=2)
    long = replace(long, max_new_tokens=20)
    star = longrope(400)
    needed = tokens_of(star, long.context + long.query + long.answer_prefix) + 20
    for original, is_short in ((needed, True), (needed - 1, False)):
        lengths.clear()
        star = longrope(original)
        folder = tmp_path / str(original)
        with torch.no_grad():
            run(star, [long], DENSE, folder)
            run(star, [long, replace(short, max_new_tokens=20)], DENSE, folder)
        assert [length == original for length in lengths] == [is_short] * 2


def test_windows_within_the_original_length_get_the_short_factors() -> None:
    star = longrope(96)
    text = "".join(samples(3)[0].context for _ in range(4))
    windows = perplexity.windows_of(star.tokenizer, text, length=96, count=3)
    (dense,) = perplexity.run(star, windows, DENSE, tail=24, batch=2)
    with torch.no_grad():
        for window, loss in zip(windows, dense.windows, strict=True):
            logits_SV = star.model(torch.tensor([window])).logits[0]
            expected = torch.nn.functional.cross_entropy(
                logits_SV[-25:-1], torch.tensor(window[-24:])
            )
            torch.testing.assert_close(torch.tensor(loss), expected, atol=1e-4, rtol=1e-4)
