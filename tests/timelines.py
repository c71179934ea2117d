"""Timelines that run by themselves, one after the other in any order that their marks allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable


class World:
    """Queues of work that wait for each other at marks, as streams of a GPU do."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.timelines: list[FakeTimeline] = []

    def timeline(self) -> FakeTimeline:
        timeline = FakeTimeline(self)
        self.timelines.append(timeline)
        return timeline

    def step(self) -> bool:
        """Run one piece of work that may run now; False if there is none."""
        ready = [timeline for timeline in self.timelines if timeline.is_ready()]
        if ready:
            self.random.choice(ready).step()
        return bool(ready)

    def run_some(self) -> None:
        for _ in range(self.random.randrange(6)):
            self.step()

    def run_all(self) -> None:
        while self.step():
            pass
        assert not any(timeline.queue for timeline in self.timelines), "they wait for each other"


class FakeMark:
    def __init__(self, world: World) -> None:
        self.world = world
        self.reached = False

    def synchronize(self) -> None:
        while not self.reached:
            assert self.world.step(), "nothing reaches this mark"


class FakeTimeline:
    def __init__(self, world: World) -> None:
        self.world = world
        self.queue: deque[FakeMark | Callable[[], None] | tuple[FakeMark]] = deque()

    def mark(self) -> FakeMark:
        mark = FakeMark(self.world)
        self.queue.append(mark)
        return mark

    def wait(self, mark: FakeMark) -> None:
        self.queue.append((mark,))

    def run(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def is_ready(self) -> bool:
        if not self.queue:
            return False
        first = self.queue[0]
        return not isinstance(first, tuple) or first[0].reached

    def step(self) -> None:
        first = self.queue.popleft()
        if isinstance(first, FakeMark):
            first.reached = True
        elif not isinstance(first, tuple):
            first()


class Now:
    """A timeline whose work is done at once, as on a CPU."""

    def mark(self) -> Now:
        return self

    def synchronize(self) -> None:
        pass

    def wait(self, mark: Now) -> None:
        pass

    def run(self, work: Callable[[], None]) -> None:
        work()
