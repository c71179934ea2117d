"""A small world of people, rooms and things, and stories about it with unambiguous questions.

The stories follow bAbI's tasks 1 to 5 (Weston et al., arXiv 1502.05698); the simulation is our own.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
ACTORS = {task: ("Daniel", "John", "Mary", "Sandra") for task in ("qa1", "qa2", "qa3", "qa4")} | {
    "qa5": ("Bill", "Fred", "Jeff", "Mary")
}
"""People in the stories of each task (qa4 has rooms only)."""
LABELS = {task: ROOMS for task in ACTORS} | {"qa5": (*ACTORS["qa5"], *OBJECTS)}
"""Everything that can be an answer of each task, as published."""
FACTS = {"qa1": (2, 10), "qa2": (4, 20), "qa3": (6, 32), "qa4": (2, 2), "qa5": (6, 24)}
"""The fewest and the most facts of a story of each task."""

_MOVED = ("moved to", "went to", "journeyed to", "travelled to")
_TOOK = ("took", "grabbed", "picked up", "got")
_DROPPED = ("dropped", "discarded", "put down", "left")
_GAVE = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True, kw_only=True)
class Story:
    """A story and a question about its end.

    Attributes:
        facts: Sentences in the order of events.
        question: What is asked about the world after the last fact.
        answer: The only correct answer.
    """

    facts: tuple[str, ...]
    question: str
    answer: str


def story(task: str, facts: int, rng: random.Random) -> Story:
    """Return a story of this many facts, which settle its question."""
    (chapter,) = chapters(task, [facts], rng)
    question, answer = rng.choice(rng.choice(chapter.questions[task]))
    return Story(facts=chapter.facts, question=question, answer=answer)


QuestionKinds = list[list[tuple[str, str]]]
"""Pairs of question and answer, grouped by kind of question; no group is empty."""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """Part of a story.

    Attributes:
        facts: Sentences in the order of events.
        questions: For the story's task and easier ones, everything that the story has settled by
            the end of the chapter.
    """

    facts: tuple[str, ...]
    questions: Mapping[str, QuestionKinds]


_EASIER = {"qa2": ("qa1",), "qa3": ("qa1", "qa2"), "qa5": ("qa1", "qa2")}
"""Other tasks whose questions a task's stories settle: the steps on the way to its answers."""


def chapters(task: str, facts: Sequence[int], rng: random.Random) -> list[Chapter]:
    """Return a story in chapters, each with its number of facts.

    The first chapter settles a question of the task. A story of qa4 has one chapter, of two facts.
    """
    if task == "qa4":
        sentences, questions = _directions(rng)
        return [Chapter(facts=sentences, questions={task: questions})]
    while True:
        world = _World(rng=rng, actors=ACTORS[task], handling=task != "qa1", giving=task == "qa5")
        first = _chapter(task, facts[0], world)
        if first.questions[task]:
            return [first, *(_chapter(task, count, world) for count in facts[1:])]


def _chapter(task: str, facts: int, world: _World) -> Chapter:
    sentences = tuple(world.event() for _ in range(facts))
    questions = {
        name: [kind for kind in _questions(name, world) if kind]
        for name in (task, *_EASIER.get(task, ()))
    }
    return Chapter(facts=sentences, questions=questions)


