"""Slips of the hand that would be answered without a word: names of files, white space, copies."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from star_attention import EncodedContext, StarLLM, pipeline
from star_attention.errors import ContextLengthError, InvalidInputError, TokenError
from tests.engines import bundled_tokenizer, engine, ids, text_model
from tests.talkers import CHATML, byte_level, talker


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer(), block_size=16)


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    return star.encode("The hill is tall.\n")


def test_the_name_of_a_file_in_place_of_its_text(
    star: StarLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The hill is tall.", encoding="utf-8")
    said = (
        "the context is the text 'book.txt', which is also the name of a file here; to encode what"
        " is in it, give star_attention.read_document('book.txt')"
    )
    with pytest.warns(UserWarning, match="also the name of a file") as caught:
        context = star.encode("book.txt")
    assert str(caught[0].message) == said
    assert len(context) == len(star.encode(["book-txt"])[0]), "the text is encoded as it is"
    # No file of that name, a folder, a text, and a text that no file can be named after.
    for text in ("nook.txt", ".", "book.txt\n", "a\1b", "book.txt " * 40):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            star.encode(text)


def test_a_path_in_place_of_a_text(
    star: StarLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TokenError, match=r"is a path, 'book\.txt'; .*read_document\('book\.txt'\)"):
        star.encode(Path("book.txt"))
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("The hill is tall.", encoding="utf-8")
    with pytest.warns(UserWarning, match="also the name of a file"):
        star.encode([{"role": "user", "content": "book.txt"}])
    with pytest.warns(UserWarning, match="also the name of a file"):
        pipeline(star)("book.txt", "Is it?", max_new_tokens=1)


@pytest.mark.parametrize("text", [" ", "\n\n", "\t\r\n ", "\u00a0\u3000"])
def test_white_space_is_no_text(star: StarLLM, context: EncodedContext, text: str) -> None:
    said = "is only white space, .*; give at least one word"
    chat = star.encode([{"role": "user", "content": "The hill is tall."}])
    for call in (
        lambda: star.encode(text),
        lambda: star.generate(context, text),
        lambda: star.stream(context, text),
        lambda: star.prepare("x", text),
        lambda: star.encode("x", query=["y", text]),
        lambda: star.generate(chat, text),
    ):
        with pytest.raises(TokenError, match=said):
            call()
    with pytest.raises(TokenError, match="contain no text"):
        star.encode([{"role": "user", "content": text}])
    # Where a continuation is measured, white space is one.
    assert star.logits(context, "\n") is not None


def test_the_length_error_names_the_query() -> None:
    small = engine("llama", block_size=20)
    limit = small.runtime.handle.max_positions
    assert limit is not None
    context = small.encode(ids(limit - 10))
    with pytest.raises(ContextLengthError) as caught:
        small.generate(context, ids(7), max_new_tokens=8)
    assert str(caught.value) == (
        f"context ({limit - 10:,}), query and answer (8) need {limit + 5:,} tokens, more than the"
        f" model's {limit:,} positions; the query has 7: lower max_new_tokens, or shorten the query"
        " or the context"
    )


@pytest.mark.parametrize("kv_dtype", [None, "fp8"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3n"])
def test_the_size_of_a_context_is_known_before(name: str, kv_dtype: str | None) -> None:
    """Also with MLA, and where layers share keys."""
    star = engine(name, block_size=20, kv_dtype=kv_dtype)
    expected = star.context_bytes(50)
    assert expected == star.encode(ids(50)).nbytes
    assert star.context_bytes("1k") == star.context_bytes(1024)
    if kv_dtype is None:
        fp8 = engine(name, block_size=20, kv_dtype="fp8").context_bytes(50)
        assert star.context_bytes(50, "fp8") == fp8 < expected


def test_a_size_in_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="kv_dtype 'int4' is unknown; choose fp8"):
        engine("llama", block_size=20).context_bytes(50, "int4")


def test_streaming_stores_its_window_only() -> None:
    star = engine("llama", method="streaming_llm", block_size=20)
    assert star.context_bytes(90) == star.encode(ids(90)).nbytes < star.context_bytes(20) * 2


def test_importing_is_quiet() -> None:
    """torchao, which transformers imports where it is installed, logs which kernels it lacks."""
    pytest.importorskip("torchao")
    code = "import star_attention; star_attention.StarLLM; star_attention.pipeline"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_messages_in_other_forms(star: StarLLM) -> None:
    """Forbids a word of torch's in place of what to do."""
    message = '{"role": ..., "content": ...}'
    for given, said in (
        ([("user", "x")], f"got 2 items, the first of type str; write a message as {message}"),
        (iter([{"role": "user"}]), f"item of type dict; give a list of messages, each {message}"),
        ([["a", "b"]], "got 2 items, the first of type str; join the texts into one"),
    ):
        with pytest.raises(TokenError) as raised:
            star.encode(given)
        assert str(raised.value).endswith(said)


@pytest.mark.parametrize(
    ("role", "meant"), [("User", "user"), ("human", "user"), ("AI", "assistant"), (" user", "user")]
)
def test_other_names_of_roles(role: str, meant: str) -> None:
    """Forbids a turn of `User` in the prompt, with one of `user` after it, without a word."""
    star = talker(byte_level(chat=CHATML))
    messages = [{"role": "user", "content": "x"}, {"role": role, "content": "y"}]
    said = rf"message 2 of 2 \(role '{role}'\) has a role that few .* know; give '{meant}' if that"
    with pytest.warns(UserWarning, match=said):
        star.encode(messages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        star.encode([messages[0], {"role": "critic", "content": "y"}])


def test_what_is_no_tokenizer_is_refused() -> None:
    """Forbids a TypeError of its call, long after the slip."""
    fast = bundled_tokenizer()
    for tokenizer, said in (
        ("gpt2", "of type str, expected a tokenizer of transformers; load one with transformers."),
        (fast.backend_tokenizer, "PreTrainedTokenizerFast(tokenizer_object=...)"),
        (SimpleNamespace(tokenizer=fast), "give the tokenizer inside of it, processor.tokenizer"),
        (lambda text: [5], "of type function, expected a tokenizer of transformers"),
    ):
        with pytest.raises(InvalidInputError) as raised:
            StarLLM(text_model(), tokenizer)
        assert said in str(raised.value)
