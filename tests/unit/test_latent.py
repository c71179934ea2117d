"""MLA in its own space: forwards of few tokens attend to compressed keys, and expand none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from star_attention import StarLLM
from star_attention.attention import blocks
from star_attention.attention.attend import Rule
from star_attention.attention.latent import Expansion, compressed_shard_attention
from star_attention.hf.cache.latent import LatentAttention
from star_attention.hf.shape import model_shape
from star_attention.planning import cost
from star_attention.planning.model_shape import most_compressed
from tests.engines import CONTEXT, QUERY, engine, ids
from tests.families import FAMILIES, build

MLA = ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "longcat_flash"]
MOST = 46
"""Queries of a forward up to which the tiny models' keys stay compressed."""


@pytest.fixture
def absorbed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries of each call that attends to compressed keys, as they happen."""
    calls: list[int] = []
    absorb = Expansion.absorb

    def record(self: Expansion, q_BQHD: torch.Tensor) -> torch.Tensor:
        calls.append(q_BQHD.shape[1])
        return absorb(self, q_BQHD)

    monkeypatch.setattr(Expansion, "absorb", record)
    return calls


def expanding(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> Any:
    """Return what a call returns where models expand all keys."""
    with monkeypatch.context() as patch:
        patch.setattr(LatentAttention, "is_readable", lambda self: False)
        return call()


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("keys", [5, 4099])
def test_absorbed_queries_attend_as_expanded_keys_do(keys: int, window: int | None) -> None:
    """The same state, over keys in one piece and in several, all seen and not."""
    torch.manual_seed(0)
    B, Q, H, N, V, C, R = 2, 3, 4, 5, 6, 13, 7
    weight_HXC = torch.randn(H, N + V, C, dtype=torch.float64)
    c_1KC, r_1KR = torch.randn(1, keys, C).double(), torch.randn(1, keys, R).double()
    q_BQHD = torch.randn(B, Q, H, N + R, dtype=torch.float64)
    rule, offsets = Rule(scale=0.3, window=window), [keys - 1, keys + 2]
    x_1KHX = torch.einsum("bkc,hxc->bkhx", c_1KC, weight_HXC)
    k_1KHD = torch.cat([x_1KHX[..., :N], r_1KR[:, :, None].expand(-1, -1, H, -1)], -1)
    pair = k_1KHD.float(), x_1KHX[..., N:].float()
    right = blocks.shard_attention(q_BQHD.float(), pair, rule=rule, offsets=offsets)

    expansion = Expansion(weight_HXC.float(), N)
    q_BQHE = expansion.absorb(q_BQHD.float())
    compressed = compressed_shard_attention(
        q_BQHE, (c_1KC.float()[:, :, None], r_1KR.float()[:, :, None]), rule=rule, offsets=offsets
    )
    state = expansion.expand(compressed, None)

    torch.testing.assert_close(state.out_BQHD, right.out_BQHD, atol=1e-4, rtol=0)
    torch.testing.assert_close(state.lse_BQH, right.lse_BQH, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings", "answers"),
    [(name, {}, {}) for name in MLA]
    + [
        ("deepseek_v3", {"kv_dtype": "fp8"}, {}),
        ("deepseek_v3", {"method": "streaming_llm"}, {}),
        ("deepseek_v2", {"lookback": 1}, {"num_beams": 3}),
    ],
)
def test_answers_are_those_of_expanded_keys(
    name: str,
    settings: dict[str, Any],
    answers: dict[str, Any],
    absorbed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    star = engine(name, block_size=24, anchor_size=10, **settings)
    context = star.encode(ids(CONTEXT))
    wanted: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True, **answers)
    if not answers:
        wanted["return_logits"] = True

    def answer() -> list[Any]:
        # The second query is shorter, so that it is padded.
        queries = [ids(QUERY, seed=2), ids(QUERY - 3, seed=3)]
        return star.generate(context, queries, **wanted)

    replies = answer()
    layers = len(context.kv.layers)
    assert set(absorbed) <= {1, QUERY, QUERY - 3}
    assert len(absorbed) >= 5 * layers
    absorbed.clear()
    expanded = expanding(monkeypatch, answer)
    assert not absorbed
    for reply, right in zip(replies, expanded, strict=True):
        assert reply.token_ids == right.token_ids
        if not answers:
            torch.testing.assert_close(reply.logits, right.logits, atol=1e-4, rtol=0)


def test_forwards_of_many_tokens_expand_the_keys(absorbed: list[int]) -> None:
    """A query is compressed as far as that is less work than to expand the keys once."""
    assert most_compressed(20, 16, 12) == MOST
    assert most_compressed(512, 128, 128) == 170
    star = engine("deepseek_v3", block_size=24, anchor_size=10)
    context = star.encode(ids(CONTEXT))
    for length, queries in ((MOST, [MOST, 1]), (MOST + 1, [1])):
        absorbed.clear()
        star.generate(context, ids(length, seed=2), max_new_tokens=2, ignore_eos=True)
        assert list(dict.fromkeys(absorbed)) == queries


@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "fp8"}, {"method": "streaming_llm"}])
def test_rows_of_several_contexts_share_compressed_steps(
    settings: dict[str, Any], absorbed: list[int]
) -> None:
    """Answers of a batch are those alone: tails of about one length, and of very different ones."""
    star = engine("deepseek_v3", block_size=24, anchor_size=10, **settings)
    contexts = [star.encode(ids(length)) for length in (CONTEXT, 70)]
    asked = [(contexts[at], ids(QUERY + n, seed=2 + n)) for at, n in ((0, 0), (0, 3), (1, 2))]
    asked.append((contexts[1], ids(150, seed=9)))
    wanted: dict[str, Any] = dict(max_new_tokens=9, ignore_eos=True)
    expected = [star.generate(*pair, **wanted).token_ids for pair in asked]
    absorbed.clear()

    with star.batch() as batch:
        rows = [batch.add(*pair, **wanted) for pair in asked]
        list(batch)

    assert [row.result().token_ids for row in rows] == expected
    # In each of three layers one call a step for all rows.
    assert absorbed.count(1) <= 3 * 12


class _Wrapped(nn.Linear):
    """A linear layer of another kind, as quantization makes them."""


def _wrap(attention: Any) -> None:
    attention.kv_b_proj.__class__ = _Wrapped


def _bias(attention: Any) -> None:
    attention.kv_b_proj.bias = nn.Parameter(torch.zeros(attention.kv_b_proj.out_features))


def _hook(attention: Any) -> None:
    attention.kv_b_proj.register_forward_hook(lambda module, args, output: output)


def _other_order(attention: Any) -> None:
    """Let a family expand values first."""
    expand = attention.expand_kv

    def expand_kv(*pair: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k_BHKD, v_BHKV = expand(*pair)
        return k_BHKD.flip(-1), v_BHKV

    attention.expand_kv = expand_kv


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_wrap, "is a _Wrapped"),
        (_bias, "is not just a matrix of 168 x 20"),
        (_hook, "has hooks"),
        (_other_order, None),
    ],
)
def test_weights_that_are_no_plain_matrix_are_left_to_the_model(
    change: Callable[[Any], None],
    reason: str | None,
    absorbed: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Quantized weights, adapters, hooks, and families that expand in another way."""
    model: Any = build("deepseek_v3")
    star = StarLLM(model, block_size=24, anchor_size=10)
    star.encode(ids(CONTEXT))
    for layer in model.model.layers[1:]:
        change(layer.self_attn)
    if change is _other_order:
        # The probe has seen the others already.
        star = StarLLM(model, block_size=24, anchor_size=10)
    with caplog.at_level(logging.INFO, logger="star_attention"):
        context = star.encode(ids(CONTEXT))
        star.generate(context, ids(QUERY, seed=2), max_new_tokens=2, ignore_eos=True)

    # The first layer is as it was.
    assert absorbed == [QUERY, 1]
    assert reason is None or any(reason in record.message for record in caplog.records)


