"""Context and query together have the token ids of the joined text, wherever the cut lies."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from star_attention import EncodedContext, StarLLM
from star_attention.hf.text import joining, special
from star_attention.hf.text.reading import Reader
from star_attention.hf.text.tokens import context_ids
from star_attention.storage import writing
from tests.engines import bundled_tokenizer, stock_generate
from tests.tokenizers_by_family import FAMILIES, MORE_FAMILIES, tokenizer_of

ENDS = [
    "The cat", "The cat.", "The cat ", "The cat\n", "The cat.\n", "The cat. \n", "The cat\r\n",
    "The cat\n\n", "The cat.\r\n\r\n", "The cat  ", "The cat\n \n", "The cat:", 'The "cat"\t',
    "The cat\n" * 40, "The cat" + " " * 300, "12 ", "The cat é\n", "The cat\x01\n",
]  # fmt: skip
QUERIES = ["What is", " What", "  what", "\nwhat", "\n\nwhat", "\r\nwhat", "\n", "\t1", "é", "\x01"]
SPACE = tuple(" \r\n\t")


@functools.cache
def model_of(family: str) -> LlamaForCausalLM:
    """A small random model of a family's vocabulary; a test may not change it."""
    config = LlamaConfig(
        vocab_size=len(tokenizer_of(family)),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=4,
        pad_token_id=5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def star_of(family: str, **settings: Any) -> StarLLM:
    return StarLLM(model_of(family), tokenizer_of(family), method="dense", **settings)


def seen(star: StarLLM, context: EncodedContext, query: Any, **kwargs: Any) -> list[int]:
    """Return the ids that the model sees before its answer."""
    rows: list[list[int]] = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            rows.append(input_ids[0].tolist())
            return scores

    star.generate(context, query, max_new_tokens=1, logits_processor=[Look()], **kwargs)
    return rows[0]


@pytest.mark.filterwarnings("ignore:the tokenizer does not know all characters")
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_joined_ids(family: str) -> None:
    """Forbids tokens across the cut that the joined text does not have, without a word."""
    tokenizer = tokenizer_of(family)
    reader = Reader(tokenizer)
    for text in ENDS:
        ids, end = reader.raw_context(reader.raw(text, "context"))
        assert end is not None
        for query in QUERIES:
            more, is_joined = joining.following_ids(tokenizer, end, reader.raw(query, "query"))
            same = ids + more == context_ids(tokenizer, text + query)
            assert is_joined == same, (text[-8:], query)
            # Letters may go on inside of a word; nothing else may differ.
            assert same or not (text.endswith(SPACE) or query.startswith(SPACE)), (text, query)


@pytest.mark.parametrize("count", [1, 99, 100, 400, 5000])
@pytest.mark.parametrize("space", [" ", "\n", " \n"])
@pytest.mark.parametrize("text", ["The cat sat", "The cat sat.", "12", "x" * 1200 + "."])
@pytest.mark.parametrize("family", ["stripped", "stripped on the right", "llama3"])
def test_long_white_space_at_the_end(family: str, text: str, space: str, count: int) -> None:
    """Forbids the ids of `sat` and `what` where a tokenizer that strips ends has seen spaces."""
    tokenizer = tokenizer_of(family)
    reader = Reader(tokenizer)
    text += space * count
    ids, end = reader.raw_context(reader.raw(text, "context"))
    assert end is not None
    for query in ("what", "\nwhat", ". It"):
        more, is_joined = joining.following_ids(tokenizer, end, reader.raw(query, "query"))
        assert is_joined
        assert ids + more == context_ids(tokenizer, text + query)


@pytest.mark.filterwarnings("ignore:the tokenizer does not know all characters")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_context_without_what_follows_has_its_own_ids(family: str) -> None:
    """Token ids as a query follow the ids of the whole context, those held back included."""
    tokenizer = tokenizer_of(family)
    for text in ENDS:
        ids, end = Reader(tokenizer).raw_context(Reader(tokenizer).raw(text, "context"))
        assert end is not None
        assert ids + end.held_ids == context_ids(tokenizer, text)
        assert end.text.text[end.encoded :] == text[len(text) - len(end.text) + end.encoded :]


def test_the_bundled_tokenizer_holds_back_nothing_after_a_line_break() -> None:
    """Token counts stay what they are where no token depends on what follows."""
    tokenizer = bundled_tokenizer()
    for text in ("The cat.\n", "The cat\n\n", "The cat:", "The cat"):
        ids, end = Reader(tokenizer).raw_context(Reader(tokenizer).raw(text, "context"))
        assert ids == tokenizer(text).input_ids
        assert end is not None
        assert end.held_ids == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "query"),
    [
        ("The cat sat.\n" * 3, "What is the number?"),
        ("The cat sat on the mat ", "What is"),
        ("The cat sat.", "\n\nWhat is"),
        ("The cat sat\r\n", "\nWhat is"),
        ("The cat. \n", "What"),
    ],
)
def test_dense_answers_are_the_models_own(family: str, text: str, query: str) -> None:
    """The plain model on the joined text gives the same tokens, and nobody is warned."""
    star = star_of(family)
    context = star.encode(text)
    joined = context_ids(star.tokenizer, text + query)
    assert seen(star, context, query) == joined
    (expected,), _ = stock_generate(star.model, joined, max_new_tokens=6, do_sample=False)
    reply = star.generate(context, query, max_new_tokens=6)
    assert reply.token_ids == expected
    # In a batch, and with a prefix of the answer, which is a part of the joined text.
    other = star.generate(context, ["The", query], max_new_tokens=6)[1]
    assert other.token_ids == expected
    prefixed = context_ids(star.tokenizer, text + query + " is")
    assert seen(star, context, query, answer_prefix=" is") == prefixed


