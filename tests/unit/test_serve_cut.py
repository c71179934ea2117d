"""Where prompts are cut: by files, marks and questions, and without changing a token."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.hf.text.rendered import RenderedText, shared_prefix
from star_attention.hf.text.special import rendered_ids
from star_attention.serve import cut
from star_attention.serve.cut import Document, ends_of_parts, likely_cut, named_cut, unmarked
from star_attention.serve.reading import cut_text
from tests.servers import quick_engine, running
from tests.talkers import CHATML, byte_level, talker

DOCUMENT = "A tale of the sea. " * 200
MARK = {"prompt_cache_breakpoint": {"mode": "explicit"}}


def part(text: str, **marks: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **marks}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def named(messages: list[dict[str, Any]]) -> tuple[str, str, float | None] | None:
    """Return the text before the cut that messages name, its rule and its ttl."""
    marked = unmarked(messages, lambda part: Document(text=part["file"]["file_data"]))
    rendered = "".join(
        f"<{message['role']}>"
        + (
            message["content"]
            if isinstance(message["content"], str)
            else "".join(part["text"] for part in message["content"])
        )
        for message in marked.messages
    )
    ends = ends_of_parts(rendered, marked.messages)
    found = named_cut(ends, marked.boundaries, marked.messages)
    return None if found is None else (rendered[: found[0]], found[1].rule, found[1].ttl)


def likely(*messages: dict[str, Any]) -> str | None:
    """Return what is after the cut in messages without marks."""
    rendered = "".join(f"<{message['role']}>" + "".join(cut.texts(message)) for message in messages)
    at = likely_cut(rendered, ends_of_parts(rendered, list(messages)), list(messages))
    return None if at is None else rendered[at:]


def test_the_last_mark_that_leaves_a_question() -> None:
    document = user(part("One. ", **MARK), part("Two. ", **MARK), part("Who?"))
    assert named([document]) == ("<user>One. Two. ", "mark", None)
    # A client that marks the end of its last message means what was before.
    document["content"][2] = part("Who?", cache_control={"type": "ephemeral"})
    assert named([document]) == ("<user>One. Two. ", "mark", None)
    assert named([user(part("One. "), part("Who?"))]) is None
    assert named([user(part("Who?", **MARK))]) is None


def test_marks_of_messages() -> None:
    system = {"role": "system", "content": "Be brief.", "cache_control": {"ttl": "1h"}}
    assert named([system, user("Who?")]) == ("<system>Be brief.", "mark", 3600.0)
    assert named([{**system, "cache_control": None}, user("Who?")]) is None


def test_a_file_comes_before_marks() -> None:
    file = {"type": "file", "file": {"file_data": "Text. "}}
    messages = [user(file, part("More. ", **MARK), part("Who?"))]
    assert named(messages) == ("<user>Text. ", "file", None)


def test_marks_reach_no_template() -> None:
    """Forbids that a template writes a mark into the prompt, and another key for the same text."""
    messages = [user(part("One. ", **MARK), part("Who?")), {"role": "x", "cache_control": 1}]
    assert "cache" not in str(unmarked(messages, str).messages)
    assert "prompt_cache_breakpoint" in str(messages)


@pytest.mark.parametrize(("ttl", "seconds"), [("30m", 1800), ("12h", 43200), ("90s", 90)])
def test_times_of_marks(ttl: str, seconds: float) -> None:
    assert cut.ttl_of({"ttl": ttl}) == seconds


@pytest.mark.parametrize("ttl", ["soon", 5, "5 m", "-1h"])
def test_times_that_are_none(ttl: object) -> None:
    with pytest.raises(InvalidInputError, match="expected a time such as 30m or 1h"):
        cut.ttl_of({"ttl": ttl})


def test_what_is_likely_to_come_again() -> None:
    assert likely(user(part("One. "), part("Two. "), part("Who?"))) == "Who?"
    assert likely(user("A text.\nIts end.\nWho?\n")) == "Who?\n"
    answer = {"role": "assistant", "content": "Nobody."}
    assert likely(user("A text. Who?"), answer, user("And when?")) == "<user>And when?"
    assert likely(user("A text. Who?")) is None
    assert likely({"role": "system", "content": "Be brief."}) is None


def test_instructions_that_a_template_takes_at_the_beginning_only() -> None:
    """Forbids refusing several system messages, or one in the middle, where they can be joined."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('system comes first') }}{% endif %}[{{ m.role }}]{{ m.content }}"
        "{% endfor %}"
    )
    star = talker(byte_level(chat=template))
    messages = [
        {"role": "developer", "content": "Be brief."},
        user("the cat"),
        {"role": "system", "content": "Be kind."},
        user("and what"),
    ]
    with running(star) as server:
        body = {"messages": messages, "max_tokens": 1}
        counted = server.post("/v1/chat/completions/input_tokens", body).json()
        assert server.post("/v1/chat/completions", body).status_code == 200
    text = "[system]Be brief.\n\nBe kind.[user]the cat[user]and what"
    assert counted["input_tokens"] == len(star.tokenizer(text).input_ids)


@pytest.fixture(scope="module", params=["bundled", "chatml"])
def star(request: pytest.FixtureRequest) -> StarLLM:
    return quick_engine() if request.param == "bundled" else talker(byte_level(chat=CHATML))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_both_parts_have_the_tokens_of_the_whole(star: StarLLM, data: st.DataObject) -> None:
    """Forbids other tokens at the seam, wherever it is."""
    words = ["the", " cat", "s", "\n", "\n\n", "  ", "é", "🦦", ".", "<|im_end|>", "12"]
    text = RenderedText("".join(data.draw(st.lists(st.sampled_from(words), min_size=2))))
    at = data.draw(st.integers(0, len(text) - 1))
    piece = cut_text(star, text, at, "mark")
    before = [] if piece.content is None else piece.content.ids.tolist()
    assert [*before, *piece.query_ids] == rendered_ids(star.tokenizer, text)
    assert piece.query_ids


def test_the_context_does_not_depend_on_the_question(star: StarLLM) -> None:
    """Forbids a context for each question on the same document."""
    document = "the cat sat on the mat.\n"
    pieces = [
        cut_text(star, RenderedText(document + question), len(document), "mark")
        for question in ("Who?", " and", "\n", "1", "<|im_end|>")
    ]
    assert len({piece.content.ids.tobytes() for piece in pieces if piece.content}) == 1


@pytest.mark.parametrize(
    ("first", "second", "end"),
    [
        ("\nWhat is it?\nAnswer:", "\nWhere is it?\nAnswer:", "\n"),
        ("\n\nWhat?\nAnswer:", "\n\nHow?\nAnswer:", "\n\n"),
        # Without a line break, a word is not cut.
        ("It is wide.\nSo:", "It is wild.\nSo:", "It is "),
        # The likely cut is before what differs.
        ("\nWhat?", "\nWhere?", None),
        # What differs is far from the question.
        ("x" * 3000 + "\nSo:", "y" * 3000 + "\nSo:", None),
        ("\nThe same.\nSo:", "\nThe same.\nSo:", None),
    ],
)
def test_a_cut_is_learned_from_what_two_texts_share(
    first: str, second: str, end: str | None
) -> None:
    texts = [DOCUMENT + first, DOCUMENT + second]
    at = [cut.line_break(text) for text in texts]
    shared = len(shared_prefix([texts[0][: at[0]], texts[1]]))
    learned = cut.learned_cut(texts[1], shared, at[1])
    assert learned == (None if end is None else len(DOCUMENT + end))
