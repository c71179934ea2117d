"""Chat messages: context and query together have the ids of the whole conversation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from star_attention import EncodedContext, StarLLM, inputs
from star_attention.errors import ContextLengthError, InvalidInputError, TokenError
from star_attention.hf.loading.load import load_tokenizer
from tests.engines import BUNDLED, bundled_tokenizer, text_model

# Templates in the style of Llama 3 (which trims) and of ChatML take a message's content as one
# string.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im|>system\nYou help.<|end|>\n{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% endif %}"
)
# Newer templates join the text parts of a message.
PARTS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}[/]"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
BUNDLED_TEMPLATE = bundled_tokenizer().chat_template
TEMPLATES = {"bundled": BUNDLED_TEMPLATE, "llama": LLAMA, "chatml": CHATML, "parts": PARTS}

DOCUMENT = "Stars come out one after another.\nThe secret number for petal-signature is 5335582.\n"
QUESTION = "What is the secret number for petal-signature?"


def user(*texts: str) -> dict[str, Any]:
    if len(texts) == 1:
        return {"role": "user", "content": texts[0]}
    return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}


SYSTEM = {"role": "system", "content": "Answer from the text."}
ASSISTANT = {"role": "assistant", "content": "I have read it."}


def star_with(template: str) -> StarLLM:
    tokenizer = load_tokenizer(BUNDLED)
    tokenizer.chat_template = template
    return StarLLM(text_model(), tokenizer, block_size=16, anchor_size=16)


@pytest.fixture(params=TEMPLATES, ids=str)
def star(request: pytest.FixtureRequest) -> StarLLM:
    return star_with(TEMPLATES[request.param])


def rendered(star: StarLLM, messages: list[dict[str, Any]]) -> str:
    text: str = star.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return text


def whole_ids(star: StarLLM, text: str) -> list[int]:
    ids: list[int] = star.tokenizer(text, add_special_tokens=False).input_ids
    return ids


def prompt(star: StarLLM, context: EncodedContext, query: Any, **kwargs: Any) -> list[int]:
    """Return the ids of context and query, as the model sees them."""
    return context.token_ids.tolist() + inputs.prompt_ids(
        star.runtime, inputs.ContextInput.of(context), query, **kwargs
    )


@pytest.mark.parametrize("before", [[], [SYSTEM]], ids=["user", "system"])
@pytest.mark.parametrize("form", ["text", "messages", "part"])
def test_a_query_continues_an_open_message(
    star: StarLLM, before: list[dict[str, Any]], form: str
) -> None:
    """Document and question are one user message, however the question is given."""
    messages = [*before, user(DOCUMENT, QUESTION) if form == "part" else user(DOCUMENT)]
    query = {"text": QUESTION, "messages": [user(QUESTION)], "part": None}[form]
    is_bundled = star.tokenizer.chat_template == BUNDLED_TEMPLATE
    takes_parts = star.tokenizer.chat_template in (BUNDLED_TEMPLATE, PARTS)
    whole = rendered(
        star, [*before, user(DOCUMENT, QUESTION) if takes_parts else user(DOCUMENT + QUESTION)]
    )

    context = star.encode(messages)

    assert prompt(star, context, query) == whole_ids(star, whole)
    # The cut is right after the document: the text that introduces the question belongs to the
    # query.
    assert star.tokenizer.decode(context.token_ids).endswith(DOCUMENT)
    assert (
        context.token_ids.tolist().count(star.tokenizer.bos_token_id) == whole.count("<bos>") <= 1
    )
    if is_bundled and not before:
        assert context.token_ids.tolist() == star.encode(DOCUMENT).token_ids.tolist()
    reply = star.generate(context, query, max_new_tokens=3, ignore_eos=True)
    ids = whole_ids(star, whole)
    by_ids = star.generate(
        star.encode(ids[: len(context)]), ids[len(context) :], max_new_tokens=3, ignore_eos=True
    )
    assert reply.token_ids == by_ids.token_ids


def test_a_closed_turn_is_followed_by_a_new_message(star: StarLLM) -> None:
    messages = [SYSTEM, user(DOCUMENT), ASSISTANT]
    context = star.encode(messages)
    for query in (QUESTION, [user(QUESTION)]):
        assert prompt(star, context, query) == whole_ids(
            star, rendered(star, [*messages, user(QUESTION)])
        )
    assert DOCUMENT.strip() in star.tokenizer.decode(context.token_ids)
    assert ASSISTANT["content"] in star.tokenizer.decode(context.token_ids)


def test_a_query_may_be_a_conversation(star: StarLLM) -> None:
    messages = [SYSTEM, user(DOCUMENT), ASSISTANT]
    more = [user(QUESTION), {"role": "assistant", "content": "5335582"}, user("Are you sure?")]
    context = star.encode(messages)
    assert prompt(star, context, more) == whole_ids(star, rendered(star, messages + more))


def test_repeating_the_message_with_a_question_asks_the_question(star: StarLLM) -> None:
    context = star.encode([user(DOCUMENT, QUESTION)])
    again = [user(DOCUMENT, "Which key is there?")]
    assert prompt(star, context, again) == prompt(star, context, "Which key is there?")
    assert prompt(star, context, [user(DOCUMENT, QUESTION)]) == prompt(star, context, None)


def test_several_queries_on_one_chat(star: StarLLM) -> None:
    context = star.encode([user(DOCUMENT, QUESTION)])
    queries = [QUESTION, "Which key?", [user("Where?")]]
    batch = star.generate(context, queries, max_new_tokens=3, ignore_eos=True)
    alone = [star.generate(context, query, max_new_tokens=3, ignore_eos=True) for query in queries]
    assert [reply.token_ids for reply in batch] == [reply.token_ids for reply in alone]


def test_several_chats(star: StarLLM) -> None:
    chats = [[user(DOCUMENT)], [SYSTEM, user(DOCUMENT * 2, QUESTION)]]
    for together, alone in zip(
        star.encode(chats), [star.encode(chat) for chat in chats], strict=True
    ):
        assert together.token_ids.tolist() == alone.token_ids.tolist()
        assert together.chat == alone.chat


def test_the_answer_prefix_follows_the_start_of_the_answer(star: StarLLM) -> None:
    context = star.encode([user(DOCUMENT)])
    plain, prefixed = (
        prompt(star, context, QUESTION),
        prompt(star, context, QUESTION, answer_prefix="The secret"),
    )
    assert prefixed == plain + whole_ids(star, "The secret")


def test_an_open_chat_can_be_extended(star: StarLLM) -> None:
    more = "A letter lies unopened on the desk.\n"
    context, whole = (
        star.encode([SYSTEM, user(DOCUMENT)]),
        star.encode([SYSTEM, user(DOCUMENT + more)]),
    )
    extended = star.extend(context, more)
    assert prompt(star, extended, QUESTION) == prompt(star, whole, QUESTION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        star.generate(extended, QUESTION, max_new_tokens=1)
    with pytest.raises(InvalidInputError, match="closed turn"):
        star.extend(star.encode([user(DOCUMENT), ASSISTANT]), more)


def test_token_ids_are_used_unchanged(star: StarLLM) -> None:
    context = star.encode([user(DOCUMENT)])
    assert prompt(star, context, [7, 8]) == [*context.token_ids.tolist(), 7, 8]


def test_a_cut_that_changes_tokens_is_a_warning() -> None:
    star = star_with(CHATML)
    context = star.encode([user("The secret numb")])
    with pytest.warns(
        UserWarning, match=r"tokenized differently across the cut .*secret numb' \| 'er is 7"
    ):
        star.generate(context, "er is 7.", max_new_tokens=1)


def test_a_template_that_renders_the_context_differently_is_a_warning() -> None:
    star = star_with(CHATML)
    context = star.encode([user(DOCUMENT)])
    star.tokenizer.chat_template = CHATML.replace("You help", "Today is Tuesday")
    with pytest.warns(UserWarning, match="renders the context differently now"):
        star.generate(context, QUESTION, max_new_tokens=1)


@pytest.mark.parametrize(
    ("messages", "query", "error", "message"),
    [
        ([user(DOCUMENT)], None, InvalidInputError, "has no question of its own"),
        ([user(DOCUMENT)], "", TokenError, "the query is empty"),
        (
            [user(DOCUMENT)],
            [ASSISTANT],
            InvalidInputError,
            "must begin with a user message, not with role 'assistant'",
        ),
        ([{"role": "user", "content": []}], "x", InvalidInputError, "has no text"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "x",
            InvalidInputError,
            "type image",
        ),
        ([{"role": "user"}], "x", InvalidInputError, "has no text"),
    ],
)
def test_bad_messages_are_refused(
    star: StarLLM, messages: Any, query: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        star.generate(star.encode(messages), query, max_new_tokens=1)


def test_a_chat_query_that_would_fail_is_refused_before_encoding(star: StarLLM) -> None:
    """Counting the template's own tokens, and for a question that is part of the messages."""
    context = star.encode([user(DOCUMENT)])
    after = inputs.ContextInput.of(context)
    room = 2048 - len(context) - len(inputs.prompt_ids(star.runtime, after, QUESTION))
    for kwargs in (dict(query=QUESTION), dict(query=[QUESTION, "x"]), dict(query=[user(QUESTION)])):
        assert star.encode([user(DOCUMENT)], **kwargs, settings=dict(max_new_tokens=room))
        with pytest.raises(ContextLengthError, match="more than the model's 2,048 positions"):
            star.encode([user(DOCUMENT)], **kwargs, settings=dict(max_new_tokens=room + 1))
    with pytest.raises(ContextLengthError):
        star.encode([user(DOCUMENT, QUESTION)], settings=dict(max_new_tokens=room + 99))
    with pytest.raises(InvalidInputError, match="has no question of its own"):
        star.encode([user(DOCUMENT)], settings={})


def test_messages_need_a_template_and_a_chat_context() -> None:
    star = star_with(LLAMA)
    with pytest.raises(
        InvalidInputError, match="a query of chat messages needs a context of chat messages"
    ):
        star.generate(star.encode(DOCUMENT), [user(QUESTION)])
    star.tokenizer.chat_template = None
    with pytest.raises(InvalidInputError, match="no chat template"):
        star.encode([user(DOCUMENT)])
    with pytest.raises(InvalidInputError, match="chat messages need a tokenizer"):
        StarLLM(text_model()).encode([user(DOCUMENT)])
    with pytest.raises(InvalidInputError, match="does not render the user's text exactly once"):
        star_with("{{ messages[0]['role'] }}").encode([user(DOCUMENT)])
