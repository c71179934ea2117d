"""A second look on several ranks: the same tokens are chosen, and the answers are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.errors import InvalidInputError
from star_attention.storage.kv import ContextKV
from tests.dist.pool import Pool
from tests.dist.tp_models import model, on_disk, star_of
from tests.engines import CONTEXT, QUERY, bundled_tokenizer, engine, ids, text_model
from tests.families import FAMILIES
from tests.spelling import CONTEXT as TEXT

# Full attention; windows; MLA; layers that read other layers' keys; sinks.
VARIED = ["llama", "gemma3", "deepseek_v3", "gemma3n", "gpt_oss"]
OTHERS = sorted(set(FAMILIES) - set(VARIED))
# Seven blocks, the last one ragged: in runs, and in stripes that look back. Rank 3 of 4 has one.
RUNS: dict[str, Any] = dict(block_size=16, anchor_size=5, tokens_per_forward=16, kv_windows="all")
STRIPES: dict[str, Any] = RUNS | dict(lookback=1, lookback_layers="lower")
# Fewer blocks than ranks.
IDLE: dict[str, Any] = dict(block_size=40, anchor_size=9, kv_windows="all")
LOOK: dict[str, Any] = dict(second_look=0.3, max_new_tokens=4, ignore_eos=True, return_logits=True)


def answer(comm: Any, name: str, settings: dict[str, Any], look: dict[str, Any]) -> Any:
    star = engine(name, comm=comm, reserve_tokens=64, **settings)
    context = star.encode(ids(CONTEXT))
    reply = star.generate(context, ids(QUERY, seed=2) if star.rank == 0 else None, **look)
    return reply.token_ids, reply.logits


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, RUNS),
        (3, STRIPES),
        pytest.param(3, RUNS, marks=pytest.mark.slow),
        pytest.param(4, STRIPES | dict(kv_dtype="fp8"), marks=pytest.mark.slow),
        pytest.param(5, IDLE, marks=pytest.mark.slow, id="idle"),
    ],
)
@pytest.mark.parametrize(
    "name", [*VARIED, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_the_number_of_ranks_is_invisible(
    pool: Pool, name: str, ranks: int, settings: dict[str, Any]
) -> None:
    arguments: dict[str, Any] = dict(name=name, settings=settings, look=LOOK)
    tokens, logits = answer(SoloComm(), **arguments)
    results = pool.run(answer, ranks, **arguments)
    # A key on the edge between two steps of fp8 may fall to either side.
    tolerance = 1e-1 if "kv_dtype" in settings else 1e-4
    torch.testing.assert_close(results[0][1], logits, atol=tolerance, rtol=tolerance)
    if "kv_dtype" not in settings:
        assert [result[0] for result in results] == [tokens] * ranks


def test_weights_in_slices_answer_over_the_copy(pool: Pool) -> None:
    arguments: dict[str, Any] = dict(name="llama_mha", look=LOOK)
    tokens, logits = answer(SoloComm(), settings=RUNS, **arguments)
    results = pool.run(answer, 3, settings=RUNS | dict(slice_weights=True), **arguments)
    assert [result[0] for result in results] == [tokens] * 3
    torch.testing.assert_close(results[0][1], logits, atol=1e-4, rtol=1e-4)


def session(comm: Any) -> list[Any]:
    """Answer in every way, on all ranks alike; return what came back."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=8, anchor_size=4)
    look: dict[str, Any] = dict(second_look=0.2, max_new_tokens=6, ignore_eos=True)
    context = star.extend(star.encode(TEXT), " The dog is hot.")
    seen: list[Any] = [reply.token_ids for reply in star.generate(context, ["A", "dog b"], **look)]
    seen += [
        reply.token_ids for reply in star.generate(context, ["A", "dog b"], num_beams=3, **look)
    ]
    sampled = dict(do_sample=True, seed=3, num_return_sequences=2)
    seen += [reply.token_ids for reply in star.generate(context, "A", **look, **sampled)]
    stream = star.stream(context, "dog b", **look)
    pieces = [next(stream)]
    other = star.stream(context, "A", **look)
    pieces += [next(other), *stream]
    seen += [pieces, other.result.text if not [*other] else "", stream.result.token_ids]
    try:
        star.with_config(method="ring").generate(
            star.with_config(method="ring").encode(TEXT), "A", **look
        )
    except InvalidInputError as error:
        seen.append(str(error))
    seen.append(star.generate(context, "A", **look | dict(second_look=0)).token_ids)
    assert stream.result.timings.second_look_s is not None
    return seen


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_answers_of_every_kind(pool: Pool, ranks: int) -> None:
    right = session(SoloComm())
    assert right[0] != right[-1], "the look changes an answer"
    assert pool.run(session, ranks) == [right] * ranks


def lead(comm: Any) -> Any:
    """Let rank 0 alone ask; the others follow it."""
    star = engine("llama", comm=comm, **RUNS)
    if star.rank > 0:
        star.follow()
        return None
    context = star.encode(ids(CONTEXT))
    replies = [
        star.generate(context, [ids(QUERY, seed=2), ids(QUERY, seed=4)], **LOOK | more)
        for more in ({}, dict(num_beams=2, return_logits=False))
    ]
    star.close()
    return [reply.token_ids for answers in replies for reply in answers]


def test_ranks_that_follow_look_too(pool: Pool) -> None:
    assert pool.run(lead, 3) == [lead(SoloComm()), None, None]


def answer_in_mesh(comm: Any, path: Path) -> Any:
    star = star_of(comm, path, 2, **RUNS)
    reply = star.generate(star.encode(ids(CONTEXT)), ids(QUERY, seed=2), **LOOK)
    return reply.token_ids, reply.logits


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_ranks_that_share_heads_add_up_what_each_sees(pool: Pool, models: Path, name: str) -> None:
    """Forbids a choice by the attention of a rank's own heads."""
    star = StarLLM(model(name), reserve_tokens=64, **RUNS)
    right = star.generate(star.encode(ids(CONTEXT)), ids(QUERY, seed=2), **LOOK)
    results = pool.run(answer_in_mesh, 4, path=on_disk(models, name))
    assert [tokens for tokens, _ in results] == [right.token_ids] * 4
    torch.testing.assert_close(results[0][1], right.logits, atol=1e-4, rtol=1e-4)


def answer_without_memory(comm: Any) -> Any:
    """Ask where rank 1 has no room for its copy, and then where all have."""
    star = engine("llama", comm=comm, **RUNS)
    context = star.encode(ids(CONTEXT))
    copied, messages = ContextKV.copied, []
    if comm.rank == 1:

        def fail(kv: ContextKV, segments: Any, runs: Any) -> ContextKV:
            raise torch.OutOfMemoryError("no room")

        ContextKV.copied = fail  # type: ignore[method-assign]
    try:
        star.generate(context, ids(QUERY, seed=2), **LOOK)
    except MemoryError as error:
        messages.append(str(error))
    except Exception as error:
        messages.append(f"{type(error).__name__}: {error}")
    finally:
        ContextKV.copied = copied  # type: ignore[method-assign]
    return messages, star.generate(context, ids(QUERY, seed=2), **LOOK).token_ids


def test_a_rank_without_room_says_so(pool: Pool) -> None:
    results = pool.run(answer_without_memory, 2)
    assert all(messages and "second_look" in messages[0] for messages, _ in results), results
    right = answer(SoloComm(), "llama", RUNS, LOOK)[0]
    assert [tokens for _, tokens in results] == [right] * 2
