"""The pipeline with kvpress' interface, and `supported`."""

from __future__ import annotations

from typing import Any

import pytest

import star_attention
from star_attention import StarLLM, pipeline, supported
from star_attention.errors import (
    ContextLengthError,
    InvalidInputError,
    ModelNotFoundError,
    TokenError,
    UnknownOptionError,
    UnsupportedModelError,
)
from tests.engines import BUNDLED, bundled_model, bundled_tokenizer, text_model
from tests.families import FAMILIES, REFUSED, UNUSUAL, build

TEXT = (
    "Stars come out one after another.\nThe secret number for petal-signature is 5335582.\n"
    "A letter lies unopened on the desk.\nThe secret number for summery-fillet is 3821004.\n"
)
QUESTIONS = [
    "What is the secret number for petal-signature?",
    "What is the secret number for summery-fillet?",
]
NUMBERS = ["5335582", "3821004"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline(bundled_model(), bundled_tokenizer(), block_size=64)


def test_one_question_gives_an_answer(pipe: Any) -> None:
    result = pipe(TEXT, QUESTIONS[0])
    assert list(result) == ["answer", "finish_reason"]
    assert result["finish_reason"] == "stop"
    assert NUMBERS[0] in result["answer"]


def test_several_questions_give_answers_in_their_order(pipe: Any) -> None:
    answers = pipe(TEXT, questions=QUESTIONS)["answers"]
    assert [number in answer for number, answer in zip(NUMBERS, answers, strict=True)] == [
        True,
        True,
    ]
    assert answers == [pipe(TEXT, question)["answer"] for question in QUESTIONS]
    single = pipe(TEXT, questions=QUESTIONS[:1])
    assert single == {"answers": answers[:1], "finish_reasons": ["stop"]}


def test_an_answer_that_was_cut_says_so(pipe: Any) -> None:
    """Forbids an end that nobody notices."""
    assert pipe(TEXT, QUESTIONS[0], max_new_tokens=3)["finish_reason"] == "length"
    quick = pipeline(text_model(), bundled_tokenizer(), block_size=64)
    with pytest.warns(UserWarning, match="ended at the default of 256 tokens; give max_new_tokens"):
        result = quick(TEXT, questions=QUESTIONS, ignore_eos=True)
    assert result["finish_reasons"] == ["length", "length"]


def test_several_answers_to_a_question(pipe: Any) -> None:
    sampling: dict[str, Any] = dict(num_return_sequences=2, temperature=0.5, seed=1)
    result = pipe(TEXT, questions=QUESTIONS, **sampling)
    assert [len(answers) for answers in result["answers"]] == [2, 2]
    first = pipe(TEXT, QUESTIONS[0], **sampling)
    assert first["answer"] == result["answers"][0]
    assert first["finish_reason"] == result["finish_reasons"][0]


def test_the_answer_prefix_is_not_part_of_the_answer(pipe: Any) -> None:
    answer = pipe(TEXT, QUESTIONS[1], answer_prefix="The secret number for summery-fillet is")[
        "answer"
    ]
    assert answer.strip() == NUMBERS[1]


def test_without_the_template_the_question_follows_the_text(pipe: Any) -> None:
    # This is how the template renders a question.
    raw = pipe(TEXT, f"<|q|>{QUESTIONS[0]}<|a|>", chat=False)
    assert raw == pipe(TEXT, QUESTIONS[0])


def test_arguments_of_generate_are_passed_on(pipe: Any) -> None:
    assert (
        len(bundled_tokenizer()(pipe(TEXT, QUESTIONS[0], max_new_tokens=3)["answer"]).input_ids)
        <= 4
    )
    with pytest.raises(
        UnknownOptionError, match="does not take 'temprature'; did you mean 'temperature'"
    ):
        pipe(TEXT, QUESTIONS[0], temprature=1.0)


@pytest.mark.parametrize("chat", [None, False])
def test_nothing_is_encoded_in_vain(pipe: Any, chat: bool | None) -> None:
    forwards: list[int] = []
    handle = pipe.star.model.get_decoder().register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with pytest.raises(
            ContextLengthError, match=r"query and answer \(65,536\) need .* lower max_new_tokens"
        ):
            pipe(TEXT, questions=QUESTIONS, max_new_tokens=65536, chat=chat)
        with pytest.raises(UnknownOptionError):
            pipe(TEXT, QUESTIONS[0], temprature=1.0, chat=chat)
    finally:
        handle.remove()
    assert forwards == []


def test_a_pipeline_around_a_folder_or_an_engine() -> None:
    by_path = pipeline(str(BUNDLED), dtype="float32", device="cpu", block_size=64)
    by_engine = pipeline(StarLLM(bundled_model(), bundled_tokenizer(), block_size=64))
    assert by_path(TEXT, QUESTIONS[0]) == by_engine(TEXT, QUESTIONS[0])
    with pytest.raises(InvalidInputError, match="has a tokenizer and settings of its own"):
        pipeline(by_engine.star, block_size=3)


def test_bad_questions_are_refused(pipe: Any) -> None:
    for kwargs in ({}, dict(question="a", questions=["b"])):
        with pytest.raises(InvalidInputError, match="either question"):
            pipe(TEXT, **kwargs)
    for kwargs in (dict(question=""), dict(questions=[]), dict(questions=["a", ""])):
        with pytest.raises(TokenError, match="a question is empty"):
            pipe(TEXT, **kwargs)


# -------------------------------------------------------------------------------------- supported


@pytest.mark.parametrize("name", [*FAMILIES, *UNUSUAL])
def test_families_that_run_are_supported(name: str) -> None:
    config = (FAMILIES | UNUSUAL)[name]()
    assert supported(config)
    assert str(supported(config)) == "supported"
    assert supported(build(name)).reasons == ()


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_run_say_why(name: str) -> None:
    """A config, its model and the engine give the same reasons."""
    by_config, model = supported(REFUSED[name]()), build(name)
    assert not by_config
    assert all(len(reason) > 20 for reason in by_config.reasons)
    assert str(by_config) == "not supported: " + "; ".join(by_config.reasons)
    assert not supported(model)
    with pytest.raises(UnsupportedModelError) as caught:
        StarLLM(model)
    assert caught.value.reasons == list(supported(model).reasons)


def test_supported_takes_a_path() -> None:
    assert supported(BUNDLED)
    assert supported(str(BUNDLED))
    with pytest.raises(ModelNotFoundError):
        supported("no/such/folder/here")


def test_supported_takes_other_modules() -> None:
    import torch

    assert not supported(torch.nn.Linear(2, 3))


def test_the_public_names_are_there() -> None:
    for name in star_attention.__all__:
        assert getattr(star_attention, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = star_attention.nothing
    assert text_model().config.vocab_size == len(bundled_tokenizer())
