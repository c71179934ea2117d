"""Tokens become text at once and in linear time, whatever bytes come."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from star_attention.hf.text.detokenizer import Detokenizer
from star_attention.hf.text.stops import StopStringCutter
from star_attention.hf.text.tokens import decode, decoder
from tests.engines import bundled_tokenizer
from tests.talkers import byte_fallback, byte_level

NEWLINE = "<0x0A>"


class Counted:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def decode(self, ids: list[int], **options: Any) -> Any:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)

    def convert_ids_to_tokens(self, token: int) -> Any:
        return self._tokenizer.convert_ids_to_tokens(token)


def bytes_of(tokenizer: Any, data: bytes) -> list[int]:
    """Ids of single bytes."""
    if tokenizer.convert_tokens_to_ids(NEWLINE) != tokenizer.unk_token_id:
        return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    single = {}
    for token in range(len(tokenizer)):
        written = tokenizer.convert_ids_to_tokens(token)
        if len(written) == 1:
            single[written] = token
    # Byte-level tokenizers write each byte as a visible character.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in visible}
    names |= {
        byte: chr(256 + index)
        for index, byte in enumerate(byte for byte in range(256) if byte not in visible)
    }
    return [single[names[byte]] for byte in data]


def pieces_of(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    pieces = [detokenizer.push(token) for token in ids]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("seed", range(6))
def test_any_bytes_are_what_decoding_them_gives(seed: int) -> None:
    """Characters that no token completes, wrong bytes, and real replacement characters."""
    tokenizer, chance = byte_level(), random.Random(seed)
    parts = [
        "日本".encode(),
        "👍🏽".encode(),
        b"the cat",
        b"\xff",
        b"\xe6\x97",
        b"\x80\x80",
        b"\xf0\x9f",
    ]
    parts.append("\ufffd\ufffd".encode())
    data = b"".join(chance.choices(parts, k=60))
    ids = bytes_of(tokenizer, data)
    assert "".join(pieces_of(tokenizer, ids)) == data.decode("utf-8", "replace")


def test_tokens_across_characters_do_not_hold_text_back() -> None:
    """Forbids waiting for a token that ends with a character, which may never come."""
    tokenizer = byte_level()
    data = "日本語のテキスト".encode()
    lead, *rest = (data[at : at + 2] for at in range(0, len(data), 2))
    # Tokens of two bytes split every character of three.
    names = {tuple(bytes_of(tokenizer, part)): part for part in (lead, *rest)}

    class Pairs:
        """Decodes the index of a pair of bytes."""

        def decode(self, ids: list[int], **options: Any) -> str:
            return b"".join(list(names.values())[index] for index in ids).decode(errors="replace")

        def convert_ids_to_tokens(self, token: int) -> str:
            return "pair"

    ids = list(range(len(names)))
    pieces = pieces_of(Pairs(), ids)
    assert "".join(pieces) == b"".join(names.values()).decode(errors="replace")
    for count in range(len(ids)):
        shown = len("".join(pieces[: count + 1]))
        whole = b"".join(list(names.values())[: max(count - 3, 0)]).decode(errors="ignore")
        assert shown >= len(whole)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("data", [b"\xff", b"\xe6\x97", "\ufffd".encode(), b"\x80"])
def test_text_is_held_back_for_four_tokens_at_most(make: Any, data: bytes) -> None:
    """Forbids a stream that stands still, and time that grows with the square of its length."""
    tokenizer = make()
    ids = bytes_of(tokenizer, data) * 400
    counted = Counted(tokenizer)
    pieces = pieces_of(counted, ids)
    assert counted.decoded < 40 * len(ids)
    gaps = "".join("x" if piece else "." for piece in pieces).split("x")
    assert max(map(len, gaps)) <= 4


def test_byte_fallback_shows_whole_characters() -> None:
    tokenizer = byte_fallback()
    ids = tokenizer("the 日本 cat 👍", add_special_tokens=False).input_ids
    assert "".join(pieces_of(tokenizer, ids)) == "the 日本 cat 👍"
    # An invalid byte does not change what came before it.
    [the, cat] = [tokenizer(word, add_special_tokens=False).input_ids for word in ("the", "cat")]
    ids = [*the, *bytes_of(tokenizer, "日".encode()), *bytes_of(tokenizer, b"\xff"), *cat]
    assert "".join(pieces_of(tokenizer, ids)) == "the日\ufffd cat"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_tokens_without_text_cost_no_more(make: Any) -> None:
    """Special tokens and unknown ids, many in a row, leave what follows as it is."""
    tokenizer = make()
    words = tokenizer("hello the cat", add_special_tokens=False).input_ids
    for invisible in (tokenizer.eos_token_id, len(tokenizer) + 9):
        for count in (1, 5, 300):
            counted = Counted(tokenizer)
            ids = [*words, *[invisible] * count, *words]
            assert "".join(pieces_of(counted, ids)) == tokenizer.decode(words + words)
            assert counted.decoded < 30 * len(ids)


@pytest.mark.parametrize("make", [byte_level, byte_fallback, bundled_tokenizer])
def test_special_tokens_can_be_shown(make: Any) -> None:
    tokenizer = make()
    eos = tokenizer.eos_token
    ids = tokenizer(f"the{eos}{eos} cat{eos}", add_special_tokens=False).input_ids
    shown = "".join(pieces_of(tokenizer, ids, skip_special_tokens=False))
    assert shown == tokenizer.decode(ids)
    assert shown.count(eos) == 3


def test_many_long_stop_strings_take_linear_time() -> None:
    """Each character is read once, whatever the number and length of the strings."""
    stops = [f"{'ab' * 200}{index}" for index in range(300)]
    cutter = StopStringCutter(stops)
    text = "ab" * 3000
    returned = "".join(cutter.push(character) for character in text)
    assert returned + cutter.flush() == text
    assert len(text) - len(returned) <= 400
    assert not cutter.stopped
    cutter = StopStringCutter(stops)
    assert cutter.push("x" + "ab" * 201 + "7 and more") == "xab"
    assert cutter.stopped


def test_the_stop_string_that_is_complete_first_counts() -> None:
    """However the text comes in pieces."""
    for size in (1, 2, 3, 9):
        cutter = StopStringCutter(["abcd", "bc", "c"])
        text = "xabcd"
        pieces = [cutter.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert ("".join(pieces), cutter.stopped) == ("xa", True)


def test_tokenizers_of_their_own_decode_by_themselves() -> None:
    """The short way around transformers is for tokenizers that only pass ids on."""
    usual = bundled_tokenizer()
    ids = usual("The sky is blue .").input_ids
    assert decoder(usual).func == usual.backend_tokenizer.decode
    for skip in (True, False):
        whole = [*ids, usual.eos_token_id]
        wanted = decode(usual, whole, skip_special_tokens=skip)
        assert decoder(usual, skip_special_tokens=skip)(whole) == wanted

    class Shouting(type(usual)):  # type: ignore[misc]
        def _decode(self, *args: Any, **kwargs: Any) -> str:
            return super()._decode(*args, **kwargs).upper()

    shouting = copy.deepcopy(usual)
    shouting.__class__ = Shouting
    assert decoder(shouting)(ids) == decode(usual, ids).upper()
    patched = copy.deepcopy(usual)
    patched.decode = lambda ids, **options: "!"
    assert decoder(patched)(ids) == "!"
