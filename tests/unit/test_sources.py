"""Sources: the passages that an answer attended to most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import EncodedContext, Generation, StarLLM
from star_attention.demo.haystack import build_haystack
from star_attention.errors import InvalidInputError
from tests.engines import (
    CONTEXT,
    QUERY,
    VARIED,
    bundled_model,
    bundled_tokenizer,
    engine,
    ids,
    tiny,
)
from tests.second_look_oracle import attention_mass

RUN = 32
LAW: dict[str, Any] = dict(block_size=16, anchor_size=5)


def best_runs(name: str, query: list[int], answer: list[int], context: EncodedContext) -> Any:
    """Return the two runs of 32 tokens with most attention, and their shares, by the oracle."""
    context_ids = ids(CONTEXT)

    def mass(*text: int) -> torch.Tensor:
        law = LAW | dict(context_len=CONTEXT, rope_length=context.rope_length)
        whole = [*context_ids, *text]
        return attention_mass(tiny(name), whole, query_len=len(text), **law)

    usual, of_query = mass(context_ids[-1]), mass(*query[:-1])
    drawn = mass(*query, *answer[:-1]) - of_query
    more = (of_query / (len(query) - 1) + drawn / len(answer)) / 2 - usual
    more[0] = 0.0
    sums = torch.stack([part.sum() for part in more.clamp(min=0).split(RUN)])
    order = sums.argsort(descending=True)[:2].tolist()
    return order, [float(sums[number] / sums.sum()) for number in order]


@pytest.mark.parametrize("name", VARIED)
def test_weights_are_shares_of_the_models_own_probabilities(name: str) -> None:
    """Forbids other weights: without learned sinks, outside of windows, or of other rows."""
    star = engine(name, tokens_per_forward=9, reserve_tokens=64, **LAW)
    context, query = star.encode(ids(CONTEXT)), ids(QUERY, seed=2)
    options: dict[str, Any] = dict(max_new_tokens=5, ignore_eos=True)
    plain = star.generate(context, query, **options)
    reply = star.generate(context, query, sources=2, **options)
    assert reply.token_ids == plain.token_ids
    order, weights = best_runs(name, query, reply.token_ids, context)
    if abs(order[0] - order[1]) == 1:
        # They touch.
        order, weights = [min(order)], [sum(weights)]
        assert [source.stop - source.start for source in reply.sources or ()] != [RUN, RUN]
    assert [source.start for source in reply.sources or ()] == [RUN * n for n in order]
    found = [source.weight for source in reply.sources or ()]
    assert found == pytest.approx(weights, abs=2e-3)
    assert all(source.text == "" and source.start_char is None for source in reply.sources or ())
    assert plain.sources is None
    assert plain.timings.sources_s is None
    assert (reply.timings.sources_s or 0) > 0


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM(bundled_model(), bundled_tokenizer())


@pytest.mark.parametrize("settings", [{}, dict(method="dense"), dict(kv_dtype="fp8")])
def test_a_planted_fact_is_the_first_source(star: StarLLM, settings: dict[str, Any]) -> None:
    haystack = build_haystack(star.tokenizer, 600, facts=4, seed=1)
    star = star.with_config(**settings)
    context = star.encode(haystack.text)
    queries = [fact.query(star.tokenizer) for fact in haystack.facts]
    replies = star.generate(context, queries, sources=True, max_new_tokens=8, stop="\n")
    for fact, reply in zip(haystack.facts, replies, strict=True):
        assert fact.matches(reply.text)
        assert fact.line.strip() in reply.sources[0].text
        check(reply, haystack.text)


def check(reply: Generation, text: str) -> None:
    assert reply.sources is not None
    weights = [source.weight for source in reply.sources]
    assert weights == sorted(weights, reverse=True)
    assert 0 < sum(weights) <= 1
    for source in reply.sources:
        assert text[source.start_char : source.stop_char] == source.text != ""


TEXT = (
    "Stars come out one after another.\nThe secret number for petal-signature is 5335582.\n"
    "The caf\u00e9 of Z\u00fcrich \U0001f408 is closed. The moon is far.\n"
)
QUESTION = "<|q|>What is the secret number for petal-signature?<|a|>"
FACT = "The secret number for petal-signature is 5335582."


@pytest.fixture(scope="module")
def context(star: StarLLM) -> EncodedContext:
    context: EncodedContext = star.encode(TEXT)
    return context


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=2),
        dict(second_look=0.3),
        dict(num_beams=2, second_look=0.3),
        dict(do_sample=True, seed=1, temperature=0.1),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=["beams", "look", "beams and look", "sampled", "drafts"],
)
def test_every_kind_of_answer_has_sources(
    star: StarLLM, context: EncodedContext, options: dict[str, Any]
) -> None:
    reply = star.generate(context, QUESTION, sources=1, max_new_tokens=12, **options)
    (source,) = reply.sources
    assert FACT in source.text
    check(reply, TEXT)


def test_several_answers_have_their_own_sources(star: StarLLM, context: EncodedContext) -> None:
    sampled: dict[str, Any] = dict(do_sample=True, temperature=8.0, num_return_sequences=2, seed=1)
    replies = star.generate(context, [QUESTION, "moon"], sources=2, max_new_tokens=9, **sampled)
    found = {tuple(reply.token_ids): reply.sources for answers in replies for reply in answers}
    assert len(set(found.values())) > 1
    assert all(sources is not None and len(sources) <= 2 for sources in found.values())


def test_streams_have_sources_at_their_end(star: StarLLM, context: EncodedContext) -> None:
    right = star.generate(context, QUESTION, sources=True).sources
    with star.stream(context, QUESTION, sources=True) as stream:
        assert "".join(stream) == stream.result.text
    assert stream.result.sources == right
    with star.stream(context, QUESTION, sources=True) as stream:
        next(stream)
    assert stream.result.sources is None, "closed before its end"


def test_kept_and_extended_contexts_have_the_same_sources(star: StarLLM, tmp_path: Path) -> None:
    whole = star.generate(star.encode(TEXT), QUESTION, sources=2)
    star.encode(TEXT).save(tmp_path / "saved.star")
    loaded = star.generate(star.load_context(tmp_path / "saved.star"), QUESTION, sources=2)
    assert loaded.sources == whole.sources
    extended = star.extend(star.encode("It is night.\n"), TEXT)
    check(star.generate(extended, QUESTION, sources=2), "It is night.\n" + TEXT)
    by_ids = star.generate(star.encode(star.encode(TEXT).token_ids), QUESTION, sources=2)
    assert by_ids.sources[0].start_char is None
    assert FACT in by_ids.sources[0].text


def test_a_dropped_middle_has_no_sources(star: StarLLM) -> None:
    text = FACT + "\n" + "The sun is hot today.\n" * 30 + TEXT
    star = star.with_config(method="streaming_llm", block_size=64, anchor_size=4)
    reply = star.generate(star.encode(text), QUESTION, sources=9, max_new_tokens=9)
    check(reply, text)
    assert FACT in reply.sources[0].text
    assert reply.sources[0].start_char > len(FACT) + 600


def test_chats_count_the_characters_of_messages(star: StarLLM) -> None:
    messages = [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": [{"type": "text", "text": " " + TEXT}]},
    ]
    context = star.encode(messages)
    question = "What is the secret number for petal-signature?"
    source = star.generate(context, question, sources=1).sources[0]
    assert source.message == 1
    assert (" " + TEXT)[source.start_char : source.stop_char] == source.text
    assert FACT in source.text


def test_json_answers_have_sources(star: StarLLM, context: EncodedContext) -> None:
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    reply = star.generate(context, QUESTION, json_schema=schema, sources=2, max_new_tokens=40)
    assert reply.text.startswith("{")
    check(reply, TEXT)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1, "sources -1 is below 0; give the most passages to name, or 0 for none"),
        ("yes", "sources 'yes': expected a bool or an int, got str; give True for 3"),
        (1.5, "sources 1.5: expected a bool or an int, got float"),
        (None, "sources None: expected a bool or an int, got NoneType"),
    ],
)
def test_other_values_are_refused(
    star: StarLLM, context: EncodedContext, value: Any, message: str
) -> None:
    with pytest.raises(InvalidInputError) as error:
        star.generate(context, QUESTION, sources=value)
    assert message in str(error.value).replace('"', "'")


def test_a_notebook_shows_them(star: StarLLM, context: EncodedContext) -> None:
    reply = star.generate(context, QUESTION, sources=1)
    page = reply._repr_html_()
    assert f"source, weight {reply.sources[0].weight:.2f}" in page
    assert FACT in page
    assert reply.as_dict()["sources"] == [reply.sources[0].as_dict()]
    assert star.generate(context, QUESTION, sources=0).sources is None
