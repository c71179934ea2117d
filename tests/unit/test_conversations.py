"""Conversations: a next turn computes only what is new, and answers as the whole text would."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from star_attention import Conversation, EncodedContext, Generation, StarLLM
from star_attention.errors import (
    ContextLengthError,
    ContextMismatchError,
    InvalidInputError,
    StarAttentionError,
    TokenError,
)
from star_attention.generation.conversation import reusable
from star_attention.hf.execution.request import Request
from tests.engines import CONTEXT, QUERY, VARIED, engine, ids
from tests.families import FAMILIES
from tests.recorders import Buckets

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=5, reserve_tokens=128)
ANSWER: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True)
TURNS = 10


@contextmanager
def counted(star: StarLLM) -> Iterator[list[int]]:
    """Yield a list that gets the number of tokens of each forward, without a model's first look."""
    sizes: list[int] = []
    assert star.runtime.handle.probe_result

    def note(module: Any, args: Any, output: torch.Tensor) -> None:
        sizes.append(output.shape[0] * output.shape[1])

    hook = star.model.get_input_embeddings().register_forward_hook(note)
    try:
        yield sizes
    finally:
        hook.remove()


def assert_turns_equal_one_query(star: StarLLM, context: EncodedContext, turns: int) -> None:
    """Assert that every turn's tokens and logits are those of all text so far as one query."""
    # MLA's first answer sends a few tokens through the model to learn how it expands its keys.
    star.runtime.handle.probe_result  # noqa: B018
    reply: Any = context
    text: list[int] = []
    for turn in range(turns):
        query = ids(QUERY + turn % 3, seed=10 + turn)
        with counted(star) as sizes:
            reply = star.generate(reply, query, return_logits=True, keep=True, **ANSWER)
        text += query
        whole = star.generate(context, text, return_logits=True, **ANSWER)
        assert reply.token_ids == whole.token_ids
        scale = max(1.0, whole.logits.abs().max().item())
        assert (reply.logits - whole.logits).abs().max().item() <= 1e-4 * scale
        # The last token of an answer is computed with the next query.
        assert reply.query_tokens == len(text)
        assert reply.kept_tokens == (len(text) - len(query) - 1 if turn else 0)
        assert sum(sizes) == reply.query_tokens - reply.kept_tokens + len(reply.token_ids) - 1
        text += reply.token_ids
    assert len(reply.conversation.turns) == turns
    assert reply.conversation.kept_tokens == len(text) - 1


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in VARIED]


@pytest.mark.parametrize("name", [*VARIED, *OTHERS])
def test_ten_turns_equal_the_same_text_as_one_query(name: str) -> None:
    star = engine(name, **SIZES)
    turns = TURNS if name == "llama" else 3
    assert_turns_equal_one_query(star, star.encode(ids(CONTEXT)), turns)


@pytest.mark.parametrize(
    "settings",
    [
        dict(method="streaming_llm"),
        dict(method="dense"),
        dict(kv_dtype="fp8"),
        dict(kv_device="cpu"),
        dict(lookback=1),
        dict(tokens_per_forward=3),
    ],
    ids=str,
)
def test_contexts_of_every_kind(settings: dict[str, Any]) -> None:
    star = engine("llama", **SIZES | settings)
    assert_turns_equal_one_query(star, star.encode(ids(CONTEXT)), 3)


# ------------------------------------------------------------------------------- one tail, many


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return engine("llama", **SIZES)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    return star.encode(ids(CONTEXT))


def test_a_reply_continues_in_two_directions(star: StarLLM, context: EncodedContext) -> None:
    """Forbids that one branch writes into what the other one reads."""
    first = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    one = first.continue_with(ids(5, seed=2), **ANSWER)
    other = first.continue_with(ids(9, seed=3), **ANSWER)
    again = first.continue_with(ids(5, seed=2), **ANSWER)
    assert one.token_ids == again.token_ids
    text = [*ids(QUERY), *first.token_ids, *ids(9, seed=3)]
    assert other.token_ids == star.generate(context, text, **ANSWER).token_ids
    deeper = one.continue_with(ids(3, seed=4), **ANSWER)
    text = [*ids(QUERY), *first.token_ids, *ids(5, seed=2), *one.token_ids, *ids(3, seed=4)]
    assert deeper.token_ids == star.generate(context, text, **ANSWER).token_ids


