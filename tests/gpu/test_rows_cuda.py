"""Decode steps of many rows on a GPU: the kernel, and CUDA graphs against eager forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.attention.attend import Rule
from star_attention.generation.batching.warming import warm_up
from star_attention.generation.conversation import kept_by
from star_attention.hf.cache.rows import RowSet
from star_attention.hf.execution import compiled, row_graphs
from star_attention.hf.execution.rows import RowForwards
from tests.decode_rows import Row, prefilled
from tests.families import FIRST_TOKEN, LAST_TOKEN, build
from tests.rows_oracle import CASES, expected, setup, tables

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
STEPS = 24


@pytest.fixture(autouse=True)
def exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_attention_of_rows(name: str, dtype: torch.dtype) -> None:
    """Within twice the error of a plain implementation in that precision."""
    from star_attention.attention.kernels import triton_rows

    torch.manual_seed(0)
    case = CASES[name]
    tensors = setup(case, dtype, "cuda")
    filled, tile_rows = tables(tensors)
    triton_rows.append(tensors.k_RGD, tensors.v_RGD, tables=filled, layer=1)
    for row, (tail, (k_GCD, v_GCD)) in enumerate(zip(case.tails, tensors.tails, strict=True)):
        assert torch.equal(k_GCD[:, tail], tensors.k_RGD[row])
        assert torch.equal(v_GCD[:, tail], tensors.v_RGD[row])
    rule = Rule(scale=0.2, window=case.window, softcap=case.softcap, dtype=dtype)
    runs = triton_rows.attend_runs(
        tensors.q_RHD,
        case.G,
        tables=filled,
        layer=1,
        rule=rule,
        tile_rows=tile_rows,
        fp8=case.fp8,
    )
    out, lse = runs.merged()
    right = expected(tensors, 0.2)
    # q, k, v and the result are rounded once each.
    unit = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert (out.double().cpu() - right.out_BQHD).norm() <= 2 * unit * right.out_BQHD.norm()
    torch.testing.assert_close(lse.double().cpu(), right.lse_BQH, atol=1e-3, rtol=1e-4)


# ---------------------------------------------------------------------- graphs

TEXTS = (
    "The secret number for otter is 12345.\n"
    + "Rain falls on the hill and the dog sleeps.\n" * 600,
    "The secret number for heron is 67890.\n" + "The sea is blue and the boat is red.\n" * 200,
)
QUESTIONS = (
    "What is the secret number for otter?",
    "Who sleeps?",
    "heron",
    "Is the sea blue? " * 9,
)


def rows_of_two_contexts(star: StarLLM, contexts: list[Any], queries: list[list[int]]) -> list[Row]:
    """Return rows of each context, with the tokens and logits that `generate` gives for them."""
    return [
        row
        for context in contexts
        for query in queries
        for row in prefilled(star, context, query, steps=STEPS)
    ]


def check_coming_and_going(star: StarLLM, rows: list[Row], plain_rows: list[Row]) -> list[bool]:
    """Let rows join one after the other, and each leave after its last token.

    Logits are those of plain forwards. Return if tokens are, for each step of each row.
    """
    forwards = RowForwards(star.runtime.handle, star.runtime.comm)
    steps, row_set, members, same = [0] * len(rows), RowSet([]), [], []
    for time in range(STEPS + 3 * len(rows)):
        now = [n for n, done in enumerate(steps) if 3 * n <= time and done < STEPS]
        if now != members:
            members, row_set = now, RowSet([rows[n].kv for n in now])
        if not now:
            break
        tokens_R = torch.tensor([plain_rows[n].token_ids[steps[n]] for n in now], device="cuda")
        logits_RV = forwards.run(row_set, tokens_R, None).cpu()
        right_RV = torch.stack([plain_rows[n].logits_SV[steps[n] + 1] for n in now]).cpu()
        scale = max(1.0, right_RV.abs().max().item())
        assert (logits_RV - right_RV).abs().max().item() <= 5e-4 * scale
        same += (logits_RV.argmax(-1) == right_RV.argmax(-1)).tolist()
        for n in now:
            steps[n] += 1
    assert steps == [STEPS] * len(rows)
    return same


@pytest.mark.parametrize("settings", [{}, {"kv_dtype": "fp8"}], ids=str)
@pytest.mark.parametrize("mode", [compiled.ROWS, None], ids=str)
def test_graphs_are_as_plain_forwards(
    settings: dict[str, str], mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_graphs, "MODE", mode)
    sizes: dict[str, Any] = dict(dtype="float32", block_size=2048, tokens_per_forward=4096)
    engine, plain = (
        StarLLM.from_pretrained(MODEL, device="cuda", compile=fast, **sizes, **settings)
        for fast in (True, False)
    )
    contexts = [plain.encode(text) for text in TEXTS]
    queries = [engine.tokenizer.encode(text, add_special_tokens=False) for text in QUESTIONS]
    rows = rows_of_two_contexts(engine, contexts, queries)
    assert all(check_coming_and_going(engine, rows, rows_of_two_contexts(plain, contexts, queries)))
    captured = engine.runtime.handle.graphs.of_rows.captured
    assert all(captured.values())
    assert {key[0] for key in captured} == {1, 2, 4, 8}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "gemma3n", "qwen3_moe"])
def test_families(family: str) -> None:
    """Windows, softcap, sinks, layers that share keys."""
    sizes: dict[str, Any] = dict(block_size=24, anchor_size=10, tokens_per_forward=48)
    model = build(family).to("cuda")
    star = StarLLM(model, compile=True, **sizes)
    torch.manual_seed(1)
    contexts, queries = (
        [torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (tokens,)).tolist() for tokens in lengths]
        for lengths in ((101, 53), (4, 7))
    )
    plain = StarLLM(model, compile=False, **sizes)
    encoded = [plain.encode(context) for context in contexts]
    rows, plain_rows = (
        rows_of_two_contexts(any_star, encoded, queries) for any_star in (star, plain)
    )
    check_coming_and_going(star, rows, plain_rows)
    print(family, star.runtime.handle.graphs.of_rows.captured)


def test_a_batch_is_as_generate() -> None:
    """Rows that wait, begin, end and are canceled, greedy and with seeds, beside an encoding."""
    star = StarLLM.from_pretrained(
        MODEL,
        device="cuda",
        compile=True,
        dtype="float32",
        block_size=2048,
        tokens_per_forward=4096,
    )
    contexts = [star.encode(text) for text in TEXTS]
    asked = [
        (context, question, dict(max_new_tokens=tokens, ignore_eos=True) | sampling)
        for context in contexts
        for question in QUESTIONS
        for tokens, sampling in ((9, {}), (70, {}), (20, dict(do_sample=True, seed=3)))
    ]
    alone = [
        star.generate(context, query, **settings).token_ids for context, query, settings in asked
    ]
    with star.batch(max_rows=6) as batch:
        rows = [batch.add(context, query, **settings) for context, query, settings in asked]
        encoding = batch.encode(TEXTS[1])
        for _ in range(5):
            batch.step()
        rows[1].cancel()
        results = [row.result().token_ids for row in rows]
        assert encoding.result().token_ids.tolist() == contexts[1].token_ids.tolist()
    canceled = results.pop(1)
    assert canceled == alone.pop(1)[: len(canceled)]
    assert results == alone
    captured = star.runtime.handle.graphs.of_rows.captured
    assert all(captured.values())
    assert 8 in {key[0] for key in captured}


def test_steps_read_the_queries_of_rows_that_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are those alone, and most rows begin without a forward of their own."""
    star = StarLLM.from_pretrained(
        MODEL,
        device="cuda",
        compile=True,
        dtype="float32",
        block_size=2048,
        tokens_per_forward=4096,
    )
    run, read = RowForwards.run_with_queries, []

    def counted(self: RowForwards, *arguments: Any) -> torch.Tensor | None:
        logits_RV = run(self, *arguments)
        read.append(logits_RV is not None)
        return logits_RV

    monkeypatch.setattr(RowForwards, "run_with_queries", counted)
    contexts = [star.encode(text) for text in TEXTS]
    settings: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True)
    asked = [(context, question) for context in contexts for question in QUESTIONS]
    alone = [star.generate(*pair, **settings).token_ids for pair in asked]
    reply = star.generate(contexts[0], QUESTIONS[0], keep=True, **settings)
    more = star.generate(reply, QUESTIONS[1], **settings).token_ids
    with star.batch() as batch:
        first = batch.add(contexts[0], QUESTIONS[1], max_new_tokens=200, ignore_eos=True)
        batch.step()
        batch.step()
        rows = []
        for pair in asked:
            rows.append(batch.add(*pair, **settings))
            batch.step()
        canceled = batch.add(contexts[1], QUESTIONS[0], **settings)
        canceled.cancel()
        again = batch.add(reply, QUESTIONS[1], **settings)
        assert [row.result().token_ids for row in rows] == alone
        assert again.result().token_ids == more
        tokens = first.result().token_ids
    assert (
        tokens
        == star.generate(contexts[0], QUESTIONS[1], max_new_tokens=200, ignore_eos=True).token_ids
    )
    assert len(read) >= len(asked)
    assert all(read)


def test_a_question_asked_again_captures_nothing() -> None:
    """Forbids seconds before the first token of an answer, where a warm-up has captured before."""
    star = StarLLM.from_pretrained(
        MODEL, device="cuda", compile=True, dtype="float32", block_size=2048
    )
    list(warm_up(star, 4))
    graphs, context, query = star.runtime.handle.graphs, star.encode(TEXTS[0]), list(range(50, 114))
    settings: dict[str, Any] = dict(max_new_tokens=8, ignore_eos=True)
    captured = dict(graphs.captured)
    with star.batch(max_rows=4) as batch:
        first = batch.add(context, query, keep=True, **settings).result()
        again = batch.add(context, query, begun=kept_by(first.conversation), **settings).result()
    assert again.kept_tokens > 0
    assert again.token_ids == first.token_ids
    assert graphs.captured == captured
