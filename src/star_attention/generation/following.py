"""One call of `generate` or `stream` on a rank other than 0."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace

from star_attention import phase2
from star_attention.distributed.messages import SOURCES
from star_attention.errors import InvalidInputError
from star_attention.generation.conversation import Conversation, Keeper, Sent
from star_attention.generation.result import Delta, Generation
from star_attention.generation.run import SentAnswer, Shape, delta_of
from star_attention.hf.execution import sources
from star_attention.hf.text.answer import AnswerText
from star_attention.storage.oom import translate_oom


class FollowerRun:
    """A call of our own loop: the same steps as on rank 0, whose answers count.

    Args:
        follower: the steps.
        answer: the text of a stream's answer, for its pieces; None for `generate`.
        shape: grouping of the answers.
        number: the call's number on all ranks.
        keeper: keeps the answers for a next turn, as rank 0 does.
    """

    def __init__(
        self,
        follower: phase2.Follower,
        answer: AnswerText | None,
        shape: Shape,
        number: int,
        keeper: Keeper,
    ) -> None:
        self._follower, self._answer, self._keeper = follower, answer, keeper
        self._comm = keeper.context.comm
        self._generations: list[Generation] = []
        self.shape, self.number = shape, number
        self.ended = False
        # A stream begins suspended, and is resumed for its first piece.
        self.is_suspended = True

    def pieces(self) -> Generator[Delta]:
        """Yield the pieces that rank 0 streams."""
        while not self.ended:
            if self._follower.finished:
                if not self._receive():
                    self.leave()
            elif delta := self._step():
                yield delta

    def _step(self) -> Delta | None:
        """Run a step with rank 0; return what it adds to a stream."""
        flag, step = self._run_step()
        if flag == phase2.SUSPENDED:
            self.leave()
        answer = self._answer
        if flag not in (phase2.GO_ON, phase2.LAST) or answer is None:
            return None
        text = answer.push(step.tokens[0])
        if step.ended[0] and answer.finish_reason is None:
            text += answer.end("stop")
        return delta_of(answer, text)

    def _run_step(self) -> tuple[int, phase2.Step]:
        with translate_oom(_out_of_memory):
            return self._follower.step()

    def _receive(self) -> bool:
        """Do what rank 0 says after the last step; False if it is in another call."""
        message = self._comm.receive_about(self.number)
        if message is None:
            return False
        if message[0] == SOURCES:
            with translate_oom(_out_of_memory):
                sources.attention_of(self._follower.request, message[2])
        else:
            self.end(message[2])
        return True

    def finish(self) -> None:
        """Follow to the end: rank 0 decides when an answer ends, not this rank's reader."""
        for _ in self.pieces():
            pass

    def suspend(self) -> bool:
        """Leave the stream for another call, if rank 0 does so too."""
        self.is_suspended = True
        return self._follower.finished or self._run_step()[0] in (phase2.CLOSED, phase2.SUSPENDED)

    def repeat(self) -> None:
        """Follow until the stream ends or rank 0 suspends it, to resume it at any later time."""
        while not self.ended and not self.is_suspended:
            if not self._follower.finished:
                self.is_suspended = self._run_step()[0] == phase2.SUSPENDED
            else:
                self.is_suspended = not self._receive()

    def leave(self) -> None:
        """End the stream here, because rank 0 is in another call."""
        if not self.ended:
            self.ended = True
            self._follower.release()

    def end(self, answers: list[SentAnswer]) -> None:
        """Take rank 0's answers."""
        if not self.ended:
            self._generations = arrived(answers, self._keeper, self._follower)
        self.leave()

    def generations(self) -> list[Generation]:
        """Return rank 0's answers.

        Raises:
            InvalidInputError: rank 0 left the stream before its end.
        """
        if not self._generations:
            raise InvalidInputError(
                "rank 0 left this stream before its end; close it there with close() or a with"
                " block"
            )
        return self._generations


class RepeaterRun:
    """A call of `generate` that transformers' loops run on rank 0 alone.

    Args:
        repeat: repeats rank 0's forwards, and returns its answers.
        shape: grouping of the answers.
        keeper: makes the answers' conversations, if rank 0 does.
    """

    def __init__(
        self, repeat: Callable[[], list[SentAnswer]], shape: Shape, keeper: Keeper
    ) -> None:
        self._repeat, self.shape, self._keeper = repeat, shape, keeper
        self._generations: list[Generation] = []

    def pieces(self) -> Iterator[Delta]:
        """Run the call; there are no pieces."""
        with translate_oom(_out_of_memory):
            self._generations = arrived(self._repeat(), self._keeper)
        return iter(())

    def generations(self) -> list[Generation]:
        """Return rank 0's answers."""
        return self._generations


def arrived(
    answers: list[SentAnswer], keeper: Keeper, follower: phase2.Follower | None = None
) -> list[Generation]:
    """Return rank 0's answers, with their conversations on this rank.

    Args:
        answers: what rank 0 sent.
        keeper: makes the conversations.
        follower: has the keys and values of those that rank 0 keeps.
    """

    def conversation(row: int, sent: Sent | None) -> Conversation | None:
        if sent is None:
            return None
        layers = None
        if sent.key and follower is not None:
            layers = follower.kept_row(row, len(sent.ids))
        return keeper.conversation(sent.turns, sent.ids, layers, sent.key or None)

    return [
        replace(answer, conversation=conversation(row, sent))
        for row, (answer, sent) in enumerate(answers)
    ]


def _out_of_memory() -> str:
    return "out of memory in phase 2: ask fewer queries at once, or encode over more ranks"