def test_queries_of_a_list_are_branches(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    queries = [ids(5, seed=2), ids(9, seed=3)]
    replies = first.continue_with(queries, **ANSWER)
    assert [reply.token_ids for reply in replies] == [
        first.continue_with(query, **ANSWER).token_ids for query in queries
    ]
    assert [reply.kept_tokens for reply in replies] == [QUERY + 3] * 2


def test_answers_of_one_batch_are_kept_one_by_one(star: StarLLM, context: EncodedContext) -> None:
    """Rows have padding, and end at different tokens."""
    queries = [ids(QUERY), ids(3, seed=5), ids(12, seed=6)]
    options = dict(max_new_tokens=6, eos_token_id=ids(8, seed=7), keep=True)
    replies = star.generate(context, queries, **options)
    for query, reply in zip(queries, replies, strict=True):
        following = reply.continue_with(ids(4, seed=8), return_logits=True, **ANSWER)
        # The longest answer's last token has not been through the model.
        ended_last = len(reply.token_ids) == max(len(each.token_ids) for each in replies)
        assert following.kept_tokens == len(query) + len(reply.token_ids) - ended_last
        text = [*query, *reply.token_ids, *ids(4, seed=8)]
        whole = star.generate(context, text, return_logits=True, **ANSWER)
        assert following.token_ids == whole.token_ids
        torch.testing.assert_close(following.logits, whole.logits, atol=1e-3, rtol=1e-3)


def test_several_answers_to_one_query(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(
        context, ids(QUERY), keep=True, do_sample=True, seed=3, num_return_sequences=2, **ANSWER
    )
    assert first[0].token_ids != first[1].token_ids
    for reply in first:
        following = reply.continue_with(ids(4), **ANSWER)
        text = [*ids(QUERY), *reply.token_ids, *ids(4)]
        assert following.token_ids == star.generate(context, text, **ANSWER).token_ids
        several = reply.continue_with(ids(4), num_return_sequences=2, num_beams=2, **ANSWER)
        assert [answer.kept_tokens for answer in several] == [0, 0]


def test_undo_and_forget(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    second = first.continue_with(ids(5, seed=2), **ANSWER)
    third = second.continue_with(ids(5, seed=3), **ANSWER)
    undone = third.conversation.undo(2)
    assert len(undone.turns) == 1
    again = star.generate(undone, ids(5, seed=2), **ANSWER)
    assert again.token_ids == second.token_ids
    # The tail of three turns serves: it begins like the conversation of one.
    assert again.kept_tokens > second.kept_tokens
    assert len(third.conversation.turns) == 3
    third.conversation.forget()
    assert (third.conversation.nbytes, third.conversation.kept_tokens) == (0, 0)
    fourth, right = (
        star.generate(talk, ids(5, seed=4), **ANSWER)
        for talk in (third, second.continue_with(ids(5, seed=3), **ANSWER))
    )
    assert (fourth.token_ids, fourth.kept_tokens) == (right.token_ids, 0)
    restart = third.conversation.undo(3)
    assert restart.turns == ()
    assert star.generate(restart, ids(QUERY), **ANSWER).token_ids == first.token_ids
    for count in (4, -1, True, "1"):
        with pytest.raises(InvalidInputError, match=r"cannot be undone.*has 3; give 0\.\.3"):
            third.conversation.undo(count)  # type: ignore[arg-type]


def test_memory_is_counted_and_freed(star: StarLLM, context: EncodedContext) -> None:
    reply = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    talk = reply.conversation
    assert talk is not None
    shapes = [shape for shape in star.runtime.handle.layer_shapes if shape is not None]
    per_token = sum(shape.stored_bytes(None) for shape in shapes)
    assert talk.nbytes == talk.kept_tokens * per_token
    assert repr(talk) == f"Conversation(1 turn on {CONTEXT} tokens, {QUERY + 3} tokens kept)"
    kept, _ = reusable(talk, [*ids(QUERY), *reply.token_ids])
    assert kept is not None
    storages = [tensor.untyped_storage() for pair in kept.layers if pair for tensor in pair]
    # Copies of several layers may share one.
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(held.values()) == talk.nbytes
    del storages
    del kept
    tail = weakref.ref(reusable(talk, [*ids(QUERY), *reply.token_ids])[0])
    following = reply.continue_with(ids(5), **ANSWER)
    del reply, talk
    gc.collect()
    assert tail() is None
    assert following.conversation.kept_tokens
    assert star.generate(context, ids(QUERY), **ANSWER).conversation is None
    assert following.continue_with(ids(5), keep=False, **ANSWER).conversation is None


def test_streams_continue(star: StarLLM) -> None:
    from tests.engines import bundled_tokenizer, text_model

    star = StarLLM(text_model(), bundled_tokenizer(), block_size=16)
    context = star.encode("The tea is hot and the hill is tall.")
    first = star.generate(context, " The", keep=True, **ANSWER)
    right = first.continue_with(" cold wind", **ANSWER)
    stream = star.stream(first, " cold wind", **ANSWER)
    assert "".join(stream) == right.text
    assert stream.result.conversation is stream.result.conversation
    assert stream.result.kept_tokens == right.kept_tokens > 0
    with star.stream(stream.result, " and", max_new_tokens=20, ignore_eos=True) as closed:
        next(closed)
    following = closed.result.continue_with(" so", **ANSWER)
    said = f" The{first.text} cold wind{right.text} and{closed.result.text} so"
    assert following.token_ids == star.generate(context, said, **ANSWER).token_ids
    with star.stream(first, " cold", **ANSWER) as unread:
        pass
    assert unread.result.token_ids == []
    said = f" The{first.text} cold wind"
    following = unread.result.continue_with(" wind", **ANSWER)
    assert following.token_ids == star.generate(context, said, **ANSWER).token_ids


def test_asyncio_continues(star: StarLLM, context: EncodedContext) -> None:
    async def talk() -> list[int]:
        first = await star.agenerate(context, ids(QUERY), keep=True, **ANSWER)
        second = await star.agenerate(first, ids(5, seed=2), **ANSWER)
        assert second.kept_tokens == QUERY + 3
        tokens: list[int] = second.token_ids
        return tokens

    right = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    assert asyncio.run(talk()) == right.continue_with(ids(5, seed=2), **ANSWER).token_ids


@pytest.mark.parametrize("options", [dict(num_beams=2), dict(second_look=0.2)], ids=str)
def test_what_keeps_no_keys_is_computed_again(
    star: StarLLM, context: EncodedContext, options: dict[str, Any]
) -> None:
    first = star.generate(context, ids(QUERY), keep=True, **ANSWER, **options)
    assert first.conversation is not None
    assert first.conversation.nbytes == 0
    for more in ({}, options):
        following = first.continue_with(ids(5, seed=2), **ANSWER, **more)
        text = [*ids(QUERY), *first.token_ids, *ids(5, seed=2)]
        assert following.token_ids == star.generate(context, text, **ANSWER, **more).token_ids
        assert following.kept_tokens == 0


def test_sources_are_of_the_new_turn(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(context, ids(QUERY), keep=True, sources=2, **ANSWER)
    following = first.continue_with(ids(5, seed=2), sources=2, **ANSWER)
    kept = first.continue_with(ids(5, seed=2), **ANSWER)
    text = [*ids(QUERY), *first.token_ids, *ids(5, seed=2)]
    whole = star.generate(context, text, sources=2, **ANSWER)
    assert following.token_ids == whole.token_ids == kept.token_ids
    assert following.sources is not None
    assert [source.weight for source in following.sources] != [
        source.weight for source in whole.sources or ()
    ]


# ---------------------------------------------------------------------------------------- errors


def refusals(first: Generation, star: StarLLM) -> list[tuple[Any, Any, type, str]]:
    """What follows what, and the error for it."""
    return [
        (first, "And?", InvalidInputError, "this conversation is token ids.*give that"),
        (first, [{"role": "user", "content": "And?"}], InvalidInputError, "is token ids"),
        (first, [], TokenError, "the query is empty"),
        (first, None, TokenError, "the query is empty"),
        (first, [10**6], TokenError, "vocabulary"),
        (None, [5], InvalidInputError, "expected an EncodedContext, got NoneType"),
        ("talk", [5], InvalidInputError, "expected an EncodedContext, got str"),
        (first, star.prepare(ids(CONTEXT), [5]), InvalidInputError, "1 turn of a conversation"),
    ]


def test_bad_turns(star: StarLLM, context: EncodedContext) -> None:
    first = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    for asked, query, error, message in refusals(first, star):
        with pytest.raises(error, match=message):
            star.generate(asked, query)
    plain = star.generate(context, ids(QUERY), **ANSWER)
    with pytest.raises(InvalidInputError, match=r"not kept; ask with keep=True"):
        plain.continue_with([5])
    with pytest.raises(InvalidInputError, match=r"not kept; ask with keep=True"):
        star.generate(plain, [5])
    with pytest.raises(InvalidInputError, match=r"keep: expected True or False, got 'yes'"):
        star.generate(context, [5], keep="yes")  # type: ignore[arg-type]
    other = engine("mistral", **SIZES)
    with pytest.raises(ContextMismatchError):
        other.generate(first, [5])


def test_a_conversation_ends_where_the_positions_do() -> None:
    """Forbids computing anything of a turn that has no room, and losing what was before."""
    star = engine("gpt2", block_size=64)
    reply: Any = star.generate(star.encode(ids(400)), ids(50), keep=True, **ANSWER)
    with (
        counted(star) as sizes,
        pytest.raises(
            ContextLengthError,
            match=r"context \(400\), query and answer \(4\) need 518 tokens, more than the model's"
            r" 512 positions; the query has 114 with 1 turn before it: lower max_new_tokens, or"
            r" undo turns, or begin another conversation",
        ),
    ):
        reply.continue_with(ids(60), **ANSWER)
    assert sizes == []
    assert reply.continue_with(ids(50), **ANSWER).kept_tokens == 53


def test_conversations_stay_in_their_process(star: StarLLM, context: EncodedContext) -> None:
    import copy
    import pickle

    reply = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    for act in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="Conversation cannot be"):
            act(reply)
    assert isinstance(reply.conversation, Conversation)
    assert issubclass(InvalidInputError, StarAttentionError)


# ---------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3n"])
def test_queries_of_fixed_lengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids padding between two turns, which graphs take from the left alone."""
    star = engine(name, **SIZES)
    context = star.encode(ids(CONTEXT))
    graphs = Buckets(star.runtime.handle)
    text: list[int] = []
    reply: Any = context
    lengths = []
    for turn, tokens in enumerate((3, 4, 15, 1, 20)):
        query = ids(tokens, seed=turn)
        with monkeypatch.context() as patched:
            patched.setattr(Request, "graphs", graphs)
            graphs.lengths.clear()
            reply = star.generate(reply, query, keep=True, return_logits=True, **ANSWER)
        text += query
        whole = star.generate(context, text, return_logits=True, **ANSWER)
        assert reply.token_ids == whole.token_ids
        torch.testing.assert_close(reply.logits, whole.logits, atol=1e-3, rtol=1e-4)
        # The forward of the last token is for the next turn.
        assert graphs.lengths[1:] == [1] * 4
        lengths.append((graphs.lengths[0], reply.kept_tokens))
        text += reply.token_ids
    # 11 tokens are fewer than a graph takes: all are computed, behind padding.
    assert lengths == [(16, 0), (16, 0), (16, 14), (1, 34), (32, 27)]
