"""Stop strings: where the first of them ends a growing text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class StopStrings:
    """Strings to look for, as an automaton that reads each character once (Aho and Corasick, 1975).

    States are numbered; each stands for the longest end of the text that begins a string.

    Args:
        strings: what to look for; none are empty.

    Attributes:
        longest: length of the longest string.
        depth: for each state, the length of the end of the text that it stands for.
        match: for each state, the length of the longest string that ends there, or 0.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self.depth, self.match = [0], [0]
        self.longest = 0
        for string in strings:
            self._add(string)
        self._fallback = [0] * len(self._next)
        self._link()

    def __bool__(self) -> bool:
        return self.longest > 0

    def step(self, state: int, character: str) -> int:
        """Return the state after another character."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _add(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.match.append(0)
            state = self._next[state][character]
        self.match[state] = len(string)
        self.longest = max(self.longest, len(string))

    def _link(self) -> None:
        """Set each state's fallback: the state of the longest proper end of its text."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            for character, following in self._next[state].items():
                self._fallback[following] = self.step(self._fallback[state], character)
                states.append(following)
            self.match[state] = self.match[state] or self.match[self._fallback[state]]


class StopStringCutter:
    """Cut a growing text before the stop string that is complete first.

    The end of the text is held back while it may be the beginning of a stop string.

    Attributes:
        string: the stop string that was read; None before.
    """

    def __init__(self, stops: StopStrings | Iterable[str]) -> None:
        self._stops = stops if isinstance(stops, StopStrings) else StopStrings(stops)
        self._state = 0
        self._pending = ""
        self.string: str | None = None

    @property
    def stopped(self) -> bool:
        """True once a stop string was read."""
        return self.string is not None

    def push(self, piece: str) -> str:
        """Add a piece, and return the text that is now certain to precede any stop string."""
        if self.stopped or not self._stops:
            return "" if self.stopped else piece
        text, state = self._pending + piece, self._state
        for end in range(len(self._pending), len(text)):
            state = self._stops.step(state, text[end])
            if self._stops.match[state]:
                start = end + 1 - self._stops.match[state]
                self.string, self._pending = text[start : end + 1], ""
                return text[:start]
        self._state = state
        certain = len(text) - self._stops.depth[state]
        self._pending = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return the text held back."""
        pending, self._pending, self._state = self._pending, "", 0
        return pending