def test_an_adapter_on_the_weights_is_not_passed_over(absorbed: list[int]) -> None:
    """LoRA on `kv_b_proj`, loaded after the model was probed: its matrix alone would be wrong."""
    peft = pytest.importorskip("peft")
    model: Any = build("deepseek_v3")
    config = peft.LoraConfig(target_modules=["kv_b_proj"], r=3, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    star = StarLLM(adapted, method="dense")
    reply = star.generate(
        star.encode(ids(CONTEXT)), ids(QUERY, seed=2), max_new_tokens=2, return_logits=True
    )
    with torch.no_grad():
        right = adapted(torch.tensor([ids(CONTEXT) + ids(QUERY, seed=2)])).logits[0, -1]
    torch.testing.assert_close(reply.logits[0], right, atol=1e-4, rtol=0)
    assert not absorbed


def test_a_token_takes_the_predicted_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a context four times as long, too: its keys are not expanded again."""
    # Without experts: they run one by one, by operations that are counted in another way.
    star = engine("minicpm3", block_size=128)
    shape = model_shape(FAMILIES["minicpm3"]())

    def operations(tokens: int, answer: Callable[[int], int]) -> int:
        """Return those of three tokens after the second."""
        return answer(tokens + 3) - answer(tokens)

    for length in (100, 400):
        context, query_ids = star.encode(ids(length)), ids(QUERY, seed=2)

        def measured(tokens: int, context: Any = context, query: Any = query_ids) -> int:
            with FlopCounterMode(display=False) as counter:
                star.generate(context, query, max_new_tokens=tokens, ignore_eos=True)
            return int(counter.get_total_flops())

        def predicted(shape: Any, length: int = length) -> int:
            sizes = dict(query_tokens=QUERY)
            return operations(
                2, lambda tokens: cost.phase2(shape, length, **sizes, answer_tokens=tokens).total
            )

        # What is done once for a model is done.
        measured(2)
        assert operations(2, measured) == pytest.approx(predicted(shape), rel=0.02)
        expanded = expanding(monkeypatch, lambda call=measured: operations(2, call))
        assert expanded == pytest.approx(predicted(shape.expanding), rel=0.1)
        assert expanded > 3 * predicted(shape)
