"""Conversations that a server keeps: which prompt goes on with which, and what is dropped."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from star_attention.serve.contexts.entry import Content
from star_attention.serve.contexts.keys import Scope, as_ids
from star_attention.serve.contexts.talks import Prompt, Talk, Talks
from tests.stores import BYTES, A, Clock, FakeEncoder, places, settle, store, use, wanted

ANN, BOB = Scope(tenant="ann"), Scope(tenant="bob")
CONTEXT = Content(ids=as_ids(A))
QUESTION = list(range(1000, 1040))
ANSWER = list(range(2000, 2020))
NEXT = [*QUESTION, *ANSWER, 3000, 3001, 3002]


@dataclass
class Kept:
    """Token ids with bytes that stand for their keys and values."""

    ids: list[int]

    @property
    def nbytes(self) -> int:
        return BYTES * len(self.ids)


def prompt(ids: list[int], scope: Scope = ANN, context: Content = CONTEXT, **more: Any) -> Prompt:
    return Prompt(scope=scope, content=context, ids=ids, **more)


def add(talks: Talks, asked: Prompt, answer: list[int]) -> None:
    """Answer a prompt that goes on with what is kept."""
    talk, _ = talks.after(asked)
    first = asked if talk is None else talk.first
    talks.add(asked, first, Kept([*asked.ids, *answer]))


@pytest.fixture
def talks() -> Talks:
    own = Talks(4, 10_000, 100.0, Clock())
    add(own, prompt(QUESTION), ANSWER)
    return own


def after(talks: Talks, ids: list[int], **more: Any) -> tuple[Talk | None, int]:
    return talks.after(prompt(ids, **more))


def test_a_prompt_that_goes_on_is_known_up_to_its_news(talks: Talks) -> None:
    talk, tokens = after(talks, NEXT)
    assert talk is not None
    assert talk.kept.ids == [*QUESTION, *ANSWER]
    assert tokens == 60
    # The answer comes from the last token.
    assert after(talks, [*QUESTION, *ANSWER])[1] == 59
    assert after(talks, QUESTION)[1] == 39


@pytest.mark.parametrize("place", [45, 60])
def test_an_answer_that_was_written_otherwise_counts_up_to_there(talks: Talks, place: int) -> None:
    changed = [*NEXT[:place], 7, *NEXT[place:]]
    assert after(talks, changed)[1] == place


@pytest.mark.parametrize(
    "other",
    [
        {"scope": BOB},
        {"scope": Scope(tenant="ann", salt="s")},
        {"context": Content(ids=as_ids([*A[:-1], 9]))},
    ],
)
def test_nobody_else_goes_on_with_it(talks: Talks, other: dict[str, Any]) -> None:
    assert after(talks, NEXT, **other) == (None, 0)


def test_another_question_is_another_conversation(talks: Talks) -> None:
    """Forbids that rows which share a phrase are read one by one, and not together."""
    assert after(talks, [*QUESTION[:-1], 7, *ANSWER, 3000]) == (None, 0)


def test_the_start_of_an_answer_may_be_written_otherwise(talks: Talks) -> None:
    """Forbids losing all turns where a template drops what it begins answers with."""
    question = list(range(5000, 5040))
    add(talks, prompt([*question, 1, 2, 3], unsaid_tokens=3), ANSWER)
    assert after(talks, [*question, *ANSWER, 3000])[1] == 40
    assert after(talks, [*question[:-1], 7, 1, 2, 3]) == (None, 0)


def test_the_next_turn_takes_the_place_of_the_one_before(talks: Talks) -> None:
    add(talks, prompt(NEXT), ANSWER)
    assert talks.numbers()[0] == 1
    # Its last turn can be undone: an edited question goes on with the turns before.
    edited = [*NEXT[:-2], 7, 8, 9]
    assert after(talks, edited)[1] == 61
    add(talks, prompt(edited), ANSWER)
    assert talks.numbers()[0] == 2
    assert after(talks, [*NEXT, *ANSWER, 1])[1] == len(NEXT) + len(ANSWER)
    assert after(talks, [*edited, *ANSWER, 1])[1] == len(edited) + len(ANSWER)


@pytest.mark.parametrize("seed", range(3))
def test_a_talk_takes_the_place_of_all_that_it_repeats(seed: int) -> None:
    """Found by what it begins with, among short ones too, and not by comparing it with all."""
    chance, clock = random.Random(seed), Clock()
    talks = Talks(1000, 10**9, 100.0, clock)
    contexts = [CONTEXT, Content(ids=as_ids(A[:-1]))]
    kept: list[tuple[Prompt, list[int]]] = []
    for _ in range(150):
        scope, context = chance.choice([ANN, BOB]), chance.choice(contexts)
        # Few ids, so that many begin alike; some longer than what is compared at first.
        ids = chance.choices(range(2), k=chance.choice([1, 2, 3, 5, 8, 40]))
        asked = prompt(ids, scope, context, unsaid_tokens=chance.randrange(3))
        whole = [*ids, *chance.choices(range(2), k=chance.randrange(1, 4))]
        talks.add(asked, asked, Kept(whole))
        kept = [
            (other, said)
            for other, said in kept
            if other.scope != scope
            or other.content is not context
            or whole[: max(other.said_tokens, 1)] != said[: max(other.said_tokens, 1)]
        ]
        kept.append((asked, whole))
        assert talks.numbers()[0] == len(kept)
    assert len(kept) < 140
    own = [each for each, _ in kept if each.scope == ANN and each.content is CONTEXT]
    assert {talk.last for talk in talks.of_ids(ANN, as_ids([*A, 1]))} >= set(own)
    clock.now += 1000
    talks.drop_old()
    assert talks.numbers()[:2] == (0, 0)
    assert talks._starts == talks._short == talks._contents == {}


def test_texts_tell_which_conversations_to_look_at(talks: Talks) -> None:
    told = Content(ids=as_ids(A), text="Once.", raw=True)
    add(talks, prompt([5, *QUESTION], context=told, text=" Why?", raw=True), ANSWER)
    assert len(talks.begun(ANN, "Once. Why? Because.", raw=True)) == 1
    assert talks.begun(ANN, "Once. Who? Because.", raw=True) == []
    assert talks.begun(ANN, "Twice. Why? Because.", raw=True) == []
    assert talks.begun(ANN, "Once. Why? Because.", raw=False) == []
    assert talks.begun(BOB, "Once. Why? Because.", raw=True) == []


def test_the_one_used_longest_ago_leaves_first() -> None:
    talks = Talks(2, 10_000, 100.0, Clock())
    questions = [[start + token for token in range(40)] for start in (1000, 2000, 3000)]
    for question in questions[:2]:
        add(talks, prompt(question), ANSWER)
    used, _ = after(talks, [*questions[0], *ANSWER, 1])
    assert used is not None
    talks.use(used)
    add(talks, prompt(questions[2]), ANSWER)
    known = [after(talks, [*question, *ANSWER, 1])[1] for question in questions]
    assert known == [60, 0, 60]
    number, nbytes, counts = talks.numbers()
    assert (number, nbytes) == (2, 2 * 60 * BYTES)
    assert (counts.hits, counts.dropped["room"]) == (1, 1)


def test_bytes_and_age_are_limits() -> None:
    clock = Clock()
    talks = Talks(9, 100 * BYTES, 50.0, clock)
    add(talks, prompt(QUESTION), ANSWER)
    add(talks, prompt(list(range(4000, 4040))), ANSWER)
    assert talks.numbers()[:2] == (1, 60 * BYTES)
    add(talks, prompt(list(range(6000, 6200))), ANSWER)
    # It would not fit if all others left.
    assert talks.numbers()[:2] == (1, 60 * BYTES)
    clock.now += 49
    talks.drop_old()
    assert talks.numbers()[0] == 1
    clock.now += 1
    talks.drop_old()
    assert talks.numbers()[0] == 0
    assert talks.numbers()[2].dropped == {"room": 1, "age": 1, "context": 0}


# --------------------------------------------------------------------------------- in a store


def test_a_conversation_goes_with_its_context() -> None:
    kept = store(talks=4, device_tokens=1000)
    view, _ = kept.create(wanted(*A))
    settle(kept)
    add(kept.talks, prompt(QUESTION), ANSWER)
    add(kept.talks, prompt(QUESTION, scope=BOB), ANSWER)
    kept.delete("ann", view.id)
    assert kept.talks.after(prompt(NEXT)) == (None, 0)
    assert kept.talks.after(prompt(NEXT, scope=BOB))[1] == 60


def test_an_expired_context_takes_its_conversations_along() -> None:
    clock = Clock()
    kept = store(talks=4, device_tokens=1000, clock=clock, ttl=10, talk_ttl=10_000.0)
    use(kept, *A)
    add(kept.talks, prompt(QUESTION), ANSWER)
    clock.now += 11
    settle(kept)
    assert kept.talks.numbers()[0] == 0


def test_bytes_of_conversations_are_in_the_budget() -> None:
    """Contexts make room for an eighth; one that needs all of it comes first."""
    clock, encoder = Clock(), FakeEncoder()
    kept = store(encoder, clock=clock, talks=9, device_tokens=480)
    use(kept, *range(210))
    clock.now += 1
    use(kept, *range(300, 540))
    assert places(kept) == {"device": 2}
    add(kept.talks, prompt(QUESTION), ANSWER)
    clock.now += 1
    settle(kept)
    assert places(kept) == {"device": 1, "cold": 1}
    assert kept.talks.nbytes == 60 * BYTES
    use(kept, *range(1000, 1470))
    assert kept.talks.nbytes == 0


def test_conversations_go_when_memory_runs_out() -> None:
    kept = store(talks=4, device_tokens=1000)
    add(kept.talks, prompt(QUESTION), ANSWER)
    assert kept.make_room()
    assert kept.talks.nbytes == 0
    assert not kept.make_room()
