"""`star-attention chat`: talk about a text; every question follows the answers before it."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star_attention.cli.model_options import MODEL_VARIABLE, SavedModelOptions
from star_attention.cli.options import ContextOptions, Quiet, ReplyOptions, option
from star_attention.cli.progress import Status
from star_attention.cli.reuse import ANYWHERE
from star_attention.cli.torchrun import is_rank_0
from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError

if TYPE_CHECKING:
    from star_attention.engine import StarLLM
    from star_attention.generation.conversation import Conversation
    from star_attention.storage.context import EncodedContext


@dataclass(frozen=True, kw_only=True)
class TalkOptions(ContextOptions):
    """Settings of encoding the text that is talked about."""

    chat: Annotated[
        bool,
        option(
            "Use the model's chat template, where it has one; without, questions and answers"
            " continue the text.",
            "--chat/--no-chat",
            panel="Context",
        ),
    ] = True


def chat(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES",
            help="UTF-8 text files; with the extra `documents` also PDF, Word and EPUB. Or one"
            " file that names its model: a text saved by `encode`, or a conversation saved by"
            " `/save`.",
        ),
    ],
    model: SavedModelOptions,
    context: TalkOptions,
    answer: ReplyOptions,
    quiet: Quiet = False,
) -> None:
    """Talk about a text: every question follows the answers before it.

    Reads one question per line, from a terminal or a pipe, and streams the answers to stdout. Only
    what is new is computed. `/save FILE` saves the conversation, to go on with `chat FILE`; `/undo`
    takes a turn back, `/reset` all of them; `/help` lists commands. Ctrl-C ends an answer, Ctrl-D
    the conversation. The exit status is 1 if a question of a pipe could not be answered.

    Example: star-attention chat book.star
    """
    from star_attention.cli.chat_options import check_chat, check_choice_on, template_kwargs
    from star_attention.cli.talk import Talk
    from star_attention.storage.header import is_saved

    kwargs = answer.generation_kwargs() | {"keep": True}
    check_chat(context)
    status = Status(quiet=quiet)
    conversation = None
    if len(files) == 1 and is_saved(Path(files[0])):
        _check_saved(context, files[0])
        if context.chat_template_kwargs is not None:
            kwargs["chat_template_kwargs"] = template_kwargs(context.chat_template_kwargs)
        star, encoded, conversation = _load(model, files[0], context, answer.second_look, status)
        star.check_settings(**kwargs)
        check_choice_on(star, encoded, kwargs)
    else:
        star, encoded = _encode(files, model, context, kwargs, status)
    talk = Talk(star, encoded, answer, kwargs, status, show_encode_time=conversation is None)
    talk.begin(conversation, files[0])
    if not talk.run() and not sys.stdin.isatty():
        raise typer.Exit(1)


def _load(
    model: SavedModelOptions,
    path: str,
    context: ContextOptions,
    second_look: float,
    status: Status,
) -> tuple[StarLLM, EncodedContext, Conversation | None]:
    from star_attention.cli import session

    settings = {name: context.settings[name] for name in ANYWHERE} | {"second_look": second_look}
    star, header = session.load_for_saved(model, path, status, **settings)
    if "conversation" not in header:
        return star, star.load_context(path), None
    conversation = star.load_conversation(path)
    return star, conversation.context, conversation


def _encode(
    files: list[str],
    model: SavedModelOptions,
    context: ContextOptions,
    kwargs: dict[str, Any],
    status: Status,
) -> tuple[StarLLM, EncodedContext]:
    from star_attention.cli import session
    from star_attention.cli.chat_options import check_choice, context_kwargs
    from star_attention.cli.inputs import STDIN, read_context

    name = model.model or os.environ.get(MODEL_VARIABLE, "")
    if not name:
        raise typer.BadParameter(
            "give a model; saved texts and conversations name theirs", param_hint="--model"
        )
    if STDIN in files:
        raise typer.BadParameter(
            "stdin brings the questions; give the text as a file", param_hint="FILES"
        )
    text = ""
    if is_rank_0():
        text = read_context(files, status.say, html_to_text=context.html_to_text)
    model = replace(model, model=name)
    star = session.load_for(
        model,
        replace(context, chat=False),
        status,
        text=text,
        second_look=kwargs["second_look"],
    )
    star.check_settings(**kwargs)
    text = star.from_rank_0(text)
    if context.chat and not getattr(star.tokenizer, "chat_template", None):
        _check_without_template(context)
        status.say("this model has no chat template: questions and answers continue the text")
        context = replace(context, chat=False)
    check_choice(star, kwargs, context_kwargs(context))
    return star, session.encode_text(star, text, status, context)


def _check_without_template(context: ContextOptions) -> None:
    for name, value in (
        ("--system", context.system),
        ("--chat-template-kwargs", context.chat_template_kwargs),
        ("--tools", context.tools),
    ):
        if value is not None:
            raise InvalidInputError(
                f"{name} has no effect, because this model has no chat template; leave it out"
            )


def _check_saved(context: TalkOptions, path: str) -> None:
    """Refuse options about encoding: a saved text has been encoded."""
    defaults = {field.name: field.default for field in dataclasses.fields(StarConfig)}
    given = [
        name.replace("_", "-")
        for name, value in context.settings.items()
        if name not in ANYWHERE and value is not None and str(value) != str(defaults.get(name))
    ]
    given += [
        name
        for name, is_given in (
            ("calibration", context.calibration is not None),
            ("system", context.system is not None),
            ("tools", context.tools is not None),
            ("no-chat", not context.chat),
            ("html-to-text", context.html_to_text),
        )
        if is_given
    ]
    if given:
        raise InvalidInputError(
            f"--{given[0]} has no effect on {path}, which is encoded; leave it out, or give the"
            " text itself"
        )
