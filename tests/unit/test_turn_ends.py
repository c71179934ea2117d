"""Where an answer in a chat ends, and settings that a checkpoint brings along."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import InvalidInputError, UnknownOptionError
from star_attention.hf.text.endings import turn_end_ids
from tests.talkers import (
    CHANNEL_TOKENS,
    CHANNELS,
    CHATML,
    CHATML_TOKENS,
    byte_level,
    say,
    talker,
)

MESSAGES = [{"role": "user", "content": "the cat sat on the mat\n"}]
NEXT_TURN = "hello<|im_end|>\n<|im_start|>user\nwhat"
MODES: list[dict[str, Any]] = [{}, dict(num_beams=2), dict(do_sample=True, seed=1)]


@pytest.fixture
def chatml() -> StarLLM:
    """A ChatML engine whose generation settings name `<|endoftext|>` alone."""
    star = talker(byte_level(chat=CHATML, eos="<|im_end|>"))
    star.model.generation_config.eos_token_id = 0
    return star


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams", "sampling"])
def test_the_tokenizers_eos_ends_an_answer_in_a_chat(chatml: StarLLM, mode: Any) -> None:
    """Forbids that the answer runs into an invented next turn."""
    options = mode | say(chatml.tokenizer, NEXT_TURN)
    reply = chatml.generate(chatml.encode(MESSAGES), "what", **options)
    assert (reply.text, reply.finish_reason) == ("hello", "stop")
    assert chatml.tokenizer.decode(reply.token_ids) == "hello<|im_end|>"


def test_it_ends_a_stream_and_a_prepared_answer(chatml: StarLLM) -> None:
    context = chatml.encode(MESSAGES)
    stream = chatml.stream(context, "what", **say(chatml.tokenizer, NEXT_TURN))
    assert ("".join(stream), stream.result.finish_reason) == ("hello", "stop")
    prepared = chatml.prepare(MESSAGES, "what", **say(chatml.tokenizer, NEXT_TURN))
    assert chatml.generate(chatml.encode(prepared), prepared).text == "hello"


def test_the_templates_own_end_ends_an_answer() -> None:
    """The tokenizer's end of sequence may be another token than the one the template writes."""
    star = talker(byte_level(chat=CHATML, eos="<|endoftext|>"))
    reply = star.generate(star.encode(MESSAGES), "what", **say(star.tokenizer, NEXT_TURN))
    assert (reply.text, reply.finish_reason) == ("hello", "stop")


def test_raw_text_and_explicit_ends_stay_as_they_are(chatml: StarLLM) -> None:
    tokenizer = chatml.tokenizer
    raw = chatml.generate(chatml.encode("the cat"), "what", **say(tokenizer, NEXT_TURN))
    assert (raw.text, raw.finish_reason) == ("hello\nuser\nwhat", "length")
    context = chatml.encode(MESSAGES)
    for options in (dict(ignore_eos=True), dict(eos_token_id=0), dict(eos_token_id=None)):
        reply = chatml.generate(context, "what", **options, **say(tokenizer, NEXT_TURN))
        assert (reply.text, reply.finish_reason) == ("hello\nuser\nwhat", "length")


def with_end(end: str) -> str:
    """A template that writes `end` after every message."""
    return "{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (with_end("<|im_end|>\n"), {"<|endoftext|>", "<|im_end|>"}),
        (with_end(" <|im_end|>"), {"<|endoftext|>", "<|im_end|>"}),
        (with_end("{{ eos_token }}"), {"<|endoftext|>"}),
        # Ordinary text, or nothing, after an answer.
        (with_end("\nthe"), {"<|endoftext|>"}),
        (with_end(""), {"<|endoftext|>"}),
        # Messages as parts alone; no assistant at all.
        (
            "{% for m in messages %}{% for p in m.content %}{{ p['text'] + '<|im_end|>' }}"
            "{% endfor %}{% endfor %}",
            {"<|endoftext|>", "<|im_end|>"},
        ),
        ("{{ raise_exception('no') }}", {"<|endoftext|>"}),
    ],
)
def test_the_end_of_a_turn(template: str, ends: set[str]) -> None:
    tokenizer = byte_level(chat=template, eos="<|endoftext|>")
    assert {tokenizer.convert_ids_to_tokens(token) for token in turn_end_ids(tokenizer)} == ends


