"""Answers that follow a JSON schema."""

from __future__ import annotations

import builtins
import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from star_attention import EncodedContext, StarLLM
from star_attention.errors import InvalidInputError, MissingPackageError, UnknownOptionError
from star_attention.generation.json_answers import JsonProcessor, compile_schema
from tests.command_line import MODEL, failed, ok
from tests.talkers import CHANNEL_TOKENS, CHANNELS, CHATML, byte_level, say, talker

xgrammar = pytest.importorskip("xgrammar")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["otter", "cat"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "number"],
}
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
CLOSED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
MESSAGES = [{"role": "user", "content": "the cat sat on the mat\n"}]


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return talker(byte_level())


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode("the cat sat on the mat")
    return context


def check(text: str) -> None:
    value = json.loads(text)
    assert value["name"] in ("otter", "cat")
    assert 0 <= value["number"] <= 99
    assert "\n" not in text


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=5.0, seed=3),
        dict(repetition_penalty=1.5),
        dict(top_k=3, seed=1),
        dict(second_look=0.5),
    ],
    ids=["greedy", "hot", "penalty", "top_k", "second look"],
)
def test_an_answer_follows_the_schema(
    star: StarLLM, context: EncodedContext, options: dict[str, Any]
) -> None:
    """A random model would never write JSON of itself."""
    plain = star.generate(context, "what", max_new_tokens=60, **options)
    with pytest.raises(json.JSONDecodeError):
        json.loads(plain.text)
    reply = star.generate(context, "what", json_schema=SCHEMA, max_new_tokens=60, **options)
    check(reply.text)
    assert reply.finish_reason == "stop"
    with star.stream(context, "what", json_schema=SCHEMA, max_new_tokens=60, **options) as stream:
        assert "".join(stream) == reply.text


def test_each_row_has_a_json_of_its_own(star: StarLLM, context: EncodedContext) -> None:
    """Rows end one after another, in a batch and as several answers."""
    options: dict[str, Any] = dict(json_schema=SCHEMA, max_new_tokens=60, temperature=3.0, seed=1)
    batch = star.generate(context, ["what", "the secret", "a"], **options)
    for query, reply in zip(["what", "the secret", "a"], batch, strict=True):
        check(reply.text)
        assert reply.text == star.generate(context, query, **options).text
    several = star.generate(context, "what", num_return_sequences=6, **options)
    for reply in several:
        check(reply.text)
    assert len({len(reply.token_ids) for reply in several}) > 1


def test_a_pydantic_model_is_a_schema(star: StarLLM, context: EncodedContext) -> None:
    pydantic = pytest.importorskip("pydantic")
    number = pydantic.Field(ge=0, le=99)
    model = pydantic.create_model("Answer", number=(int, number), ok=(bool, ...))
    reply = star.generate(context, "what", json_schema=model, max_new_tokens=60)
    assert 0 <= model.model_validate_json(reply.text).number <= 99


def test_prepared_settings_can_be_used_again(star: StarLLM) -> None:
    prepared = star.prepare("the cat", "what", json_schema=SCHEMA, max_new_tokens=60)
    context = star.encode(prepared)
    first, second = (star.generate(context, prepared).text for _ in range(2))
    check(first)
    assert first == second


@pytest.mark.parametrize("plain", [("<think>", "</think>"), ()], ids=["tokens", "text"])
def test_reasoning_that_the_prompt_opened_comes_first(plain: tuple[str, ...]) -> None:
    star = talker(byte_level(plain=plain, chat=OPENED, eos="<|im_end|>"))
    spoken = say(star.tokenizer, 'the cat</think>{"name": "otter", "number": 7}<|im_end|>')
    reply = star.generate(star.encode(MESSAGES), "what", json_schema=SCHEMA, **spoken)
    assert (reply.text, reply.reasoning) == ('{"name": "otter", "number": 7}', "the cat")


JSON_TEXT = '{"name": "otter", "number": 7}'


@pytest.mark.parametrize("plain", [("<think>", "</think>"), ()], ids=["tokens", "text"])
@pytest.mark.parametrize("chat", [CHATML, CLOSED], ids=["open", "closed"])
def test_a_model_may_choose_to_reason_first(plain: tuple[str, ...], chat: str) -> None:
    """Forbids that a model which always thinks has to answer without."""
    star = talker(byte_level(plain=plain, chat="{# <think> #}" + chat, eos="<|im_end|>"))
    context = star.encode(MESSAGES)

    def ask(spoken: str) -> tuple[str, str | None]:
        options = prefer(star.tokenizer, spoken)
        reply = star.generate(context, "what", json_schema=SCHEMA, **options)
        return reply.text, reply.reasoning

    assert ask(JSON_TEXT + "<|im_end|>") == (JSON_TEXT, None)
    thinks = ask("<think>the <|im_end|>cat</think>" + JSON_TEXT + "<|im_end|>")
    if chat is CLOSED:
        # The template has ended the reasoning: the JSON comes at once.
        assert thinks[0].startswith("{")
        assert thinks[1] is None
    else:
        # An end of the turn would leave the answer without its JSON.
        assert thinks == (JSON_TEXT, "the cat")


