"""A model's reasoning, read apart from its answer.

Families mark it in two ways: by tags around it at the start of an answer (`<think>`), or by
messages in channels, of which only `final` is for the reader (gpt-oss).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from star_attention.hf.text.detokenizer import Detokenizer
from star_attention.hf.text.endings import has_channels, token_id
from star_attention.hf.text.tokens import decode

TAGS = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<thought>": "</thought>",
    "<seed:think>": "</seed:think>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>": "<channel|>",
    "◁think▷": "◁/think▷",
}
"""Tags around reasoning, opening and closing."""

_NAMES = {"<|channel>": "thought\n"}
"""What may follow an opening tag and is no reasoning: the name of Gemma 4's channel."""

_CONTROLS = {
    "<|start|>": "start",
    "<|channel|>": "channel",
    "<|message|>": "message",
    "<|end|>": "end",
    "<|call|>": "end",
    "<|return|>": "end",
}
_CALL = "to=functions."
"""What a message's header has that is the call of a tool."""
_MOST_SPACE = 8
"""Characters of white space before an opening tag."""
_PROMPT_END = 32
"""Tokens of a prompt that are searched for the beginning of its answer."""


@dataclass(frozen=True, kw_only=True)
class Markup:
    """The marks of reasoning that a tokenizer has.

    Attributes:
        tags: closing tags by opening tag.
        tag_tokens: texts of tags that are special tokens, which decoding leaves out.
        controls: what each control token of channels begins or ends.
        added: the added tokens that are no tags, of which chat templates build turns.
        openings: token ids of each opening tag.
    """

    tags: dict[str, str]
    tag_tokens: dict[int, str]
    controls: dict[int, str]
    added: frozenset[int]
    openings: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Markup | None:
        """Return a tokenizer's marks; None where it has none.

        Tags count where the closing one is a token, or the chat template writes one.
        """
        template = str(getattr(tokenizer, "chat_template", None) or "")
        state = len(tokenizer), *tokenizer.all_special_tokens
        return _markup(tokenizer, template, state)


@functools.lru_cache(maxsize=8)
def _markup(tokenizer: Any, template: str, state: tuple[Any, ...]) -> Markup | None:
    """Return what `Markup.of` does, of a tokenizer in a given state."""
    tags = {
        opening: closing
        for opening, closing in TAGS.items()
        if opening in template or closing in template or token_id(tokenizer, closing) is not None
    }
    tokens = {text: token_id(tokenizer, text) for pair in tags.items() for text in pair}
    controls = {}
    if has_channels(tokenizer):
        names = {token_id(tokenizer, text): name for text, name in _CONTROLS.items()}
        controls = {token: name for token, name in names.items() if token is not None}
    if not tags and not controls:
        return None
    return Markup(
        tags=tags,
        tag_tokens={
            token: text
            for text, token in tokens.items()
            if token is not None and not tokenizer.decode([token], skip_special_tokens=True)
        },
        controls=controls,
        added=frozenset(tokenizer.added_tokens_decoder) - frozenset(tokens.values()),
        openings=tuple(tuple(tokenizer(tag, add_special_tokens=False).input_ids) for tag in tags),
    )


