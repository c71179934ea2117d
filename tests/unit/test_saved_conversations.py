"""Saved conversations go on as they would have, in another process too."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import Conversation, EncodedContext, Generation, StarLLM
from star_attention.errors import (
    ContextMismatchError,
    ContextNotFoundError,
    ContextSaveError,
    CorruptContextError,
    InvalidInputError,
)
from tests.engines import BUNDLED, CONTEXT, QUERY, engine, ids
from tests.warm import python

SIZES: dict[str, Any] = dict(block_size=16, anchor_size=5, reserve_tokens=128)
ANSWER: dict[str, Any] = dict(max_new_tokens=4, ignore_eos=True, return_logits=True)


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return engine("llama", **SIZES)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    return star.encode(ids(CONTEXT))


def talk_about(star: StarLLM, context: EncodedContext) -> Conversation:
    reply = star.generate(context, ids(QUERY), keep=True, **ANSWER)
    conversation = reply.continue_with(ids(5, seed=2), **ANSWER).conversation
    assert isinstance(conversation, Conversation)
    return conversation


def assert_goes_on(star: StarLLM, loaded: Conversation, saved: Conversation) -> Generation:
    assert loaded.turns == saved.turns
    actual, expected = (
        star.generate(talk, ids(5, seed=3), sources=2, **ANSWER) for talk in (loaded, saved)
    )
    assert actual.token_ids == expected.token_ids
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert actual.sources == expected.sources
    return actual


@pytest.mark.parametrize("name", ["llama", "gemma3n", "deepseek_v3"])
def test_a_conversation_goes_on(name: str, tmp_path: Path) -> None:
    """With the context in its file, and with keys of the turns, so that nothing is computed."""
    star = engine(name, **SIZES)
    saved = talk_about(star, star.encode(ids(CONTEXT)))
    saved.save(tmp_path / "talk.star")
    loaded = star.load_conversation(tmp_path / "talk.star")
    assert loaded.nbytes == saved.nbytes > 0
    assert assert_goes_on(star, loaded, saved).kept_tokens == saved.kept_tokens
    # Saved again, over the file that it was read from.
    loaded.undo().save(tmp_path / "talk.star")
    assert len(star.load_conversation(tmp_path / "talk.star").turns) == 1
    alone = star.load_context(tmp_path / "talk.star")
    assert star.generate(alone, ids(3), max_new_tokens=2).token_ids


def test_a_context_with_a_file_is_referred_to(
    star: StarLLM, context: EncodedContext, tmp_path: Path
) -> None:
    context.save(tmp_path / "book.star")
    saved = talk_about(star, star.load_context(tmp_path / "book.star"))
    (tmp_path / "talks").mkdir()
    talk = tmp_path / "talks" / "one.star"
    saved.save(talk)
    assert talk.stat().st_size < (tmp_path / "book.star").stat().st_size
    loaded = star.load_conversation(talk)
    assert loaded.context.file == str(tmp_path / "book.star")
    assert_goes_on(star, loaded, saved)
    # Moved beside the conversation.
    (tmp_path / "book.star").rename(tmp_path / "talks" / "book.star")
    assert_goes_on(star, star.load_conversation(talk), saved)
    (tmp_path / "talks" / "book.star").unlink()
    with pytest.raises(ContextNotFoundError, match=r"book\.star; put it back or beside"):
        star.load_conversation(talk)
    assert_goes_on(star, star.load_conversation(talk, context), saved)
    with pytest.raises(CorruptContextError, match=r"is a conversation.*book\.star"):
        star.load_context(talk)
    with pytest.raises(ContextNotFoundError, match="no saved context at"):
        star.load_conversation(tmp_path / "other.star")


def test_changed_contexts_have_no_file(
    star: StarLLM, context: EncodedContext, tmp_path: Path
) -> None:
    """Forbids a reference to a file whose context is another one."""
    context.save(tmp_path / "book.star")
    loaded = star.load_context(tmp_path / "book.star")
    for changed in (star.extend(loaded, [70, 71]), star.edit(loaded, 3, 5, [70, 71])):
        assert changed.file is None
        saved = talk_about(star, changed)
        saved.save(tmp_path / "talk.star")
        assert_goes_on(star, star.load_conversation(tmp_path / "talk.star"), saved)


def test_a_conversation_without_keys_is_computed_again(
    star: StarLLM, context: EncodedContext, tmp_path: Path
) -> None:
    saved, other = talk_about(star, context), talk_about(star, context)
    saved.forget()
    saved.save(tmp_path / "talk.star")
    loaded = star.load_conversation(tmp_path / "talk.star")
    assert loaded.nbytes == 0
    assert assert_goes_on(star, loaded, other).kept_tokens == 0


def test_what_does_not_fit_is_refused(
    star: StarLLM, context: EncodedContext, tmp_path: Path
) -> None:
    path, book = tmp_path / "talk.star", tmp_path / "book.star"
    talk_about(star, context).save(path)
    context.save(book)
    with pytest.raises(ContextMismatchError, match=r"talk\.star does not fit.*in config"):
        engine("mistral", **SIZES).load_conversation(path)
    with pytest.raises(ContextMismatchError, match="differs in method"):
        engine("llama", method="dense").load_conversation(path)
    shorter, other = star.encode(ids(CONTEXT - 1)), star.encode(ids(CONTEXT, seed=9))
    with pytest.raises(ContextMismatchError, match="tokens: 101 in the file, 100 in the context"):
        star.load_conversation(path, shorter)
    with pytest.raises(ContextMismatchError, match="it differs in the text"):
        star.load_conversation(path, other)
    with pytest.raises(InvalidInputError, match="expected an EncodedContext, got str"):
        star.load_conversation(path, "book")  # type: ignore[arg-type]
    with pytest.raises(CorruptContextError, match="a saved context without a conversation"):
        star.load_conversation(book)
    with pytest.raises(InvalidInputError, match="conversation from 5: expected a str"):
        star.load_conversation(5)  # type: ignore[arg-type]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptContextError, match="does not match its checksum"):
        star.load_conversation(path)


def test_a_context_is_never_replaced(
    star: StarLLM, context: EncodedContext, tmp_path: Path
) -> None:
    book, other = tmp_path / "book.star", tmp_path / "other.star"
    context.save(book)
    star.encode(ids(30)).save(other)
    saved = talk_about(star, star.load_context(book))
    before = book.read_bytes()
    with pytest.raises(ContextSaveError, match=r"book\.star: it is the file of its context"):
        saved.save(book)
    with pytest.raises(ContextSaveError, match=r"other\.star: it is a saved context"):
        saved.save(other)
    (tmp_path / "notes.txt").write_text("Notes")
    with pytest.raises(ContextSaveError, match="a file of another kind"):
        saved.save(tmp_path / "notes.txt")
    with pytest.raises(ContextSaveError, match="does not exist"):
        saved.save(tmp_path / "none" / "talk.star")
    assert book.read_bytes() == before
    saved.save(tmp_path / "talk.star")
    saved.save(tmp_path / "talk.star")


PROGRAM = """
import json, sys
from star_attention import StarLLM

star = StarLLM.from_pretrained(sys.argv[1], block_size=64, dtype="float32")
talk = star.load_conversation(sys.argv[2])
reply = star.generate(talk, "And the hill?", max_new_tokens=8)
print(json.dumps([reply.text, reply.token_ids, reply.kept_tokens, reply.conversation.messages]))
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    star = StarLLM.from_pretrained(BUNDLED, block_size=64, dtype="float32")
    text = "The tea is hot.\nThe hill is tall.\n" * 9
    context = star.encode([{"role": "user", "content": text}])
    first = star.generate(context, "How is the tea?", keep=True, max_new_tokens=8)
    assert first.conversation is not None
    first.conversation.save(tmp_path / "talk.star")
    right = first.continue_with("And the hill?", max_new_tokens=8)
    done = subprocess.run(
        python("-c", PROGRAM, BUNDLED, tmp_path / "talk.star"),
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [right.text, right.token_ids, right.kept_tokens, right.conversation.messages]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
