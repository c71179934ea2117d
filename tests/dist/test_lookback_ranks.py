"""Look-back on several ranks: blocks go to ranks in turn, and nothing in the answers shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.hf.shape import model_shape
from star_attention.planning import traffic
from star_attention.planning.lookback import layer_numbers
from star_attention.planning.plan import BlockPlan
from tests.dist.checks import answer, answer_with, check_model
from tests.dist.pool import Pool
from tests.dist.tp_models import model, on_disk, star_of
from tests.engines import CONTEXT, QUERY, engine, ids, tiny
from tests.families import FAMILIES

VARIED = ["llama", "gemma3", "deepseek_v3", "gemma3n"]
OTHERS = sorted(set(FAMILIES) - set(VARIED))

# Seven blocks, the last one ragged: in stripes of one block, or of two and three.
ONE = dict(block_size=16, anchor_size=5, tokens_per_forward=16)
SEVERAL = dict(block_size=10, anchor_size=10, tokens_per_forward=30)


def check(results: list[dict[str, Any]], name: str, settings: dict[str, Any], **mesh: int) -> None:
    """Compare with the oracle, whose layers are numbers."""
    layers = layer_numbers(settings["lookback_layers"], len(results[0]["lookbacks"]))
    check_model(
        results,
        model(name) if mesh else tiny(name),
        settings["block_size"],
        settings["anchor_size"],
        lookback=settings["lookback"],
        lookback_layers=layers,
        **mesh,
    )


def answer_looking_back(comm: Any, name: str, **settings: Any) -> dict[str, Any]:
    layers = engine(name).runtime.handle.windows
    return answer(comm, name, **settings) | dict(lookbacks=layers)


def answers(pool: Pool, ranks: int, name: str, **settings: Any) -> list[dict[str, Any]]:
    if ranks == 1:
        return [answer_looking_back(SoloComm(), name, **settings)]
    return pool.run(answer_looking_back, ranks, name=name, **settings)


@pytest.mark.parametrize(
    ("ranks", "sizes", "lookback", "lookback_layers"),
    [
        (2, ONE, 1, "all"),
        (3, ONE, 2, "lower"),
        (4, SEVERAL, 5, "all"),
        *(
            pytest.param(ranks, sizes, lookback, layers, marks=pytest.mark.slow)
            for ranks in (1, 2, 3, 4)
            for sizes in (ONE, SEVERAL)
            for lookback, layers in ((1, "upper"), (2, "0+1"), (6, "all"))
        ),
    ],
)
@pytest.mark.parametrize(
    "name", [*VARIED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_every_family_on_ranks_is_the_law(
    pool: Pool, name: str, ranks: int, sizes: Any, lookback: int, lookback_layers: str
) -> None:
    settings = sizes | dict(lookback=lookback, lookback_layers=lookback_layers)
    results = answers(pool, ranks, name, **settings)
    check(results, name, settings)


@pytest.mark.parametrize("source", ["broadcast", "local"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(block_size=40, anchor_size=20, tokens_per_forward=7, lookback=1),
        dict(block_size=24, anchor_size=0, tokens_per_forward=24, lookback=2),
        dict(block_size=128, anchor_size=9, tokens_per_forward=24, lookback=2),
        dict(block_size=16, anchor_size=16, tokens_per_forward=64, lookback=9),
    ],
    ids=["fewer blocks than ranks", "no anchor", "one block", "sees all"],
)
def test_geometries(pool: Pool, settings: dict[str, Any], source: str) -> None:
    settings = settings | dict(lookback_layers="0-1")
    results = answers(pool, 4, "gemma2", anchor_source=source, **settings)
    check(results, "gemma2", settings)
    blocks = -(-CONTEXT // settings["block_size"])
    holders = sum(bool(segments) for segments in results[0]["layout"])
    assert holders == min(4, blocks), "blocks go round before a rank gets a second stripe"


# ------------------------------------------------------------------ formats, files, more text


def encode_and_extend(
    comm: Any, settings: dict[str, Any], path: Path | None, name: str = "llama"
) -> Any:
    """Encode a batch, save one context of it, and extend the other twice."""
    star = engine(name, comm=comm, **settings)
    first, second = star.encode([ids(70), ids(70, seed=3)])
    if path is not None:
        first.save(path)
    longer = star.extend(star.extend(second, ids(5, seed=4)), ids(41, seed=5))
    return [_told(star, context) for context in (first, second, longer)]


def load_and_extend(comm: Any, settings: dict[str, Any], path: Path) -> Any:
    star = engine("llama", comm=comm, **settings)
    loaded = star.load_context(path)
    return [_told(star, context) for context in (loaded, star.extend(loaded, ids(30, seed=6)))]


def _told(star: StarLLM, context: Any) -> Any:
    """Return what a context answers, and its keys and values by token."""
    reply = star.generate(context, ids(QUERY), max_new_tokens=4, return_logits=True)
    tokens = torch.cat([torch.arange(*run) for run in context.kv.segments] or [torch.tensor([])])
    layers = [torch.cat(layer.pair(), -1)[0] for layer in context.kv.layers if not layer.is_empty]
    return reply.token_ids, reply.logits, tokens, layers


def joined(results: list[Any], number: int) -> tuple[Any, Any, list[torch.Tensor]]:
    """Join the ranks' parts of a context's keys and values."""
    parts = [result[number] for result in results]
    order = torch.cat([tokens for *_, tokens, _ in parts]).argsort()
    holders = [layers for *_, tokens, layers in parts if len(tokens)]
    layers = [torch.cat(layer, 1)[:, order] for layer in zip(*holders, strict=True)]
    assert len({str(part[0]) for part in parts}) == 1
    return parts[0][0], parts[0][1], layers


def assert_same(results: list[Any], expected: list[Any], *, rounded: bool) -> None:
    for number in range(len(expected[0])):
        tokens, logits, layers = joined(results, number)
        right_tokens, right_logits, right_layers = joined(expected, number)
        assert tokens == right_tokens
        tolerance = 2e-2 if rounded else 1e-4
        torch.testing.assert_close(logits, right_logits, atol=tolerance, rtol=tolerance)
        for layer, right in zip(layers, right_layers, strict=True):
            difference = (layer - right).abs() > 1e-4 * right.abs().clamp(min=1)
            # A key near the middle between two fp8 numbers may be rounded to either.
            assert difference.float().mean() <= (0.01 if rounded else 0)


@pytest.mark.parametrize(
    "form", [{}, {"kv_dtype": "fp8"}, {"kv_device": "cpu"}, {"anchor_source": "local"}], ids=str
)
@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        (3, dict(block_size=8, tokens_per_forward=16)),
        pytest.param(2, dict(block_size=16, tokens_per_forward=32), marks=pytest.mark.slow),
        pytest.param(4, dict(block_size=24, tokens_per_forward=48), marks=pytest.mark.slow),
    ],
)
def test_batches_formats_files_and_extensions_are_those_of_one_process(
    pool: Pool, tmp_path: Path, ranks: int, sizes: dict[str, Any], form: dict[str, Any]
) -> None:
    settings = sizes | form | dict(anchor_size=6, lookback=3, lookback_layers="upper")
    alone = [encode_and_extend(SoloComm(), settings, None)]
    results = pool.run(encode_and_extend, ranks, settings=settings, path=tmp_path / "book.star")
    rounded = "kv_dtype" in form
    assert_same(results, alone, rounded=rounded)
    arguments: dict[str, Any] = dict(settings=settings, path=tmp_path / "book.star")
    loaded = [load_and_extend(SoloComm(), **arguments)]
    assert_same([loaded[0][:1]], [alone[0][:1]], rounded=rounded)
    assert_same(pool.run(load_and_extend, 2, **arguments), loaded, rounded=rounded)


@pytest.mark.parametrize("block", [8, 16])
def test_windowed_layers_extend_what_their_window_reaches(pool: Pool, block: int) -> None:
    """Windows of 20 tokens end inside a block."""
    settings: dict[str, Any] = dict(block_size=block, tokens_per_forward=16, anchor_size=6)
    # Shards are compared whole; test_windows_ranks.py has those that keep the last window.
    settings |= dict(lookback=5, kv_windows="all")
    alone = [encode_and_extend(SoloComm(), settings, None, "gemma3")]
    results = pool.run(encode_and_extend, 3, settings=settings, path=None, name="gemma3")
    assert_same(results, alone, rounded=False)


def answer_in_mesh(comm: Any, path: Path, **settings: Any) -> dict[str, Any]:
    star = star_of(comm, path, 2, **settings)
    return answer_with(star) | dict(lookbacks=star.runtime.handle.windows)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_ranks_that_share_heads_exchange_their_own(pool: Pool, models: Path, name: str) -> None:
    settings: dict[str, Any] = dict(ONE, lookback=2, lookback_layers="all")
    results = pool.run(answer_in_mesh, 4, path=on_disk(models, name), **settings)
    check(results, name, settings, tensor_parallel=2)


# ------------------------------------------------------------------ what is counted


def count_bytes(comm: Any, name: str, settings: dict[str, Any]) -> Any:
    star = engine(name, comm=comm, **settings)
    context = star.encode(ids(CONTEXT))
    own = star.runtime.handle.layer_shapes
    return context.wire, context.plan, len(own)


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize(
    ("ranks", "source", "sizes", "lookback"),
    [(2, "broadcast", SEVERAL, 1), (3, "local", ONE, 2), (4, "broadcast", ONE, 6)],
)
def test_bytes_are_the_plans(
    pool: Pool, name: str, ranks: int, source: str, sizes: dict[str, Any], lookback: int
) -> None:
    settings = sizes | dict(lookback=lookback, lookback_layers="lower", anchor_source=source)
    counted, plan, _ = pool.run(count_bytes, ranks, name=name, settings=settings)[0]
    shape = model_shape(tiny(name).config, "float32")
    assert counted == traffic.phase1_cp(
        shape, plan, tokens_per_forward=sizes["tokens_per_forward"], anchor_source=source
    )
    assert counted.bytes > 0


def test_blocks_that_nobody_reads_stay_where_they_are() -> None:
    """Each block crosses the wire once per rank that reads it, not once per block that does."""
    sizes: dict[str, Any] = dict(context_tokens=1280, block_size=10, anchor_size=0, lookback=1)
    shape = model_shape(tiny("llama").config, "float32")

    def tokens(**settings: Any) -> float:
        plan = BlockPlan(**sizes, **settings)
        sent = traffic.phase1_cp(shape, plan, tokens_per_forward=10)
        return sent.bytes / shape.kv_bytes_per_token

    assert tokens(ranks=4, stripe_tokens=10) == 127 * 10, "every block but the last"
    stripes = BlockPlan(**sizes, ranks=4, stripe_tokens=80).stripes
    assert stripes is not None
    assert tokens(ranks=4, stripe_tokens=80) == (len(stripes.runs) - 1) * 10, "one of each stripe"
