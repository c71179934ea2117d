"""The engine on a GPU: families against the oracle, the bundled model, bf16, bounded memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from star_attention import StarLLM
from tests.families import FAMILIES, FIRST_TOKEN, LAST_TOKEN, UNUSUAL, build
from tests.model_oracle import oracle_forward, oracle_generate

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
CONTEXT, QUERY, STEPS = 101, 7, 5


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("family", [*FAMILIES, *UNUSUAL])
def test_family_equals_the_mask_oracle(family: str) -> None:
    model = build(family).to("cuda")
    star = StarLLM(
        model,
        block_size=24,
        anchor_size=10,
        tokens_per_forward=48,
        reserve_tokens=64,
        compile=False,
    )
    torch.manual_seed(1)
    ids = torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (1, CONTEXT + QUERY), device="cuda")
    context = star.encode(ids[0, :CONTEXT])
    sizes = dict(
        context_len=CONTEXT, block_size=24, anchor_size=10, rope_length=context.rope_length
    )
    expected = oracle_forward(model, ids[:, :CONTEXT], **sizes)
    layers = [layer for layer in context.kv.layers if not layer.is_empty]
    for layer, (k, v) in zip(layers, expected.kv, strict=True):
        # Of a layer with a window, the last one is kept.
        k, v = (tensor[:, :, CONTEXT - layer.tokens :] for tensor in (k, v))
        scale = max(1.0, k.abs().max().item(), v.abs().max().item())
        assert (layer.pair()[0] - k).abs().max().item() <= 1e-4 * scale
        assert (layer.pair()[1] - v).abs().max().item() <= 1e-4 * scale
    reply = star.generate(
        context, ids[0, CONTEXT:], max_new_tokens=STEPS, return_logits=True, ignore_eos=True
    )
    tokens, logits = oracle_generate(model, ids, steps=STEPS, **sizes)
    scale = max(1.0, logits.abs().max().item())
    assert (reply.logits - logits[0].cpu()).abs().max().item() <= 2e-4 * scale
    assert reply.token_ids == tokens[0].tolist()


def _needles(tokenizer: object, tokens: int, count: int) -> tuple[str, list[tuple[str, str]]]:
    rows = [
        "A letter lies unopened on the desk.\n",
        "Birds gather on the wire in autumn.\n",
        "The tea is hot and the cup is blue.\n",
    ]
    lines = []
    while len(tokenizer("".join(lines)).input_ids) < tokens - 60:  # type: ignore[operator]
        lines += [rows[(len(lines) + i) % 3] for i in range(64)]
    facts = [
        (f"{a}-{b}", str(4100000 + 61873 * i))
        for i, (a, b) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
    ][:count]
    for i, (key, number) in enumerate(facts):
        lines.insert(
            (len(lines) * (2 * i + 1)) // (2 * count), f"The secret number for {key} is {number}.\n"
        )
    return "".join(lines), facts


WORDS = [
    "petal",
    "lyric",
    "autumn",
    "stake",
    "booth",
    "summer",
    "alley",
    "trust",
    "editor",
    "beauty",
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bundled_model_retrieves_at_16k(dtype: str) -> None:
    star = StarLLM.from_pretrained(MODEL, block_size=4096, dtype=dtype)
    text, facts = _needles(star.tokenizer, 16384, 8)
    context = star.encode(text)
    queries = [
        f"<|q|>What is the secret number for {key}?<|a|>The secret number for {key} is"
        for key, _ in facts
    ]
    replies = star.generate(context, queries, max_new_tokens=12)
    correct = [number in reply.text for (_, number), reply in zip(facts, replies, strict=True)]
    print(dtype, len(context), correct, f"encode {context.encode_s:.3f} s", replies[0].timings)
    assert sum(correct) >= 7
    if dtype == "float32":
        single = [star.generate(context, q, max_new_tokens=12).token_ids for q in queries]
        assert single == [reply.token_ids for reply in replies]


def test_bf16_logits_are_within_twice_a_plain_implementation() -> None:
    """Teacher-forced, since greedy answers of two correct bf16 programs diverge after a while."""
    exact = StarLLM.from_pretrained(MODEL, block_size=1024, dtype="float32")
    half = StarLLM.from_pretrained(MODEL, block_size=1024, dtype="bfloat16")
    torch.manual_seed(0)
    ids = torch.randint(5, 4096, (4096 + 64,))
    a = exact.logits(exact.encode(ids[:4096]), ids[4096:])
    b = half.logits(half.encode(ids[:4096]), ids[4096:])
    sizes = dict(context_len=4096, block_size=1024, anchor_size=1024)
    plain = oracle_forward(half.model, ids[None].cuda(), **sizes).logits_BLV[0, 4096:].float()
    oracle = oracle_forward(exact.model, ids[None].cuda(), **sizes).logits_BLV[0, 4096:]
    assert (a.cuda() - oracle).abs().max().item() <= 1e-3
    ours, plain_error = (
        (b.cuda() - oracle).norm() / oracle.norm(),
        (plain - oracle).norm() / oracle.norm(),
    )
    print(f"relative error bf16: ours {ours:.4f}, plain {plain_error:.4f}")
    assert ours <= 2 * plain_error


def test_phase_1_memory_depends_on_the_forward_not_on_the_context() -> None:
    star = StarLLM.from_pretrained(
        MODEL, block_size=2048, dtype="bfloat16", tokens_per_forward=4096
    )
    # Allocates the workspaces of the libraries.
    star.encode(torch.randint(5, 4096, (8192,)))
    weights = torch.cuda.memory_allocated()
    extra = {}
    for tokens in (8192, 16384, 32768, 65536):
        ids = torch.randint(5, 4096, (tokens,))
        context = star.encode(ids)
        extra[tokens] = context.peak_bytes - weights - context.nbytes
        del context
    print("bytes beyond weights and KV:", extra)
    assert max(extra.values()) <= 1.1 * extra[8192]


@pytest.mark.slow
def test_llama_8b_shapes_at_64k() -> None:
    """Random weights of Llama-3.1-8B's shapes: star against dense, bounded memory, one answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = None
    weights = torch.cuda.memory_allocated()
    ids = torch.randint(5, 128000, (65536,))
    for method, block in (("star", "16k"), ("star", "8k"), ("dense", None)):
        star = StarLLM(model, block_size=block, method=method)
        star.encode(ids[:32768])
        context = star.encode(ids)
        beyond = (context.peak_bytes - weights - context.nbytes) / 2**30
        reply = star.generate(context, ids[:64], max_new_tokens=32)
        print(
            f"64K {method} block {context.plan.block_size}: encode {context.encode_s:.2f} s,"
            f" beyond weights and KV {beyond:.2f} GiB, first token {reply.timings.ttft_s:.3f} s,"
            f" {reply.timings.tokens_per_s:.1f} tok/s"
        )
        assert beyond < 8
        del context