@pytest.mark.parametrize("family", FAMILIES)
def test_extensions_are_joined(family: str) -> None:
    star = star_of(family)
    for parts in (
        ["The cat sat.\n", "What is", " it?\n"],
        ["The cat. ", "What ", "\n", "\n", "is"],
        ["The cat", " ", " ", "sat"],
    ):
        context = star.encode(parts[0])
        for part in parts[1:]:
            context = star.extend(context, part)
        whole = star.encode("".join(parts))
        assert context.token_ids.tolist() == whole.token_ids.tolist()
        assert seen(star, context, "\nwhat") == context_ids(
            star.tokenizer, "".join([*parts, "\nwhat"])
        )
        torch.testing.assert_close(star.logits(context, [7]), star.logits(whole, [7]))


def test_token_ids_follow_what_is_held_back() -> None:
    star = star_of("gpt2")
    context = star.encode("The cat ")
    whole = context_ids(star.tokenizer, "The cat ")
    assert len(context) == len(whole) - 1
    assert seen(star, context, [7, 8]) == [*whole, 7, 8]
    assert star.extend(context, [7]).token_ids.tolist() == [*whole, 7]
    expected = star.logits(star.encode(whole), [7, 8])
    torch.testing.assert_close(star.logits(context, [7, 8]), expected)


def test_a_text_follows_token_ids() -> None:
    """Forbids a dummy space between a context of ids and a query of text."""
    star = star_of("llama2")
    ids = context_ids(star.tokenizer, "The cat.\n")
    joined = context_ids(star.tokenizer, "The cat.\nWhat is")
    assert seen(star, star.encode(ids), "What is") == joined
    assert seen(star, star.encode(ids), joined[len(ids) : -1], answer_prefix=" is") == joined
    assert star.extend(star.encode(ids), "What is").token_ids.tolist() == joined


def test_prepared_and_batched_contexts_hold_back_their_own() -> None:
    star = star_of("gpt2")
    texts = ["The cat ", "The cat.\n", "The cat"]
    for text, context in zip(texts, star.encode(texts), strict=True):
        assert seen(star, context, " what") == context_ids(star.tokenizer, text + " what")
    prepared = star.prepare(texts[0], "what")
    assert prepared.prompts == [context_ids(star.tokenizer, "The cat what")[2:]]
    reply = star.generate(star.encode(prepared), prepared)
    assert reply.query_tokens == len(prepared.prompts[0])
    with pytest.raises(ValueError, match="prepared for another context"):
        star.generate(star.encode("The cat"), prepared)


def test_saved_contexts_hold_back_the_same(tmp_path: Path) -> None:
    star = star_of("llama2")
    context = star.encode("The cat. ")
    context.save(tmp_path / "x.star")
    loaded = star.load_context(tmp_path / "x.star")
    assert seen(star, loaded, "what") == context_ids(star.tokenizer, "The cat. what")


def test_saved_contexts_of_earlier_versions_load(tmp_path: Path) -> None:
    """They have no end: what follows is joined to the text of their ids."""
    star = star_of("llama2")
    whole = star.encode(context_ids(star.tokenizer, "The cat.\n"))
    assert whole.end is None
    header = "star_attention.storage.context.writing.write"
    with pytest.MonkeyPatch.context() as patch:
        write = writing.write
        patch.setattr(
            header,
            lambda path, values, tensors: write(
                path, {name: values[name] for name in values if name != "end"}, tensors
            ),
        )
        whole.save(tmp_path / "x.star")
    loaded = star.load_context(tmp_path / "x.star")
    assert seen(star, loaded, "What is") == context_ids(star.tokenizer, "The cat.\nWhat is")


def test_a_word_across_the_cut_is_one_warning() -> None:
    """Forbids a warning for every query, and one that no filter silences."""
    star = star_of("gpt2")
    context = star.encode("The secret numb")
    with pytest.warns(UserWarning, match=r"across the cut .*' secret numb' \| 'er is'") as record:
        star.generate(context, ["er is", "er was"], max_new_tokens=1)
    assert len(record) == 1
    star.generate(context, "er is", max_new_tokens=1)
    with pytest.warns(UserWarning, match=r"between context and extension \(.*\| 'er is'"):
        star.extend(context, "er is")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        star.generate(star.encode("The secret numb"), "er is", max_new_tokens=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_chats_are_joined(family: str) -> None:
    """Forbids the dummy space and the split line breaks of two parts of a chat."""
    star = star_of(family)
    for text in ("The cat.\n", "The cat\r\n", "The cat. ", "The cat\n\n", "The cat."):
        context = star.encode([{"role": "user", "content": text}])
        for query in ("\nWhat is", " what", *(["What is"] if text[-1] != "." else [])):
            expected = rendered_ids(star, text + query)
            assert seen(star, context, query) == expected
        extended = star.extend(context, "\n It ")
        assert seen(star, extended, "is") == rendered_ids(star, text + "\n It is")


def rendered_ids(star: StarLLM, text: str) -> list[int]:
    """Return the ids of a message, rendered and tokenized in one piece."""
    rendered = star.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return special.plain_ids(star.tokenizer, rendered)