@dataclass(kw_only=True)
class _World:
    """The places of people and things.

    `places`, `history` and `gifts` contain only what the facts have stated so far; `lying` also
    contains things whose rooms have not been mentioned yet.
    """

    rng: random.Random
    actors: tuple[str, ...]
    handling: bool
    giving: bool
    places: dict[str, str] = field(default_factory=dict)
    holders: dict[str, str] = field(default_factory=dict)
    lying: dict[str, str] = field(init=False)
    history: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    gifts: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lying = {thing: self.rng.choice(ROOMS) for thing in OBJECTS}

    def event(self) -> str:
        """Simulate an event and return its sentence.

        If anything but a move is possible, it happens half of the time.
        """
        handlings = self._handlings() if self.handling else []
        if handlings and self.rng.random() < 0.5:
            kind = self.rng.choice(sorted({kind for kind, *_ in handlings}))
            candidates = [handling for handling in handlings if handling[0] == kind]
            return self._handle(*self.rng.choice(candidates))
        actor = self.rng.choice(self.actors)
        room = self.rng.choice([room for room in ROOMS if room != self.places.get(actor)])
        self.places[actor] = room
        for thing, holder in self.holders.items():
            if holder == actor:
                self.history[thing].append(room)
        return f"{actor} {self.rng.choice(_MOVED)} the {room}."

    def _handlings(self) -> list[tuple[str, str, str, str]]:
        """Return (kind, actor, thing, receiver) of every event that is possible with a thing."""
        handlings = [
            ("take", actor, thing, "")
            for actor, room in self.places.items()
            for thing, place in self.lying.items()
            if place == room
        ]
        for thing, holder in self.holders.items():
            handlings.append(("drop", holder, thing, ""))
            if self.giving:
                handlings += [
                    ("give", holder, thing, receiver)
                    for receiver, room in self.places.items()
                    if receiver != holder and room == self.places[holder]
                ]
        return handlings

    def _handle(self, kind: str, actor: str, thing: str, receiver: str) -> str:
        if kind == "take":
            del self.lying[thing]
            self.holders[thing] = actor
            if not self.history[thing]:
                self.history[thing].append(self.places[actor])
            return f"{actor} {self.rng.choice(_TOOK)} the {thing}."
        if kind == "drop":
            del self.holders[thing]
            self.lying[thing] = self.places[actor]
            return f"{actor} {self.rng.choice(_DROPPED)} the {thing}."
        self.holders[thing] = receiver
        self.gifts.append((actor, thing, receiver))
        return f"{actor} {self.rng.choice(_GAVE)} the {thing} to {receiver}."


def _questions(task: str, world: _World) -> QuestionKinds:
    """Return everything that can be asked about a world; here, groups may be empty."""
    if task == "qa1":
        return [[(f"Where is {actor}?", room) for actor, room in world.places.items()]]
    if task == "qa2":
        return [[(f"Where is the {thing}?", rooms[-1]) for thing, rooms in world.history.items()]]
    if task == "qa3":
        return [_where_before(world)]
    kinds: list[dict[str, set[str]]] = [defaultdict(set) for _ in range(5)]
    for giver, thing, receiver in world.gifts:
        kinds[0][f"What did {giver} give to {receiver}?"].add(thing)
        kinds[1][f"Who gave the {thing} to {receiver}?"].add(giver)
        kinds[2][f"Who did {giver} give the {thing} to?"].add(receiver)
        kinds[3][f"Who gave the {thing}?"].add(giver)
        kinds[4][f"Who received the {thing}?"].add(receiver)
    return [
        [(question, min(answers)) for question, answers in kind.items() if len(answers) == 1]
        for kind in kinds
    ]


def _where_before(world: _World) -> list[tuple[str, str]]:
    """Return the questions about rooms that a thing always entered from the same other room."""
    questions = []
    for thing, rooms in world.history.items():
        before: dict[str, set[str | None]] = defaultdict(set)
        for previous, room in zip([None, *rooms[:-1]], rooms, strict=True):
            before[room].add(previous)
        for room, origins in before.items():
            origin = origins.pop()
            if not origins and origin is not None:
                questions.append((f"Where was the {thing} before the {room}?", origin))
    return questions


def _directions(rng: random.Random) -> tuple[tuple[str, ...], QuestionKinds]:
    """Return two facts about rooms next to a third, and the questions that name the third.

    Each fact is stated from one end or the other. Questions name only the third room, so that the
    answer is unique even if the three rooms are in a line.
    """
    middle, *others = rng.sample(ROOMS, 3)
    sides = rng.sample(sorted(_OPPOSITE), 2)
    facts, questions = [], []
    for room, side in zip(others, sides, strict=True):
        back = _OPPOSITE[side]
        facts.append(
            rng.choice(
                (f"The {room} is {side} of the {middle}.", f"The {middle} is {back} of the {room}.")
            )
        )
        questions += [
            (f"What is {side} of the {middle}?", room),
            (f"What is the {middle} {back} of?", room),
        ]
    return tuple(facts), [questions]