def test_the_last_message_of_a_turn_is_json() -> None:
    star = talker(byte_level(CHANNEL_TOKENS, chat=CHANNELS))
    spoken = (
        "<|channel|>analysis<|message|>the cat<|end|>"
        f"<|start|>assistant<|channel|>final<|message|>{JSON_TEXT}<|return|>"
    )
    options = prefer(star.tokenizer, spoken)
    reply = star.generate(star.encode(MESSAGES), "what", json_schema=SCHEMA, **options)
    assert (reply.text, reply.reasoning) == (JSON_TEXT, "the cat")
    # Rows of a batch reason or not, each for itself.
    choices = [spoken, f"<|channel|>final<|message|>{JSON_TEXT}<|return|>"]
    options = prefer(star.tokenizer, *choices)
    replies = star.generate(star.encode(MESSAGES), ["a", "b"], json_schema=SCHEMA, **options)
    assert [reply.text for reply in replies] == [JSON_TEXT] * 2
    assert [reply.reasoning for reply in replies] == ["the cat", None]


class _Prefer(LogitsProcessor):
    """Make each row prefer the rest of a text; a token that a grammar forbids is passed over."""

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = texts
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clamp(-50, 50)
        for row, ids in enumerate(self.texts):
            rest = ids
            for token in input_ids[row, input_ids.shape[1] - self.steps :].tolist():
                if token in rest[:2]:
                    rest = rest[rest.index(token) + 1 :]
            for token, score in zip(rest[:2], (100.0, 99.0), strict=False):
                scores[row, token] = score
        self.steps += 1
        return scores


def prefer(tokenizer: Any, *texts: str) -> dict[str, Any]:
    """Arguments of `generate` that make row by row say a text where nothing forbids it."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return dict(logits_processor=LogitsProcessorList([_Prefer(ids)]), max_new_tokens=120)


def test_a_token_that_does_not_fit_is_refused(star: StarLLM, context: EncodedContext) -> None:
    """Another processor may force what the grammar has excluded."""
    grammar = compile_schema(SCHEMA, star.tokenizer, star.runtime.handle.vocab_size, {0})
    spoken = say(star.tokenizer, "hello world")["logits_processor"]
    processors = [JsonProcessor(grammar, [None]), *spoken]
    with pytest.raises(InvalidInputError, match="does not continue the JSON"):
        star.generate(context, "what", logits_processor=processors, max_new_tokens=5)


def test_a_grammar_is_compiled_once_for_copies_of_a_tokenizer(
    star: StarLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once more in the engine's thread, where all answers would wait for it."""
    compilers: list[Any] = []
    make = xgrammar.GrammarCompiler

    def counted(*arguments: Any, **options: Any) -> Any:
        compilers.append(make(*arguments, **options))
        return compilers[-1]

    monkeypatch.setattr(xgrammar, "GrammarCompiler", counted)
    schema = {"type": "object", "properties": {"copies": {"type": "integer"}}}
    for _ in range(3):
        tokenizer = copy.deepcopy(star.tokenizer)
        compile_schema(schema, tokenizer, star.runtime.handle.vocab_size, {0, 7})
    (compiler,) = compilers
    once = compiler.get_cache_size_bytes()
    assert 0 < once < 10**7
    assert compiler.cache_limit_bytes == 64 * 2**20


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{}", "expected a dict or a pydantic model, got str"),
        (int, "expected a dict or a pydantic model, got type"),
        ({"type": "nonsense"}, "json_schema cannot be followed: .*nonsense"),
        ({"enum": [object()]}, "not JSON serializable"),
    ],
)
def test_a_schema_that_cannot_work_is_refused(
    star: StarLLM, context: EncodedContext, schema: Any, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        star.generate(context, "what", json_schema=schema)
    with pytest.raises(InvalidInputError, match=message):
        star.check_settings(json_schema=schema)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_beams=2), "leave out beams"),
        (dict(min_new_tokens=3), "leave out .* min_new_tokens"),
        (dict(ignore_eos=True), "leave ignore_eos out"),
        (dict(eos_token_id=None), "needs an end-of-sequence token"),
    ],
)
def test_settings_that_exclude_a_schema(
    star: StarLLM, context: EncodedContext, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"json_schema .*{message}"):
        star.generate(context, "what", json_schema=SCHEMA, **options)


def test_it_needs_a_tokenizer_and_the_extra(star: StarLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = StarLLM(star.model, block_size=16)
    with pytest.raises(InvalidInputError, match="json_schema needs a tokenizer"):
        bare.generate(bare.encode([5, 6]), [7], json_schema=SCHEMA)
    for name in [name for name in sys.modules if name.split(".")[0] == "xgrammar"]:
        monkeypatch.delitem(sys.modules, name)
    real_import = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "xgrammar":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setitem(sys.modules, "xgrammar", None)
    monkeypatch.setattr(builtins, "__import__", without)
    other = talker(byte_level())
    with pytest.raises(MissingPackageError, match=r'pip install "star-attention\[json\]"'):
        other.check_settings(json_schema=SCHEMA)
    with pytest.raises(UnknownOptionError, match="use json_schema="):
        other.check_settings(response_format={})


def test_the_command_line_reads_a_schema(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("The secret number for otter is 42.\n", encoding="utf-8")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA), encoding="utf-8")
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    command = ["generate", *MODEL, "--chat", tmp_path / "book.txt", "--query", "What is it?"]
    check(ok(*command, "--json-schema", tmp_path / "schema.json").out.rstrip())
    assert "bad.json is not JSON: Expecting" in failed(
        *command, "--json-schema", tmp_path / "bad.json"
    )
