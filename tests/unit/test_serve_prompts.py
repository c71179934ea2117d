"""How prompts of requests are read: what is tokenized, and how much may be a query."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from star_attention.hf.text import special
from star_attention.hf.text.reading import Reader
from star_attention.hf.text.rendered import RenderedText

pytest.importorskip("starlette")
pytest.importorskip("openai")

from tests.engines import bundled_tokenizer
from tests.servers import NAME, Server, in_parts, running

WORDS = "The tide comes in and goes out again, and nobody asks it why. "
LONG = WORDS * 700
"""More than twice 4,096 tokens, without a line break."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running() as own:
        yield own


def chat(server: Server, messages: list[dict[str, Any]], **fields: Any) -> Any:
    body = {"model": NAME, "messages": messages, "max_tokens": 2, **fields}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer


def complete(server: Server, prompt: str) -> Any:
    body = {"model": NAME, "prompt": prompt, "max_tokens": 2, "cache_salt": "texts"}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer


def found(answer: Any) -> tuple[str, str, int]:
    headers = answer.headers
    tokens = int(headers["x-star-context-tokens"])
    return headers["x-star-rule"], headers["x-star-cache"], tokens


@pytest.mark.parametrize("mark", [True, False])
def test_a_known_document_is_not_tokenized_again(
    server: Server, mark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forbids reading a whole document for each question: half a second for 100,000 tokens."""
    read: list[int] = []
    chat_context = Reader.chat_context

    def noted(self: Reader, head: str | RenderedText) -> Any:
        read.append(len(head))
        return chat_context(self, head)

    monkeypatch.setattr(Reader, "chat_context", noted)
    document = f"{mark}. {WORDS * 100}"
    outcomes = []
    for question in ("Why?", "Who?", "Why?"):
        _, outcome, _ = found(chat(server, in_parts(document, question, mark=mark)))
        outcomes.append(outcome)
    assert outcomes == ["miss", "hit", "hit"]
    assert len(read) == 1


def test_a_known_text_is_not_tokenized_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain_ids = special.plain_ids

    def noted(tokenizer: Any, text: str) -> list[int]:
        read.append(len(text))
        return plain_ids(tokenizer, text)

    monkeypatch.setattr(special, "plain_ids", noted)
    document = f"A text. {WORDS * 100}\n"
    assert found(complete(server, f"{document}Why?"))[:2] == ("implicit", "miss")
    assert max(read) > len(document)
    read.clear()
    assert found(complete(server, f"{document}Who?"))[:2] == ("prefix", "hit")
    assert max(read) < 200


@pytest.mark.parametrize(("end", "more"), [("the ti", "de"), ("the tide", "s"), ("the", " tide")])
def test_a_context_that_ends_inside_of_a_token_is_no_prefix(
    server: Server, end: str, more: str
) -> None:
    """Forbids other tokens than those of the whole prompt, because some of it is kept."""
    document = f"{end}{more} {WORDS * 50}{end}"
    chat(server, in_parts(document, "Why?", mark=True))
    longer = in_parts(f"{document}{more} comes in.", "Who?")
    count = server.post("/v1/chat/completions/input_tokens", {"messages": longer})
    answer = chat(server, longer)
    tokens = bundled_tokenizer().apply_chat_template(
        [{"role": "user", "content": f"{document}{more} comes in.Who?"}],
        add_generation_prompt=True,
    )["input_ids"]
    assert answer.json()["usage"]["prompt_tokens"] == len(tokens)
    assert count.status_code == 200


def test_a_short_context_does_not_make_a_long_document_a_query(server: Server) -> None:
    """Forbids reading a document in one piece because its instructions are kept."""
    system = {"role": "system", "content": f"Be brief. {WORDS * 40}"}
    first = chat(server, [system, {"role": "user", "content": "Why?"}])
    rule, outcome, tokens = found(first)
    assert (rule, outcome) == ("implicit", "miss")
    short = chat(server, [system, *in_parts(WORDS * 20, "Why?")])
    assert found(short) == ("prefix", "hit", tokens)
    rule, outcome, longer = found(chat(server, [system, *in_parts(LONG, "Why?")]))
    assert (rule, outcome) == ("implicit", "miss")
    assert longer > tokens + 4096


def test_a_long_message_without_a_place_to_cut(server: Server) -> None:
    """Forbids reading it in one piece, and keeping what nobody can find again."""
    answer = chat(server, [{"role": "user", "content": LONG + "Why?"}])
    assert found(answer)[0] == "none"
    assert found(answer)[2] == answer.json()["usage"]["prompt_tokens"] - 512
    assert "x-star-context" not in answer.headers
    short = chat(server, [{"role": "user", "content": WORDS * 40 + "Why?"}])
    assert found(short) == ("none", "none", 1)


def test_a_text_without_a_line_break_leaves_its_end_to_the_query(server: Server) -> None:
    """Forbids a question that blocks read as a part of the context."""
    first = complete(server, f"{WORDS * 100}Why?")
    rule, outcome, tokens = found(first)
    assert (rule, outcome) == ("implicit", "miss")
    assert tokens == first.json()["usage"]["prompt_tokens"] - 512
    again = complete(server, f"{WORDS * 100}Who is it that asks the tide?")
    assert found(again) == ("prefix", "hit", tokens)
    assert complete(server, WORDS * 10).headers["x-star-rule"] == "none"


def test_an_answer_says_why_its_document_was_encoded(server: Server) -> None:
    """A date at the top of a prompt defeats every cache, which nobody sees without being told."""
    reasons = []
    for date in ("Monday", "Tuesday", "Tuesday"):
        document = f"It is {date}. {WORDS * 50}"
        answer = chat(server, in_parts(document, "Why?"), cache_salt="dates")
        reasons.append(answer.headers.get("x-star-miss-reason"))
    assert reasons == ["new", "beginning_changed", None]


def question(word: str) -> str:
    """A question of two lines, of which the likely cut leaves the last one to the query."""
    return f"\nQuestion: {word} is it that asks the tide?\nAnswer:"


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_what_two_prompts_begin_alike_with_is_found_by_the_third(server: Server, kind: str) -> None:
    """Forbids that a question of several lines makes every prompt a context of its own."""
    document = f"A {kind} to learn. {WORDS * 50}"

    def ask(word: str, salt: str = "learned", **fields: Any) -> Any:
        prompt = document + question(word)
        if kind == "text":
            body = {"prompt": prompt, "max_tokens": 2, "cache_salt": salt, **fields}
            return server.post("/v1/completions", body)
        messages = [{"role": "user", "content": prompt}]
        return chat(server, messages, cache_salt=salt, **fields)

    assert found(ask("Who"))[:2] == ("implicit", "miss")
    # Another salt learns nothing from it, and an explicit request from nothing.
    assert found(ask("What", salt="other"))[0] == "implicit"
    assert found(ask("What", prompt_cache_options={"mode": "explicit"}))[0] == "none"
    rule, outcome, tokens = found(ask("Where"))
    assert (rule, outcome) == ("learned", "miss")
    assert found(ask("When")) == ("prefix", "hit", tokens)
    # The question is no part of it, and the document is.
    whole = bundled_tokenizer()(document).input_ids
    assert len(whole) - 1 <= tokens <= len(whole) + 3


def test_nothing_is_learned_from_another_version_of_a_document(server: Server) -> None:
    """Forbids reading the rest of a document with every question, from where it has changed."""
    document = f"Once. {WORDS * 60}"
    changed = document[:600] + "It is another one. " + document[600:]
    chat(server, [{"role": "user", "content": document + question("Who")}])
    answer = chat(server, [{"role": "user", "content": changed + question("What")}])
    assert found(answer)[:2] == ("implicit", "miss")
    assert answer.headers["x-star-miss-reason"] == "input_changed"


def test_nothing_is_learned_where_the_server_s_state_does_not_count() -> None:
    with running(implicit=False) as own:
        for word in ("Who", "What", "When"):
            messages = [{"role": "user", "content": f"{WORDS * 50}{question(word)}"}]
            assert found(chat(own, messages))[0] == "none"
