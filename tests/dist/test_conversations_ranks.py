"""Conversations on several ranks are those of one, and every rank keeps its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.errors import ContextSaveError
from tests.dist.pool import Pool
from tests.dist.tp_models import model, on_disk, star_of
from tests.engines import CONTEXT, QUERY, bundled_tokenizer, engine, ids, text_model

RUNS: dict[str, Any] = dict(block_size=16, anchor_size=5, reserve_tokens=64)
ANSWER: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True)
TEXT = "The tea is hot.\nThe hill is tall and the road is long.\n"


def talk(star: StarLLM) -> list[Any]:
    """Continue in two directions; return tokens and what was kept. Rank 0's queries count."""
    leads = star.rank == 0

    def query(*arguments: int) -> Any:
        return ids(*arguments) if leads else None

    first = star.generate(star.encode(ids(CONTEXT)), query(QUERY), keep=True, **ANSWER)
    second = first.continue_with(query(5, 2), **ANSWER)
    other = first.continue_with(query(9, 3), **ANSWER)
    third = star.generate(second.conversation.undo(0), query(3, 4), **ANSWER)
    undone = star.generate(third.conversation.undo(), query(3, 4), **ANSWER)
    third.conversation.forget()
    forgotten = third.continue_with(query(3, 5), **ANSWER)
    queries = [query(4, 6), query(7, 7)] if leads else None
    batch = star.generate(first.conversation.context, queries, keep=True, **ANSWER)
    last = batch[1].continue_with(query(3, 8), **ANSWER)
    beams = last.continue_with(query(3, 9), num_beams=2, **ANSWER)
    end = beams.continue_with(query(3, 10), **ANSWER)
    replies = [first, second, other, third, undone, forgotten, *batch, last, beams, end]
    return [
        (reply.token_ids, reply.kept_tokens, len(reply.conversation.turns)) for reply in replies
    ]


def talk_on(comm: Any, name: str, settings: dict[str, Any], is_ahead: bool = False) -> list[Any]:
    star = engine(name, comm=comm, **RUNS | settings)
    star.runtime.comm.is_asynchronous = is_ahead
    return talk(star)


@pytest.mark.parametrize(
    ("ranks", "name", "settings"),
    [
        (2, "llama_mha", {}),
        (3, "llama_mha", dict(lookback=1)),
        (2, "llama_mha", dict(slice_weights=True)),
        (2, "gemma3n", {}),
        (2, "deepseek_v3", {}),
    ],
)
def test_the_number_of_ranks_is_invisible(
    pool: Pool, name: str, ranks: int, settings: dict[str, Any]
) -> None:
    alone = {key: value for key, value in settings.items() if key != "slice_weights"}
    right = talk_on(SoloComm(), name, alone)
    assert [kept for _, kept, _ in right][1:4] == [QUERY + 3, QUERY + 3, QUERY + 12]
    assert pool.run(talk_on, ranks, name=name, settings=settings) == [right] * ranks


@pytest.mark.parametrize("ranks", [2, 3])
def test_forwards_ahead_of_python_are_kept(pool: Pool, ranks: int) -> None:
    """The last token of an answer has been through the model then, on all ranks."""
    right = talk_on(SoloComm(), "llama_mha", {}, is_ahead=True)
    assert [kept for _, kept, _ in right][1:4] == [QUERY + 4, QUERY + 4, QUERY + 13]
    plain = talk_on(SoloComm(), "llama_mha", {})
    assert [tokens for tokens, _, _ in right] == [tokens for tokens, _, _ in plain]
    results = pool.run(talk_on, ranks, name="llama_mha", settings={}, is_ahead=True)
    assert results == [right] * ranks


def talk_in_mesh(comm: Any, path: Path) -> list[Any]:
    return talk(star_of(comm, path, 2, block_size=16, anchor_size=5))


def test_ranks_that_share_heads_keep_their_own(pool: Pool, models: Path) -> None:
    right = talk(StarLLM(model("llama"), **RUNS))
    assert pool.run(talk_in_mesh, 4, path=on_disk(models, "llama")) == [right] * 4


def lead(comm: Any) -> Any:
    """Let rank 0 alone talk; the others follow it, and keep what it keeps."""
    star = StarLLM(text_model(), bundled_tokenizer(), comm=comm, block_size=8, anchor_size=4)
    if star.rank > 0:
        star.follow()
        return len(comm.contexts.news()[1])
    context = star.encode(TEXT)
    stream = star.stream(context, "A", keep=True, **ANSWER)
    next(stream)
    star.generate(context, "dog", keep=True, **ANSWER)
    list(stream)
    reply = stream.result.continue_with(" and", **ANSWER)
    with star.stream(reply, " so", max_new_tokens=20, ignore_eos=True) as closed:
        next(closed)
    last = closed.result.continue_with(" it", **ANSWER)
    del stream, closed, reply
    star.from_rank_0(None)
    star.close()
    return last.token_ids, last.kept_tokens


def test_ranks_that_follow_keep_what_rank_0_keeps(pool: Pool) -> None:
    right = lead(SoloComm())
    assert right[1] > 0
    (tokens, kept), *others = pool.run(lead, 3)
    assert tokens == right[0]
    # A stream that was suspended has its last token forwarded.
    assert kept >= right[1]
    # Nothing but `follow` held them.
    assert others == [0, 0]


def save(comm: Any, folder: Path) -> Any:
    """Save on all ranks alike, and go on; the paths of other ranks do not count."""
    star = engine("llama_mha", comm=comm, **RUNS)
    leads = star.rank == 0
    first = star.generate(
        star.encode(ids(CONTEXT)), ids(QUERY) if leads else None, keep=True, **ANSWER
    )
    path = folder / "talk" if leads else None
    first.conversation.save(path)
    return load(star, path)


def load(star: Any, path: Path | None) -> Any:
    loaded = star.load_conversation(path)
    reply = star.generate(loaded, ids(5, 2) if star.rank == 0 else None, **ANSWER)
    return reply.token_ids, len(reply.conversation.turns)


def save_alone(comm: Any, folder: Path) -> Any:
    """Save on rank 0, which the others follow."""
    star = engine("llama_mha", comm=comm, **RUNS)
    if star.rank > 0:
        star.follow()
        return None
    first = star.generate(star.encode(ids(CONTEXT)), ids(QUERY), keep=True, **ANSWER)
    book = folder / "book"
    first.conversation.context.save(book)
    with pytest.raises(ContextSaveError, match="it is a saved context"):
        first.conversation.save(book)
    first.conversation.save(folder / "talk")
    first.conversation.save(folder / "talk")
    answer = load(star, folder / "talk")
    star.close()
    return answer


def test_conversations_of_ranks_are_saved(pool: Pool, tmp_path: Path) -> None:
    right = save(SoloComm(), tmp_path)
    (tmp_path / "talk").unlink()
    assert pool.run(save, 2, folder=tmp_path) == [right] * 2
    assert load(engine("llama_mha", **RUNS), tmp_path / "talk") == right
    assert pool.run(save_alone, 3, folder=tmp_path) == [right, None, None]
