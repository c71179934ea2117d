"""Layers with a sliding window on ranks: who owns a part of the last window keeps that alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.storage.header import WINDOWS_VERSION, read_header
from tests.dist.pool import Pool
from tests.engines import CONTEXT, QUERY, engine, ids
from tests.family_configs import WINDOW

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=10, reserve_tokens=64)
ANSWER: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True, return_logits=True)
MORE = [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


def ask(star: StarLLM, context: Any) -> Any:
    reply = star.generate(context, ids(QUERY, seed=2) if star.rank == 0 else None, **ANSWER)
    return reply.token_ids, reply.logits


def held(context: Any, star: StarLLM) -> list[tuple[tuple[int, int], ...]]:
    """Tokens that this rank keeps of each layer with a window, by its tensors."""
    runs = []
    handle = star.runtime.handle
    layers = zip(context.kv.layers, handle.windows, handle.layer_shapes, strict=True)
    for layer, window, shape in layers:
        # Those that read another layer's keys store none.
        if window is not None and shape is not None:
            tokens = 0 if layer.is_empty else layer.stored()[0].shape[2]
            assert tokens == layer.segments.tokens
            runs.append(tuple(layer.segments))
    return runs


def life_of_a_context(comm: Any, name: str, path: Path, settings: dict[str, Any]) -> Any:
    """Encode, answer, extend twice, edit, save and load a context."""
    star = engine(name, comm=comm, **SIZES | settings)
    context = star.encode(ids(CONTEXT - 20))
    answers, kept = [ask(star, context)], held(context, star)
    nbytes = context.nbytes
    for more in (ids(CONTEXT)[CONTEXT - 20 :], MORE):
        context = star.extend(context, more)
        answers.append(ask(star, context))
    context.save(path)
    answers.append(ask(star, star.load_context(path)))
    for start in (CONTEXT + 8, 20, 40):
        edited = star.edit(context, start, start + 2, [21, 22])
        answers.append(ask(star, edited))
    shorter = star.edit(context, CONTEXT, len(context), [])
    answers.append(ask(star, shorter))
    return answers, kept, nbytes


def load(comm: Any, name: str, path: Path) -> Any:
    star = engine(name, comm=comm, **SIZES)
    context = star.load_context(path)
    return ask(star, context), held(context, star)


@pytest.mark.parametrize(
    ("ranks", "name", "settings"),
    [
        (2, "gemma3", {}),
        (3, "mistral", {}),
        (3, "gemma3", dict(kv_dtype="fp8", tokens_per_forward=8)),
        (2, "gpt_oss", dict(anchor_source="local", tokens_per_forward=6)),
        (3, "gemma2", dict(lookback=1)),
        # All that a rank extends is in the window, while others have dropped what it looks back to.
        (3, "gemma3", dict(block_size=8, anchor_size=6, lookback=5)),
        (2, "gemma3n", dict(lookback=2, lookback_layers="lower", anchor_size=16)),
        (2, "gemma3", dict(kv_device="cpu", anchor_size=16)),
    ],
    ids=str,
)
def test_ranks_are_invisible(
    pool: Pool, tmp_path: Path, ranks: int, name: str, settings: dict[str, Any]
) -> None:
    path = tmp_path / "many"
    results = pool.run(life_of_a_context, ranks, name=name, path=path, settings=settings)
    (right, _, whole) = life_of_a_context(SoloComm(), name, tmp_path / "one", settings)
    tolerance = 0.05 if "kv_dtype" in settings else 1e-4
    for (tokens, logits), (right_tokens, right_logits) in zip(results[0][0], right, strict=True):
        torch.testing.assert_close(logits, right_logits, atol=tolerance, rtol=tolerance)
        assert tokens == right_tokens
    assert sum(nbytes for _, _, nbytes in results) == whole
    first = CONTEXT - 20 - WINDOW + 1
    for layer in range(len(results[0][1])):
        runs = [run for _, kept, _ in results for run in kept[layer]]
        assert sum(stop - start for start, stop in runs) == WINDOW - 1
        assert min(start for start, _ in runs) == first
    assert read_header(path)["format_version"] == WINDOWS_VERSION


def test_ranks_without_a_part_of_the_window_keep_nothing_of_it(pool: Pool, tmp_path: Path) -> None:
    """Forbids windows on ranks that nobody asks, and files that only their own ranks can load."""
    path = tmp_path / "saved"
    results = pool.run(life_of_a_context, 3, name="mistral", path=path, settings={})
    assert [kept[0] for _, kept, _ in results] == [(), ((62, 64),), ((64, 81),)]
    assert [nbytes > 0 for _, _, nbytes in results] == [False, True, True]
    right = results[0][0][3]
    for ranks in (1, 2):
        (answer, kept), *_ = pool.run(load, ranks, name="mistral", path=path)
        torch.testing.assert_close(answer[1], right[1], atol=1e-4, rtol=1e-4)
        assert answer[0] == right[0]
        if ranks == 1:
            tokens = CONTEXT + len(MORE)
            assert kept[0] == ((tokens - WINDOW + 1, tokens),)
