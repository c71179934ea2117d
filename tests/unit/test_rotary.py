"""Rotary embeddings left to our kernels, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table
from transformers.models.cohere import modeling_cohere
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from star_attention.attention.kernels.row_tables import RowTables
from star_attention.attention.rotation import HeadNorms, Rotation
from star_attention.hf.execution import compiled, graphs, hook, rotary, sums
from tests.answer_oracle import Case, setup, tables
from tests.compiling import fresh_code
from tests.engines import engine, ids
from tests.recorders import few_runs, with_graphs

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("Triton's kernels do not run in its interpreter here", allow_module_level=True)

from star_attention.attention.kernels import triton_answer, triton_rows  # noqa: E402

H, G, D = 4, 2, 48
PLAIN, ROTARY = (
    torch.ops.star_attention.layer.default,
    torch.ops.star_attention.rotary_layer.default,
)


def rotation_of(
    rows: int, queries: int, angles: int, *, pairs: bool, normed: bool = False
) -> Rotation:
    cos, sin = torch.randn(2, rows, queries, angles)
    query, key = torch.randn(2, D)
    norms = HeadNorms(query=query, key=key, offset=1.0, eps=1e-3) if normed else None
    return Rotation(cos_RQE=cos, sin_RQE=sin, pairs=pairs, norms=norms)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("angles", "pairs"), [(D, False), (D // 2, False), (D, True)])
@pytest.mark.parametrize("rows", [1, 3])
def test_new_tokens_of_one_context(rows: int, angles: int, pairs: bool, normed: bool) -> None:
    """Queries and keys are rotated; keys and values join the tails, nothing else changes there."""
    torch.manual_seed(0)
    case = Case(R=rows, Q=2, H=H, G=G, D=D, L=20, T=7, padding=(0,) * rows)
    tensors = setup(case, torch.float32, "cpu")
    kv_tables, _addressed = tables(tensors)
    before = tensors.tail_k_RGCD.clone(), tensors.tail_v_RGCD.clone()
    # One row's angles may stand for all.
    rotation = rotation_of(1 if angles == D else rows, 2, angles, pairs=pairs, normed=normed)
    q_RQHD = tensors.q_RQHD.transpose(1, 2).contiguous().transpose(1, 2)
    k_RQGD, v_RQGD = tensors.k_RGQD.transpose(1, 2), tensors.v_RGQD.transpose(1, 2)
    tails = triton_answer.tails_of(kv_tables, 1)
    out = tails.store(q_RQHD, k_RQGD, v_RQGD, rotation)
    expected_RQHD, keys_RQGD = rotation.both(q_RQHD, k_RQGD)
    torch.testing.assert_close(out, expected_RQHD)
    new = slice(case.T, case.T + 2)
    before[0][:, :, new] = keys_RQGD.transpose(1, 2)
    before[1][:, :, new] = tensors.v_RGQD
    torch.testing.assert_close(tensors.tail_k_RGCD, before[0])
    assert torch.equal(tensors.tail_v_RGCD, before[1])


def test_new_tokens_of_rows_with_tails_of_their_own() -> None:
    torch.manual_seed(0)
    R, capacities, lengths = 3, [9, 4, 0], [8, 1, 0]
    tails = [torch.zeros(2, G, capacity, D).half() for capacity in capacities]
    filled = RowTables.zeros(2, R, 1, "cpu")
    filled.tails[1] = torch.tensor([[k.data_ptr(), v.data_ptr()] for k, v in tails])
    filled.rows[:, 0], filled.rows[:, 1] = torch.tensor(lengths), torch.tensor(capacities)
    rotation = rotation_of(R, 1, D, pairs=False)
    q, k, v = (torch.randn(R, 1, heads, D).half() for heads in (H, G, G))
    out = triton_rows.tails_of(filled, 1).store(q, k, v, rotation)
    torch.testing.assert_close(out, rotation.rotate(q), atol=1e-3, rtol=1e-3)
    rotated = rotation.rotate(k)
    for row, (tail, length) in enumerate(zip(tails, lengths, strict=True)):
        for stored, new in zip(tail, (rotated, v), strict=True):
            expected = torch.zeros_like(stored)
            # The last row is unused, without room.
            expected[:, length : length + 1] = new[row, 0][:, None][:, : stored.shape[1]]
            torch.testing.assert_close(stored, expected, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------ recognizing


def traced(function: Callable[..., Any], rows: int, *, angles: int = D) -> torch.fx.GraphModule:
    """Return the graph of a layer for one token of each row; rows vary if they are several."""
    shapes = [(rows, 1, heads * D) for heads in (H, G, G)] + 2 * [(rows, 1, angles)]
    inputs = [torch.randn(shape).half() for shape in shapes]
    made: list[torch.fx.GraphModule] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        made.append(module)
        return module.forward

    def layer(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Tensor:
        q, k, v = (t.view(len(q), 1, -1, D).transpose(1, 2) for t in (q, k, v))
        q, k = function(q, k, cos, sin, norm)
        return hook._layer_op(q, k, v, D, 0.25, None, None, None)

    # Not what it has kept of other functions.
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table())
    compiled_layer = torch.compile(layer, fullgraph=True, backend=backend)
    if rows > 1:
        for each in inputs:
            torch._dynamo.mark_dynamic(each, 0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="outside of its forward"):
        compiled_layer(*inputs, torch.randn(D).half())
    return made[0]


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).half()


def _llama(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)


def _normed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return _llama(_norm(q, norm), _norm(k, norm), cos, sin, norm)


def _normed_before_transposing(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    q, k = (_norm(t.transpose(1, 2), norm).transpose(1, 2) for t in (q, k))
    return _llama(q, k, cos, sin, norm)


def _keys_normed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return _llama(q, _norm(k, norm), cos, sin, norm)


def _gpt_oss(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return modeling_gpt_oss.apply_rotary_pos_emb(q, k, cos, sin)


def _cohere(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return modeling_cohere.apply_rotary_pos_emb(q, k, cos, sin)


def _other_direction(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return _llama(q, k, cos, -sin, norm)


def _partial(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    part = D // 2
    rotated = _llama(q[..., :part], k[..., :part], cos[..., :part], sin[..., :part], norm)
    return tuple(torch.cat([x, t[..., part:]], -1) for x, t in zip(rotated, (q, k), strict=True))


def _query_alone(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return _llama(q, k, cos, sin, norm)[0], k


def _other_angles_for_keys(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    return _llama(q, k, cos, sin, norm)[0], _llama(q, k, sin, cos, norm)[1]


def _scaled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm: Tensor) -> Any:
    q, k = _llama(q, k, cos, sin, norm)
    return 2 * q, k


@pytest.mark.parametrize(
    ("function", "angles", "pairs"),
    [
        (_llama, D, False),
        (_normed, D, False),
        (_normed_before_transposing, D, False),
        (_keys_normed, D, False),
        (_gpt_oss, D // 2, False),
        (_cohere, D, True),
    ],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_rotary_embeddings_of_families(
    function: Callable[..., Any], angles: int, pairs: bool, rows: int
) -> None:
    module = traced(function, rows, angles=angles)
    rotary.leave_to_kernels(module.graph)
    module.graph.lint()
    (node,) = module.graph.find_nodes(op="call_function", target=ROTARY)
    q, k, v, _, cos, sin, found, norms, numbers, *rule = node.args
    assert found == pairs
    normed = function in (_normed, _normed_before_transposing)
    assert [norm.op for norm in norms] == ["placeholder"] * (2 * normed)
    assert numbers == ([0.0, 1e-6] if normed else [])
    means = module.graph.find_nodes(op="call_function", target=torch.ops.aten.mean.dim)
    assert len(means) == (function is _keys_normed)
    assert rule == [0.25, None, None, None]
    assert cos.op == sin.op == "placeholder"
    assert cos < sin
    assert [t.meta["val"].shape[1:] for t in (q, k, v)] == [(H, 1, D), (G, 1, D), (G, 1, D)]
    # All of the rotary embeddings is gone.
    assert not module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert not module.graph.find_nodes(op="call_function", target=PLAIN)


def test_norms_stay_where_heads_of_all_ranks_are_gathered() -> None:
    module = traced(_normed, 1)
    graph = module.graph
    first = next(iter(graph.nodes))
    with graph.inserting_after(first):
        graph.call_function(sums.OPERATIONS[0], (first, 0, "cp"))
    rotary.leave_to_kernels(graph)
    (node,) = graph.find_nodes(op="call_function", target=ROTARY)
    assert node.args[7:9] == ([], [])


@pytest.mark.parametrize(
    "function", [_other_direction, _partial, _query_alone, _other_angles_for_keys, _scaled]
)
def test_what_is_not_recognized_stays(function: Callable[..., Any]) -> None:
    module = traced(function, 1)
    before = list(module.graph.nodes)
    rotary.leave_to_kernels(module.graph)
    assert list(module.graph.nodes) == before


@pytest.mark.parametrize("function", [_llama, _gpt_oss, _cohere])
def test_rotating_as_models_do(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    angles = D // 2 if function is _gpt_oss else D
    rotation = rotation_of(2, 3, angles, pairs=function is _cohere)
    q, k = torch.randn(2, H, 3, D), torch.randn(2, G, 3, D)
    expected = function(q, k, rotation.cos_RQE, rotation.sin_RQE, q)
    for x, right in zip((q, k), expected, strict=True):
        torch.testing.assert_close(rotation.rotate(x.transpose(1, 2)).transpose(1, 2), right)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3", "gemma3"])
def test_steps_of_an_engine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers of one row and of several, in the stand-in for a CUDA graph."""
    few_runs(monkeypatch)
    monkeypatch.setattr(graphs, "BUCKETS", (1, 4, 8))
    monkeypatch.setattr(compiled, "triton_works", lambda device: True)
    found: list[tuple[int, ...]] = []
    leave = rotary.leave_to_kernels

    def counted(graph: torch.fx.Graph) -> None:
        if graph.find_nodes(op="call_function", target=PLAIN):
            leave(graph)
            nodes = graph.find_nodes(op="call_function", target=ROTARY)
            found.append((len(nodes), *(len(node.args[7]) for node in nodes)))

    monkeypatch.setattr(rotary, "leave_to_kernels", counted)
    torch._dynamo.reset()
    replies = []
    with fresh_code():
        for compiling in (True, False):
            star = engine(
                name, block_size=24, anchor_size=10, tokens_per_forward=48, compile=compiling
            )
            if compiling:
                with_graphs(star)
            context = star.encode(ids(101))
            length: dict[str, Any] = dict(max_new_tokens=3, ignore_eos=True, return_logits=True)
            replies.append(star.generate(context, ids(5), **length))
            replies += star.generate(context, [ids(3), ids(2, seed=4)], **length)
    torch._dynamo.reset()
    assert set(found) == {(1, 2 if name in ("qwen3", "gemma3") else 0)}
    for mine, plain in zip(replies[:3], replies[3:], strict=True):
        assert mine.token_ids == plain.token_ids
        torch.testing.assert_close(mine.logits, plain.logits, atol=1e-4, rtol=1e-4)
