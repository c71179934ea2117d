"""A reader of bAbI's stories, which knows only their text."""

from __future__ import annotations

import re
from itertools import pairwise

MOVE = re.compile(r"\b(\w+) (?:moved|went|journeyed|travelled) to the (\w+)\.")
TAKE = re.compile(r"\b(\w+) (?:took|grabbed|picked up|got) the (\w+)\.")
DROP = re.compile(r"\b(\w+) (?:dropped|discarded|put down|left) the (\w+)\.")
GIVE = re.compile(r"\b(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\.")
LIES = re.compile(r"\bThe (\w+) is (north|south|east|west) of the (\w+)\.")


def answers(text: str, question: str) -> set[str]:
    """All answers to a question that a text of facts, and of anything between them, gives."""
    events = sorted(
        (match.start(), kind, match.groups())
        for kind, pattern in {"move": MOVE, "take": TAKE, "drop": DROP, "give": GIVE}.items()
        for match in pattern.finditer(text)
    )
    room_of: dict[str, str] = {}
    holder_of: dict[str, str] = {}
    left_in: dict[str, str] = {}
    history: dict[str, list[str]] = {}
    gifts = []

    def place(thing: str) -> str | None:
        return room_of.get(holder_of[thing]) if thing in holder_of else left_in.get(thing)

    # The target is a room for moves, and a thing for all other events.
    for _, kind, (actor, target, *receiver) in events:
        if kind == "move":
            assert room_of.get(actor) != target, "moved to where they were"
            room_of[actor] = target
        elif kind == "take":
            assert target not in holder_of, "taken from somebody's hands"
            assert left_in.get(target, room_of[actor]) == room_of[actor], (
                "taken in another room than it was left in"
            )
            holder_of[target] = actor
        elif kind == "drop":
            assert holder_of.pop(target) == actor
            left_in[target] = room_of[actor]
        else:
            assert holder_of[target] == actor
            assert room_of[actor] == room_of[receiver[0]]
            holder_of[target] = receiver[0]
            gifts.append((actor, target, receiver[0]))
        for thing in {*holder_of, *left_in}:
            rooms = history.setdefault(thing, [])
            if rooms[-1:] != [place(thing)]:
                rooms.append(str(place(thing)))

    if match := re.fullmatch(r"Where is (?:the )?(\w+)\?", question):
        name = match[1]
        return {str(place(name) if name in {*holder_of, *left_in} else room_of[name])}
    if match := re.fullmatch(r"Where was the (\w+) before the (\w+)\?", question):
        rooms = ["nowhere known", *history[match[1]]]
        return {before for before, room in pairwise(rooms) if room == match[2]}
    if " of" in question:
        return directions(text, question)
    return gift_answers(gifts, question)


def directions(text: str, question: str) -> set[str]:
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    lies = {(a, side, b) for a, side, b in LIES.findall(text)}
    lies |= {(b, back[side], a) for a, side, b in lies}
    if match := re.fullmatch(r"What is (\w+) of the (\w+)\?", question):
        return {a for a, side, b in lies if (side, b) == match.groups()}
    match = re.fullmatch(r"What is the (\w+) (\w+) of\?", question)
    assert match, question
    return {b for a, side, b in lies if (a, side) == match.groups()}


def gift_answers(gifts: list[tuple[str, str, str]], question: str) -> set[str]:
    if match := re.fullmatch(r"What did (\w+) give to (\w+)\?", question):
        return {thing for giver, thing, receiver in gifts if (giver, receiver) == match.groups()}
    if match := re.fullmatch(r"Who gave the (\w+) to (\w+)\?", question):
        return {giver for giver, thing, receiver in gifts if (thing, receiver) == match.groups()}
    if match := re.fullmatch(r"Who did (\w+) give the (\w+) to\?", question):
        return {receiver for giver, thing, receiver in gifts if (giver, thing) == match.groups()}
    if match := re.fullmatch(r"Who gave the (\w+)\?", question):
        return {giver for giver, thing, _ in gifts if thing == match[1]}
    match = re.fullmatch(r"Who received the (\w+)\?", question)
    assert match, question
    return {receiver for _, thing, receiver in gifts if thing == match[1]}