def test_a_message_of_several_does_not_end_the_answer() -> None:
    """Forbids that gpt-oss ends after its analysis, whose end the template writes everywhere."""
    for eos in ("<|return|>", "<|end|>"):
        tokenizer = byte_level(CHANNEL_TOKENS, chat=CHANNELS, eos=eos)
        ends = {tokenizer.convert_ids_to_tokens(token) for token in turn_end_ids(tokenizer)}
        assert ends == {"<|return|>", "<|call|>"}


def test_a_turn_may_end_where_the_next_one_begins() -> None:
    """As with GLM-4: forbids an invented user, or an invented result of a tool."""
    roles = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|observation|>")
    glm = (
        "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    star = talker(byte_level(roles, chat=glm))
    for follower in ("<|user|>", "<|observation|>"):
        reply = star.generate(
            star.encode(MESSAGES), "what", **say(star.tokenizer, f"hello{follower}\nwhat")
        )
        assert (reply.text, reply.finish_reason) == ("hello", "stop")


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams", "sampling"])
def test_an_end_that_is_not_marked_as_special_is_no_text(mode: Any) -> None:
    """Forbids `hello<|im_end|>`; without the setting, the text is as the model wrote it."""
    tokenizer = byte_level(CHATML_TOKENS[:2], plain=("<|im_end|>",), chat=CHATML)
    star = talker(tokenizer)
    context = star.encode(MESSAGES)
    spoken = say(tokenizer, NEXT_TURN)
    reply = star.generate(context, "what", **mode, **spoken)
    assert (reply.text, reply.finish_reason) == ("hello", "stop")
    shown = say(tokenizer, NEXT_TURN) | dict(skip_special_tokens=False)
    assert star.generate(context, "what", **mode, **shown).text == "hello<|im_end|>"
    # An ordinary token that ends an answer is a part of it.
    (last,) = tokenizer(" world", add_special_tokens=False).input_ids
    spoken = say(tokenizer, "hello world what") | dict(eos_token_id=last)
    assert star.generate(context, "what", **mode, **spoken).text == "hello world"


def test_an_answer_of_special_tokens_alone_is_said(chatml: StarLLM) -> None:
    """Forbids an empty text without a word; an answer that ends at once has no tokens to show."""
    context, tokenizer = chatml.encode(MESSAGES), chatml.tokenizer
    empty = tokenizer.convert_tokens_to_ids(["<|im_start|>"] * 3)
    with pytest.warns(UserWarning, match="an answer of 3 tokens has no text.*skip_special_tokens"):
        reply = chatml.generate(context, "what", **say(tokenizer, empty))
    assert (reply.text, reply.finish_reason) == ("", "length")
    shown = chatml.generate(context, "what", skip_special_tokens=False, **say(tokenizer, empty))
    assert shown.text == "<|im_start|>" * 3
    for spoken, options in (("<|im_end|>", {}), ("hello", {"stop": "hello"})):
        reply = chatml.generate(context, "what", **options, **say(tokenizer, spoken))
        assert (reply.text, reply.finish_reason) == ("", "stop")


def test_a_stop_string_with_a_special_token_in_it_is_said(chatml: StarLLM) -> None:
    """Forbids a stop string without effect: the text has no special tokens."""
    context, tokenizer = chatml.encode(MESSAGES), chatml.tokenizer
    options: dict[str, Any] = dict(stop="lo<|im_end|>", ignore_eos=True)
    with pytest.warns(UserWarning, match=r"'lo<\|im_end\|>' never ends.*give '<\|im_end\|>' alone"):
        reply = chatml.generate(context, "what", **options, **say(tokenizer, NEXT_TURN))
    assert reply.text == "hello\nuser\nwhat"
    options["skip_special_tokens"] = False
    assert chatml.generate(context, "what", **options, **say(tokenizer, NEXT_TURN)).text == "hel"


# ------------------------------------------------------------------ settings of the checkpoint


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize(
    ("checkpoint", "options", "text"),
    [
        (["lo"], {}, "hel"),
        ("lo", {}, "hel"),
        (["<|im_end|>"], {}, "hello world"),
        # A call's own join them; an empty list turns them off.
        (["world"], dict(stop="lo"), "hel"),
        (["lo"], dict(stop="world"), "hel"),
        (["lo"], dict(stop=[]), "hello world what"),
        (["lo"], dict(ignore_eos=True), "hello world what"),
    ],
)
def test_stop_strings_of_the_checkpoint_end_an_answer(
    chatml: StarLLM, checkpoint: Any, options: Any, text: str, mode: Any
) -> None:
    config = chatml.model.generation_config
    config.stop_strings, config.eos_token_id = checkpoint, None
    spoken = say(chatml.tokenizer, "hello world<|im_end|> what")
    reply = chatml.generate(chatml.encode("the cat"), "what", **options, **mode, **spoken)
    assert reply.text == text
    assert reply.finish_reason == ("length" if text.endswith("what") else "stop")


def test_stop_strings_without_a_tokenizer_are_said() -> None:
    star = talker(byte_level())
    star.model.generation_config.stop_strings = ["lo"]
    bare = StarLLM(star.model, block_size=16)
    context = bare.encode([5, 6])
    with pytest.warns(UserWarning, match=r"sets stop_strings \['lo'\], which have no effect"):
        bare.generate(context, [7], max_new_tokens=1)
    bare.generate(context, [7], max_new_tokens=1, stop=[])


def test_stop_strings_that_cannot_work_are_named() -> None:
    star = talker(byte_level())
    context = star.encode("the cat")
    star.model.generation_config.stop_strings = [""]
    with pytest.raises(InvalidInputError, match=r"generation_config has stop_strings .*stop=\[\]"):
        star.generate(context, "what", max_new_tokens=1)
    star.generate(context, "what", max_new_tokens=1, stop=[])


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [("repetition_penalty", 1.05, 1.0), ("no_repeat_ngram_size", 3, 0)],
)
def test_a_penalty_of_the_checkpoint_is_said(name: str, value: Any, off: Any) -> None:
    """Answering from a document means repeating it."""
    star = talker(byte_level())
    setattr(star.model.generation_config, name, value)
    context = star.encode("the cat")
    with pytest.warns(UserWarning, match=f"generation_config sets {name} {value}, .*{name}={off}"):
        star.generate(context, "what", max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for chosen in (value, off):
            star.generate(context, "what", max_new_tokens=1, **{name: chosen})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("assistant_model", "prompt_lookup_num_tokens"),
        ("stream", "use stream"),
        ("streamer", "stream"),
        ("max_tokens", "max_new_tokens"),
        ("n", "num_return_sequences"),
        ("stop_token_ids", "eos_token_id"),
        ("logit_bias", "sequence_bias"),
    ],
)
def test_words_of_other_libraries_have_a_remedy(chatml: StarLLM, name: str, remedy: str) -> None:
    with pytest.raises(UnknownOptionError, match=f"does not take '{name}'; .*{remedy}"):
        chatml.generate(chatml.encode("the cat"), "what", **{name: 1})


def test_chatml_tokens_are_what_they_say() -> None:
    tokenizer = byte_level()
    assert [tokenizer.convert_tokens_to_ids(token) for token in CHATML_TOKENS] == [0, 1, 2]
