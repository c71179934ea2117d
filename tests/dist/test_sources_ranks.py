"""Sources on several ranks are those of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from tests.dist.pool import Pool
from tests.dist.tp_models import model, on_disk, star_of
from tests.engines import CONTEXT, QUERY, bundled_tokenizer, engine, ids, text_model

RUNS: dict[str, Any] = dict(block_size=16, anchor_size=5, tokens_per_forward=16)
TEXT = (
    "Stars come out one after another.\nThe dog is hot. The moon is far from here!\nA line of its"
    " own\nWhat is the secret of the otter?\nThe secret number for petal-signature is 5335582.\n"
    "The sea is calm today.\n"
)
ANSWER: dict[str, Any] = dict(sources=2, max_new_tokens=4, ignore_eos=True)


def rounded(sources: Any) -> Any:
    return None if sources is None else [(s.start, s.stop, round(s.weight, 3)) for s in sources]


def answer(comm: Any, name: str, settings: dict[str, Any]) -> Any:
    star = engine(name, comm=comm, reserve_tokens=64, **settings)
    context = star.encode(ids(CONTEXT))
    reply = star.generate(context, ids(QUERY, seed=2) if star.rank == 0 else None, **ANSWER)
    return rounded(reply.sources)


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(2, RUNS), (3, RUNS | dict(lookback=1)), (2, RUNS | dict(slice_weights=True))],
)
@pytest.mark.parametrize("name", ["llama_mha", "gemma3", "deepseek_v3", "gemma3n", "gpt_oss"])
def test_the_number_of_ranks_is_invisible(
    pool: Pool, name: str, ranks: int, settings: dict[str, Any]
) -> None:
    if "slice_weights" in settings and name != "llama_mha":
        pytest.skip("slices are of weights, whatever the attention")
    alone = {key: value for key, value in settings.items() if key != "slice_weights"}
    right = answer(SoloComm(), name, alone)
    assert right
    assert pool.run(answer, ranks, name=name, settings=settings) == [right] * ranks


def test_a_rank_without_a_block_takes_part(pool: Pool) -> None:
    """Forbids that ranks wait for each other where a single one holds the whole context."""
    sizes = RUNS | dict(block_size=CONTEXT)
    right = answer(SoloComm(), "llama", sizes)
    assert pool.run(answer, 2, name="llama", settings=sizes) == [right] * 2


def session(comm: Any) -> list[Any]:
    """Answer in every way, on all ranks alike; return all sources."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=8, anchor_size=4)
    context = star.encode(TEXT)
    options: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True, sources=2)
    replies = [
        *star.generate(context, ["A", "dog b"], **options),
        *star.generate(context, ["A", "dog b"], num_beams=2, second_look=0.2, **options),
        star.generate(context, "A", second_look=0.2, **options),
        *star.generate(context, "A", do_sample=True, seed=3, num_return_sequences=2, **options),
    ]
    with star.stream(context, "A", stop="zzz", **options) as closed:
        next(closed)
    stream = star.stream(context, "dog b", **options)
    next(stream)
    replies.append(star.generate(context, "A", **options))
    list(stream)
    return [rounded(reply.sources) for reply in [*replies, stream.result, closed.result]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_answers_of_every_kind(pool: Pool, ranks: int) -> None:
    right = session(SoloComm())
    assert right[0] == right[7]
    assert right[0] != right[1]
    assert right[-1] is None
    assert pool.run(session, ranks) == [right] * ranks


def lead(comm: Any) -> Any:
    """Let rank 0 alone ask; the others follow it."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=8, anchor_size=4)
    if star.rank > 0:
        star.follow()
        return None
    context = star.encode(TEXT)
    stream = star.stream(context, "A", **ANSWER)
    next(stream)
    other = star.generate(context, "dog b", **ANSWER)
    list(stream)
    star.close()
    return [rounded(reply.sources) for reply in (stream.result, other)]


def test_ranks_that_follow_read_answers_again(pool: Pool) -> None:
    assert pool.run(lead, 3) == [lead(SoloComm()), None, None]


def answer_in_mesh(comm: Any, path: Path) -> Any:
    star = star_of(comm, path, 2, **RUNS)
    reply = star.generate(star.encode(ids(CONTEXT)), ids(QUERY, seed=2), **ANSWER)
    return rounded(reply.sources)


def test_ranks_that_share_heads_add_up_what_each_sees(pool: Pool, models: Path) -> None:
    star = StarLLM(model("llama"), reserve_tokens=64, **RUNS)
    right = star.generate(star.encode(ids(CONTEXT)), ids(QUERY, seed=2), **ANSWER)
    results = pool.run(answer_in_mesh, 4, path=on_disk(models, "llama"))
    assert results == [rounded(right.sources)] * 4
