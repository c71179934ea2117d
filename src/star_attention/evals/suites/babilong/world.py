"""A small world of people, rooms and things, and stories told of it whose questions have one right answer each.

The kinds of stories are those of bAbI's tasks 1 to 5 (Weston et al., arXiv 1502.05698); the simulation and its stories are our own.
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
"""Who may be in the stories of a task. (qa4 tells of rooms only.)"""
FACTS = {"qa1": (2, 10), "qa2": (4, 20), "qa3": (6, 32), "qa4": (2, 2), "qa5": (6, 24)}
"""The fewest and the most facts of a story."""

_MOVED = ("moved to", "went to", "journeyed to", "travelled to")
_TOOK = ("took", "grabbed", "picked up", "got")
_DROPPED = ("dropped", "discarded", "put down", "left")
_GAVE = ("gave", "handed", "passed")
_OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}


@dataclass(frozen=True, kw_only=True)
class Story:
    """facts: sentences in the order of events. question, answer: on what holds behind the last of them."""

    facts: tuple[str, ...]
    question: str
    answer: str


def story(task: str, facts: int, rng: random.Random) -> Story:
    """A story of so many facts with a question that they settle; stories that settle none are made anew."""
    (told,) = chapters(task, [facts], rng)
    question, answer = rng.choice(rng.choice(told.asked[task]))
    return Story(facts=told.facts, question=question, answer=answer)


Asked = list[list[tuple[str, str]]]
"""Questions with their answers, by kind of question, no kind empty."""


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """facts: sentences in the order of events. asked: by task, everything that the story so far settles, of easier tasks too."""

    facts: tuple[str, ...]
    asked: Mapping[str, Asked]


_STEPS = {"qa2": ("qa1",), "qa3": ("qa1", "qa2"), "qa5": ("qa1", "qa2")}
"""What else can be asked of a task's stories: what one has to know on the way to its answers."""


def chapters(task: str, facts: Sequence[int], rng: random.Random) -> list[Chapter]:
    """A story that goes on, so many facts a chapter, the first of which settles a question of its task. (qa4 has one chapter.)"""
    if task == "qa4":
        told, asked = _directions(rng)
        return [Chapter(facts=told, asked={task: asked})]
    while True:
        world = _World(rng=rng, actors=ACTORS[task], handling=task != "qa1", giving=task == "qa5")
        first = _chapter(task, facts[0], world)
        if first.asked[task]:
            return [first, *(_chapter(task, count, world) for count in facts[1:])]


def _chapter(task: str, facts: int, world: _World) -> Chapter:
    told = tuple(world.event() for _ in range(facts))
    asked = {
        one: [kind for kind in _questions(one, world) if kind]
        for one in (task, *_STEPS.get(task, ()))
    }
    return Chapter(facts=told, asked=asked)


@dataclass(kw_only=True)
class _World:
    """Where everybody and everything is. Only what the facts have told so far is in `places`, `history` and `gifts`."""

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
        """One more thing happens: its sentence. Half of the events are no moves, where anything else can happen."""
        handlings = self._handlings() if self.handling else []
        if handlings and self.rng.random() < 0.5:
            kind = self.rng.choice(sorted({kind for kind, *_ in handlings}))
            return self._handle(*self.rng.choice([one for one in handlings if one[0] == kind]))
        actor = self.rng.choice(self.actors)
        room = self.rng.choice([room for room in ROOMS if room != self.places.get(actor)])
        self.places[actor] = room
        for thing, holder in self.holders.items():
            if holder == actor:
                self.history[thing].append(room)
        return f"{actor} {self.rng.choice(_MOVED)} the {room}."

    def _handlings(self) -> list[tuple[str, str, str, str]]:
        """(kind, actor, thing, receiver) of all that can happen with things where their rooms are known."""
        able = [
            ("take", actor, thing, "")
            for actor, room in self.places.items()
            for thing, place in self.lying.items()
            if place == room
        ]
        for thing, holder in self.holders.items():
            able.append(("drop", holder, thing, ""))
            if self.giving:
                near = [
                    who
                    for who, room in self.places.items()
                    if who != holder and room == self.places[holder]
                ]
                able += [("give", holder, thing, receiver) for receiver in near]
        return able

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


def _questions(task: str, world: _World) -> Asked:
    """(question, answer) of everything that can be asked of a world, by kind of question."""
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
        [(asked, min(found)) for asked, found in kind.items() if len(found) == 1] for kind in kinds
    ]


def _where_before(world: _World) -> list[tuple[str, str]]:
    """Only of rooms that a thing came to from one and the same room, however often."""
    able = []
    for thing, rooms in world.history.items():
        before: dict[str, set[str | None]] = defaultdict(set)
        for previous, room in zip([None, *rooms[:-1]], rooms, strict=True):
            before[room].add(previous)
        for room, found in before.items():
            previous = found.pop()
            if not found and previous is not None:
                able.append((f"Where was the {thing} before the {room}?", previous))
    return able


def _directions(rng: random.Random) -> tuple[tuple[str, ...], Asked]:
    """Two rooms beside a third, each told from either end. Only the third is named in the question, for which two rooms in one
    line leave no second answer."""
    middle, *others = rng.sample(ROOMS, 3)
    sides = rng.sample(sorted(_OPPOSITE), 2)
    facts, asked = [], []
    for room, side in zip(others, sides, strict=True):
        back = _OPPOSITE[side]
        facts.append(
            rng.choice(
                (f"The {room} is {side} of the {middle}.", f"The {middle} is {back} of the {room}.")
            )
        )
        asked += [
            (f"What is {side} of the {middle}?", room),
            (f"What is the {middle} {back} of?", room),
        ]
    return tuple(facts), [asked]
