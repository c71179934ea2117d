"""A context and an answer as a task of ranks, and their comparison with the mask oracle."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from tests.engines import CONTEXT, QUERY, ids, tiny
from tests.model_oracle import oracle_forward, oracle_generate

STEPS = 6


def answer(
    comm: TorchComm, name: str, tokens_per_forward: int = 48, **settings: Any
) -> dict[str, Any]:
    star = StarLLM(
        tiny(name),
        comm=comm,
        tokens_per_forward=tokens_per_forward,
        reserve_tokens=64,
        **settings,
    )
    return answer_with(star)


def answer_with(star: StarLLM) -> dict[str, Any]:
    """Encode a context, answer a query, and return the result on this rank; logits on rank 0."""
    # Rank 0's arguments count.
    leads = star.rank == 0
    context = star.encode(ids(CONTEXT) if leads else [5])
    reply = star.generate(
        context,
        ids(CONTEXT + QUERY)[CONTEXT:] if leads else None,
        max_new_tokens=STEPS if leads else 1,
        ignore_eos=leads,
        return_logits=True,
    )
    kv = [
        (index, [(segment, layer.slice(*segment)) for segment in layer.segments])
        for index, layer in enumerate(context.kv.layers)
        if not layer.is_empty
    ]
    return dict(
        tokens=reply.token_ids,
        logits=reply.logits,
        kv=kv,
        layout=context.layout,
        rope_length=context.rope_length,
    )


def check_tiny(results: list[dict[str, Any]], name: str, block_size: int, anchor_size: int) -> None:
    check_model(results, tiny(name), block_size, anchor_size)


def check_model(
    results: list[dict[str, Any]],
    model: Any,
    block_size: int,
    anchor_size: int,
    *,
    lookback: int = 0,
    lookback_layers: Collection[int] = (),
    tensor_parallel: int = 1,
) -> None:
    """Compare all ranks' shards, tokens and logits with the mask oracle's."""
    sizes: dict[str, Any] = dict(
        context_len=CONTEXT,
        block_size=block_size,
        anchor_size=anchor_size,
        lookback=lookback,
        lookback_layers=lookback_layers,
        rope_length=results[0]["rope_length"],
    )
    all_ids = torch.tensor([ids(CONTEXT + QUERY)])
    expected_kv = oracle_forward(model, all_ids[:, :CONTEXT], **sizes).kv
    layers = sorted({index for result in results for index, _ in result["kv"]})
    position = {index: number for number, index in enumerate(layers)}
    stored_tokens: list[int] = []
    for rank, result in enumerate(results):
        cp_rank, tp_rank = divmod(rank, tensor_parallel)
        segments = result["layout"][cp_rank]
        assert result["layout"] == results[0]["layout"]
        if tp_rank == 0:
            stored_tokens += [token for start, stop in segments for token in range(start, stop)]
        for index, pairs in result["kv"]:
            # Of a layer with a window, those that hold a part of the last one.
            for (start, stop), pair in pairs:
                for tensor, whole in zip(pair, expected_kv[position[index]], strict=True):
                    expected = whole[:, :, start:stop].chunk(tensor_parallel, 1)[tp_rank]
                    torch.testing.assert_close(tensor, expected, atol=1e-4, rtol=1e-4)
    assert sorted(stored_tokens) == list(range(CONTEXT))
    tokens, logits = oracle_generate(model, all_ids, steps=STEPS, **sizes)
    for result in results:
        assert result["tokens"] == tokens[0].tolist()
    scale = max(1.0, logits.abs().max().item())
    assert (results[0]["logits"] - logits[0]).abs().max().item() <= 1e-4 * scale
    assert all(result["logits"] is None for result in results[1:])
