"""Rank 0 drives all ranks alone: the others follow, and a session is what it is on one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from star_attention.errors import ContextNotFoundError, InvalidInputError, TokenError
from star_attention.storage.kv import ContextKV
from tests.dist.pool import Pool
from tests.engines import bundled_tokenizer, text_model, tiny

SIZES: dict[str, Any] = dict(block_size=32, anchor_size=16, reserve_tokens=64)
STORY = "The hill is tall and the tea is hot. " * 12


def new_engine(**settings: Any) -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), **SIZES, **settings)


def led(comm: TorchComm, session: Callable[..., Any], **arguments: Any) -> Any:
    """Run a session on rank 0 alone; the others return how many contexts they hold at its end."""
    star = new_engine(comm=comm)
    if star.rank > 0:
        star.follow()
        gc.collect()
        return len(comm.contexts.news()[1])
    result = session(star, **arguments)
    star.close()
    return result


# ------------------------------------------------------------------ a whole session


def whole_session(star: StarLLM, folder: Path) -> list[Any]:
    """Make every call that rank 0 may make, and return what came back."""
    seen: list[Any] = []

    def note(reply: Any) -> None:
        seen.append((reply.text, reply.token_ids, reply.finish_reason))

    options: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True)
    context = star.encode(STORY)
    note(star.generate(context, "Who is tall?", **options))
    for reply in star.generate(context, ["A dog", "What is hot here?"], **options):
        note(reply)
    note(star.generate(context, "A dog", do_sample=True, seed=5, **options))
    note(star.generate(context, "A dog", num_beams=2, **options))
    with star.stream(context, "A dog", **options) as stream:
        seen.append("".join(stream))
    note(stream.result)
    longer = star.extend(context, " The cup is blue.")
    note(star.generate(longer, "A dog", **options))
    longer.save(folder / f"on {star.num_ranks}.star")
    loaded = star.load_context(folder / f"on {star.num_ranks}.star")
    note(star.generate(loaded, "A dog", **options))
    prepared = star.prepare(STORY, "Which cup?", **options)
    note(star.generate(star.encode(prepared), prepared))
    seen.append(star.logits(context, " A dog"))
    seen.append(star.from_rank_0(7))
    other = star.with_config(block_size=64, anchor_size=0)
    note(other.generate(other.encode(STORY), "A dog", **options))
    for both in star.encode([STORY, STORY]):
        note(star.generate(both, "A dog", **options))
    return seen


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_session_is_what_it_is_on_one_process(pool: Pool, tmp_path: Path, ranks: int) -> None:
    seen, *_ = pool.run(led, ranks, session=whole_session, folder=tmp_path)
    expected = whole_session(new_engine(), tmp_path)
    assert len(seen) == len(expected) > 12
    for value, wanted in zip(seen, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)
        else:
            assert value == wanted


# ------------------------------------------------------------------ errors


def make_mistakes(star: StarLLM) -> list[str]:
    """Return the messages of rank 0's mistakes, with a call that works after each."""
    context = star.encode(STORY)
    messages = []
    mistakes: list[tuple[type[Exception], Callable[[], Any]]] = [
        (InvalidInputError, star.follow),
        (TokenError, lambda: star.encode("")),
        (InvalidInputError, lambda: star.generate(context, "A dog", top_p=7)),
        (InvalidInputError, lambda: star.extend(context, None)),
        (ContextNotFoundError, lambda: star.load_context("nowhere.star")),
        (InvalidInputError, lambda: StarLLM(tiny("llama"), comm=star.runtime.comm, **SIZES)),
        (InvalidInputError, lambda: star.with_config(block_size=16).generate("no context", "A")),
    ]
    for kind, mistake in mistakes:
        with pytest.raises(kind) as raised:
            mistake()
        messages.append(str(raised.value))
        assert star.generate(context, "A dog", max_new_tokens=2, ignore_eos=True).token_ids
    return messages