class Thinking:
    """Text with reasoning between tags at its start, cut in two.

    Args:
        tags: closing tags by opening tag.
        closing: the closing tag, where the reasoning has begun already.
    """

    def __init__(self, tags: dict[str, str], closing: str | None = None) -> None:
        self._tags, self._closing = tags, closing
        self._pending = ""
        self._starts = closing is None and bool(tags)
        self._strips = False

    @property
    def looks_for_tags(self) -> bool:
        """True while a tag would be one, and not a part of the answer."""
        return self._starts or self.is_inside

    @property
    def is_inside(self) -> bool:
        """True between an opening tag and its closing one."""
        return self._closing is not None

    def push(self, piece: str) -> tuple[str, str]:
        """Add a piece, and return the reasoning and the answer that are now certain."""
        text, self._pending = self._pending + piece, ""
        if self._starts:
            text = self._open(text)
        reasoning = ""
        if self._closing is not None:
            reasoning, text = self._close(text)
        if self._strips:
            text = text.lstrip()
            self._strips = not text
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """Return the text held back, as reasoning and answer."""
        pending, self._pending = self._pending, ""
        if self._starts and (opening := self._opening_of(pending.lstrip())):
            self._begin(opening)
            pending = ""
        return ("", pending) if self._closing is None else (pending, "")

    def _open(self, text: str) -> str:
        """Look for an opening tag, and return the text after it; "" while it may still come."""
        begun = text.lstrip()
        opening = self._opening_of(begun)
        name = _NAMES.get(opening, "")
        rest = begun[len(opening) :]
        may_come = any(tag.startswith(begun) for tag in self._tags)
        if opening and (rest.startswith(name) or not name.startswith(rest)):
            self._begin(opening)
            return rest.removeprefix(name)
        if opening or (may_come and len(text) - len(begun) <= _MOST_SPACE):
            self._pending = text
            return ""
        self._starts = False
        return text

    def _opening_of(self, text: str) -> str:
        """Return the opening tag that a text begins with, or ""."""
        return next((opening for opening in self._tags if text.startswith(opening)), "")

    def _begin(self, opening: str) -> None:
        self._starts, self._closing = False, self._tags[opening]

    def _close(self, text: str) -> tuple[str, str]:
        """Return the reasoning, and the text after its closing tag."""
        assert self._closing is not None, "the reasoning has ended"
        reasoning, closing, rest = text.partition(self._closing)
        if closing:
            self._closing, self._strips = None, True
            return reasoning, rest
        held = next(
            n
            for n in range(min(len(text), len(self._closing) - 1), -1, -1)
            if text.endswith(self._closing[:n])
        )
        self._pending = text[len(text) - held :]
        return text[: len(text) - held], ""


class ReasoningReader:
    """Convert tokens to the text of the answer, and keep the reasoning apart.

    Args:
        detokenizer: converts tokens to text.
        markup: the tokenizer's marks of reasoning.
        thinking: the text between tags.
    """

    def __init__(self, detokenizer: Detokenizer, markup: Markup, thinking: Thinking) -> None:
        self._detokenizer, self._markup, self._thinking = detokenizer, markup, thinking
        self._reasoning: list[str] = []
        # Of it, the number of pieces that were taken, and the white space after them.
        self._taken = 0
        self._space: list[str] | None = None
        self._has_text = False
        # Tokens of reasoning, and those after them of which is not known yet what they begin.
        self._tokens = self._undecided = 0
        # The message being read, the name of its channel, and what separates it from another one.
        self._part = "text"
        self._channel: str | None = None
        self._header = ""
        self._separator = ""

    @property
    def reasoning(self) -> str | None:
        """The reasoning so far, without white space around it; None where there is none."""
        return "".join(self._reasoning).strip() or None

    @property
    def reasoning_tokens(self) -> int:
        """The tokens that the reasoning took so far, with its marks."""
        return self._tokens

    def take_reasoning(self) -> str:
        """Return the reasoning since the last call, without white space around the whole.

        White space is held back until more comes.
        """
        piece = "".join(self._reasoning[self._taken :])
        self._taken = len(self._reasoning)
        if not piece.strip():
            if self._space is not None:
                self._space.append(piece)
            return ""
        piece = piece.lstrip() if self._space is None else "".join([*self._space, piece])
        text = piece.rstrip()
        self._space = [piece[len(text) :]]
        return text

    @property
    def in_text(self) -> bool:
        """True while what comes is text of the answer, or begins what is not."""
        return self._part == "text" and not self._thinking.is_inside

    @property
    def _is_thought(self) -> bool:
        """True while what comes is reasoning."""
        return self._part == "reasoning" or self._thinking.is_inside

    @property
    def openings(self) -> list[tuple[int, ...]]:
        """Token ids that would begin reasoning, or another message, in place of text."""
        if not self.in_text:
            return []
        tags = self._markup.openings if self._thinking.looks_for_tags else ()
        begins = ("start", "channel")
        controls = [(token,) for token, name in self._markup.controls.items() if name in begins]
        return [*tags, *controls]

    def push(self, token: int) -> str:
        """Add a token, and return the text of the answer that is now certain."""
        was_thought = self._is_thought
        piece = self._read(token)
        self._undecided += 1
        self._count(was_thought and self._part != "header")
        return piece

    def flush(self) -> str:
        """Return the text of the answer held back."""
        piece = self._route(self._detokenizer.flush())
        reasoning, text = self._thinking.flush()
        self._reasoning.append(reasoning)
        self._count()
        return piece + text

    def _read(self, token: int) -> str:
        """Return the text of the answer that is certain with a token."""
        if (control := self._markup.controls.get(token)) is not None:
            piece = self._route(self._detokenizer.flush())
            self._begin(control)
            return piece
        if token in self._markup.tag_tokens and self._thinking.looks_for_tags:
            return self._route(self._detokenizer.flush() + self._markup.tag_tokens[token])
        return self._route(self._detokenizer.push(token))

    def _count(self, ended: bool = False) -> None:
        """Count the tokens read as reasoning or not, where that is known.

        Args:
            ended: True if the last one ended the reasoning.
        """
        if ended or self._is_thought:
            self._tokens += self._undecided
        elif self._part == "header" or (self._part == "text" and self._thinking.looks_for_tags):
            # A header names its channel at the end, and an opening tag may take several tokens.
            return
        self._undecided = 0

    def follow(self, tokens: list[int]) -> None:
        """Read the control tokens at the end of a prompt, which the answer continues."""
        for token in tokens:
            self.push(token)
        self.flush()
        # A message that the prompt has only announced may begin without a further word.
        if self._part == "header" and self._channel is None:
            self._part = "text"
        self._reasoning, self._has_text, self._separator = [], False, ""
        self._tokens = self._undecided = 0

    def _begin(self, control: str) -> None:
        """Begin another part at a control token."""
        if control == "message":
            is_final = not self._channel or self._channel.split()[:1] == ["final"]
            self._part = "text" if is_final else "reasoning"
            if _CALL in self._header:
                # Neither is it said, nor thought.
                self._part = "call"
                return
            if self._has_text if is_final else self._reasoning:
                self._separator = "\n\n"
        elif control == "end":
            self._part = "text"
        else:
            self._part, self._channel = "header", "" if control == "channel" else None
            self._header = "" if control == "start" else self._header

    def _route(self, piece: str) -> str:
        """Add a piece to the part being read; return what belongs to the answer."""
        if not piece:
            return ""
        if self._part == "header":
            self._header += piece
            if self._channel is not None:
                self._channel += piece
            return ""
        if self._part == "call":
            return ""
        piece, self._separator = self._separator + piece, ""
        reasoning, text = (piece, "") if self._part == "reasoning" else self._thinking.push(piece)
        if reasoning:
            self._reasoning.append(reasoning)
        self._has_text = self._has_text or bool(text)
        return text


