"""A conversation on the command line: questions and commands, line by line."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from star_attention.cli import session
from star_attention.cli.lines import edit_lines, read_line
from star_attention.cli.output import Answerer
from star_attention.cli.streams import say
from star_attention.cli.torchrun import is_rank_0
from star_attention.errors import InvalidInputError, StarAttentionError, quote
from star_attention.planning.sizes import counted

if TYPE_CHECKING:
    from star_attention.generation.conversation import Conversation
    from star_attention.generation.result import Delta, Generation

_PROMPT = "? "

COMMANDS = {
    "/save [FILE]": "save the conversation, to go on with `star-attention chat FILE`",
    "/undo [N]": "forget the last turn, or the last N",
    "/reset": "forget all turns",
    "/help": "list these commands",
    "/quit": "leave; Ctrl-D does too",
}
"""What a line may say in place of a question, and what it does."""


class Talk(Answerer):
    """Answers line by line, and remembers what was said.

    Ctrl-C ends an answer, which is then remembered as far as it came.

    Attributes:
        file: Where `/save` writes without a name; None until there is one.
    """

    file: str | None = None
    _is_stopped = False

    def begin(self, conversation: Conversation | None, file: str) -> None:
        """Go on with a conversation that was loaded from a file; None for none."""
        if conversation is None:
            return
        self.asked, self.file = conversation, file
        turns = counted(len(conversation.turns), "turn")
        last = f"; the last answer: {conversation.turns[-1].answer}" if conversation.turns else ""
        self.status.say(f"continuing after {turns}{last}")

    def run(self) -> bool:
        """Read and answer lines until the end of input; return False if one could not be."""
        edit_lines()
        if sys.stdin.isatty():
            self.status.say("type one question per line; /help lists commands, Ctrl-D ends")
        are_all_fine = True
        while (line := self.star.from_rank_0(self._read() if is_rank_0() else None)) is not None:
            try:
                if line.split()[:1] in (["/quit"], ["/exit"]) and line.startswith("/"):
                    break
                self._obey(line)
            except StarAttentionError as error:
                say(f"error: {error}")
                are_all_fine = False
            except KeyboardInterrupt:
                print(flush=True)
                say("interrupted: this turn is not remembered")
        return are_all_fine

    def _read(self) -> str | None:
        """Return the next line that is not empty; None at the end of input."""
        while True:
            try:
                line = read_line(_PROMPT)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                print(file=sys.stderr)
                say("Ctrl-D or /quit leaves")
                continue
            if line is None or line.strip():
                return line

    def _obey(self, line: str) -> None:
        """Answer a question, or do what a command says."""
        if not line.startswith("/"):
            reply = self.answer(line.strip())
            assert reply.conversation is not None, "chat keeps its answers"
            self.asked = reply.conversation
            return
        name, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/save": self._save,
            "/undo": self._undo,
            "/reset": self._reset,
            "/help": self._help,
        }
        if name not in commands:
            raise InvalidInputError(
                f"there is no command {quote(name)}; /help lists them, and a question that begins"
                " with / is typed with a space before it"
            )
        commands[name](argument.strip())

    def _save(self, file: str) -> None:
        path = os.path.expanduser(file) if file else self.file
        if path is None:
            raise InvalidInputError("/save has no name yet; give one: /save FILE")
        session.save(self._conversation("saved"), path, self.status)
        self.file = path

    def _undo(self, count: str) -> None:
        if count and not count.isdecimal():
            raise InvalidInputError(f"/undo takes a number of turns, got {quote(count)}; give 1")
        undone = self._conversation("undone").undo(int(count or 1))
        self.asked = undone if undone.turns else self.context
        self.status.say(f"{counted(len(undone.turns), 'turn')} left")

    def _reset(self, _: str) -> None:
        self.asked = self.context
        self.status.say("all turns are forgotten")

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        for command, effect in COMMANDS.items() if is_rank_0() else ():
            print(f"{command:{width}}  {effect}", file=sys.stderr, flush=True)

    def _conversation(self, what: str) -> Conversation:
        if self.asked is self.context:
            raise InvalidInputError(f"no turn can be {what}, because there is none; ask first")
        conversation: Conversation = self.asked
        return conversation

    # ------------------------------------------------------------------------------ answers

    def _content(self, query: str) -> Any:
        if self.context.chat is None and self.asked is not self.context:
            # Without a template, a question would continue the last answer's line.
            query = "\n" + query
        return super()._content(query)

    def _stream(self, query: str) -> Generation:
        with (
            _stopping() as is_stopped,
            self.star.stream(self.asked, self._content(query), **self.kwargs) as stream,
        ):
            self._print_deltas(_until(is_stopped, stream.deltas()))
            self._is_stopped = is_stopped()
        print(flush=True)
        self._print_notes(stream.result)
        return stream.result

    def _print_summary(self, replies: list[Generation], note: str = "") -> None:
        if self._is_stopped:
            self._is_stopped = False
            self.status.say("stopped: the answer is remembered as far as it came")
        else:
            super()._print_summary(replies, note)


def _until(is_stopped: Callable[[], bool], deltas: Iterator[Delta]) -> Iterator[Delta]:
    for delta in deltas:
        yield delta
        if is_stopped():
            return


@contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; at the second it is an exception."""
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