def test_an_error_of_rank_0_is_its_own_and_the_others_go_on(pool: Pool) -> None:
    messages, *_ = pool.run(led, 3, session=make_mistakes)
    assert "rank 0 leads and cannot follow" in messages[0]
    refusal = "follows rank 0 and cannot take part in startup"
    assert refusal in messages[5]


def interrupt(star: StarLLM) -> list[int]:
    """Interrupt a call as Ctrl-C in a notebook does, and answer afterwards."""
    context = star.encode(STORY)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        star.encode(STORY, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        star.generate(context, "A dog", logits_processor=[interrupt])
    return star.generate(context, "A dog", max_new_tokens=3, ignore_eos=True).token_ids


def test_an_interrupted_call_leaves_the_session_alive(pool: Pool) -> None:
    tokens, *_ = pool.run(led, 3, session=interrupt)
    star = new_engine()
    reply = star.generate(star.encode(STORY), "A dog", max_new_tokens=3, ignore_eos=True)
    assert tokens == reply.token_ids


def test_one_process_leads_and_cannot_follow() -> None:
    """The same program is right on any number of ranks, so rank 0 is refused on one, too."""
    star = new_engine()
    with pytest.raises(InvalidInputError, match=r"rank 0 leads and cannot follow.*star.rank > 0"):
        star.follow()
    star.close()


# ------------------------------------------------------------------ contexts


def count_stores() -> int:
    """Return how many contexts' keys and values are in this process."""
    gc.collect()
    return sum(isinstance(item, ContextKV) for item in gc.get_objects())


def follow_counting(comm: TorchComm) -> list[int]:
    """Drop contexts on rank 0; the others return how many they hold at the start of each call."""
    star = new_engine(comm=comm)
    counts: list[int] = []
    if star.rank > 0:
        registry, before = comm.contexts, count_stores()
        heed = registry.heed

        def heed_and_count(news: Any) -> None:
            heed(news)
            counts.append(count_stores() - before)

        registry.heed = heed_and_count  # type: ignore[method-assign]
        try:
            star.follow()
        finally:
            registry.heed = heed  # type: ignore[method-assign]
        return [*counts, count_stores() - before]
    contexts = [star.encode(STORY) for _ in range(3)]
    star.generate(contexts[0], "A dog", max_new_tokens=1)
    del contexts[1]
    star.generate(contexts[1], "A dog", max_new_tokens=1)
    longer = star.extend(contexts[1], STORY)
    contexts.clear()
    with pytest.raises(TokenError):
        star.encode("")
    star.generate(longer, "A dog", max_new_tokens=1)
    star.close()
    return counts


def test_what_rank_0_drops_is_freed_everywhere(pool: Pool) -> None:
    _, *others = pool.run(follow_counting, 3)
    # Three times encode, generate; one is dropped: generate, extend; all but the longer one are:
    # encode (refused), generate, close; and after it.
    assert others == [[0, 1, 2, 3, 2, 2, 1, 1, 1, 0]] * 2


# ------------------------------------------------------------------ pauses


def pause_in_a_stream(comm: TorchComm) -> Any:
    """Pause between two pieces, on ranks that work as GPUs do, until the stream is suspended."""
    star = new_engine(comm=comm)
    star.runtime.comm.is_asynchronous = True
    if star.rank > 0:
        star.follow()
        return None
    context = star.encode(STORY)
    stream = star.stream(context, "A dog", max_new_tokens=6, ignore_eos=True)
    for _ in range(2):
        next(stream)
        deadline = time.monotonic() + 20
        while comm.streams.active is not None:
            assert time.monotonic() < deadline, "the others still wait on their devices"
            time.sleep(0.05)
    list(stream)
    star.close()
    return stream.result.token_ids


def test_a_stream_is_suspended_where_its_reader_pauses(pool: Pool) -> None:
    """Forbids that GPUs of ranks that follow wait in a collective for hours."""
    tokens, *_ = pool.run(pause_in_a_stream, 3)
    star = new_engine()
    context = star.encode(STORY)
    expected = star.generate(context, "A dog", max_new_tokens=6, ignore_eos=True).token_ids
    assert tokens == expected