def answer_reader(
    tokenizer: Any,
    markup: Markup | None,
    prompt: list[int],
    answer_prefix: str = "",
    *,
    skip_special_tokens: bool = True,
) -> Detokenizer | ReasoningReader:
    """Return what reads the tokens of one answer.

    Args:
        tokenizer: a transformers tokenizer.
        markup: its marks of reasoning; None reads nothing apart.
        prompt: the tokens before the answer, in which its reasoning may have begun.
        answer_prefix: the text at the prompt's end that the answer was made to begin with.
        skip_special_tokens: leave special tokens out.
    """
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    if markup is None:
        return detokenizer
    thinking = _thinking(tokenizer, markup, prompt, answer_prefix)
    reader = ReasoningReader(detokenizer, markup, thinking)
    starts = [
        index for index, token in enumerate(prompt) if markup.controls.get(token) == "start"
    ] or [index for index, token in enumerate(prompt) if token in markup.controls]
    if starts:
        reader.follow(prompt[starts[-1] :])
    return reader


def _thinking(tokenizer: Any, markup: Markup, prompt: list[int], answer_prefix: str) -> Thinking:
    """Return what cuts an answer whose reasoning may have begun at the end of a prompt."""
    if not markup.tags:
        return Thinking({})
    # The beginning of the assistant's turn, which may hold a role and what was put in its mouth.
    turn = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1] in markup.added), None)
    written = "" if turn is None else decode(tokenizer, prompt[turn:], skip_special_tokens=False)
    for opening in markup.tags:
        role, tag, begun = written.partition(opening)
        if tag and re.fullmatch(r"\s*\w*\s*", role):
            return _continued(Thinking(markup.tags), tag + begun)
    # A prompt of other makings counts where it ends in the tag: it may also ask about one.
    end = prompt[-(_PROMPT_END + len(answer_prefix)) :]
    text = decode(tokenizer, end, skip_special_tokens=False).removesuffix(answer_prefix).rstrip()
    begun_tags = (tag for opening, tag in markup.tags.items() if text.endswith(opening))
    return _continued(Thinking(markup.tags, next(begun_tags, None)), answer_prefix)


def _continued(thinking: Thinking, text: str) -> Thinking:
    """Read text that stands before the answer."""
    thinking.push(text)
    thinking.flush()
    return thinking
