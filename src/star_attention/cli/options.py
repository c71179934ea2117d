"""The options that commands share, in groups.

Their help texts end up in docs/cli.md. Options about the encoding of contexts come from
`StarConfig` (config_options.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import typer

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.escapes import unescape
from star_attention.cli.torchrun import is_rank_0
from star_attention.config import MAX_NEW_TOKENS, check_max_new_tokens
from star_attention.planning.second_look import check_share
from star_attention.planning.sizes import parse_size


def option(help: str, *names: str, panel: str, metavar: str | None = None, **more: Any) -> Any:
    """Create a typer option. Options with a value have a metavar, flags have none."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, **more)


def _above_0(value: float | None) -> float | None:
    """Refuse 0 and below: typer's own ranges include their bounds."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES",
        help="UTF-8 text files, `-` for stdin; with the extra `documents` also PDF, Word and EPUB."
        " Several are joined in order, separated by a line break.",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress, summaries or warnings on stderr.")
]
TemplateKwargs = Annotated[
    str | None,
    option(
        "What the chat template reads beside messages, as a JSON object such as"
        ' {"enable_thinking": false}.',
        "--chat-template-kwargs",
        panel="Context",
        metavar="JSON",
    ),
]
Json = Annotated[
    bool, option("Print JSON on stdout, one object per line.", "--json", panel="Output")
]


CalibrationFile = Annotated[
    str | None,
    option(
        "File of `calibrate` for this model: use its look-back, unless --lookback or"
        " --lookback-layers is given.",
        "--calibration",
        panel="Context",
        metavar="FILE",
    ),
]


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """The answers that are planned for."""

    query_tokens: Annotated[
        int, option("Tokens per query.", panel="Workload", metavar="N", min=1)
    ] = 64
    answer_tokens: Annotated[
        int, option("Tokens per answer.", panel="Workload", metavar="N", min=1)
    ] = MAX_NEW_TOKENS


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """Settings of encoding the text. settings: those of `StarConfig` that concern the context."""

    settings: Annotated[
        dict[str, Any],
        ConfigOptions(without=("tokens_per_forward", "reserve_tokens", "slice_weights")),
    ] = field(default_factory=dict)
    calibration: CalibrationFile = None
    chat: Annotated[
        bool,
        option(
            "Send text and query as one user message, in the model's chat template.",
            "--chat",
            panel="Context",
        ),
    ] = False
    system: Annotated[
        str | None,
        option(
            "System message before the text, with --chat.",
            "--system",
            panel="Context",
            metavar="TEXT",
        ),
    ] = None
    chat_template_kwargs: TemplateKwargs = None
    tools: Annotated[
        str | None,
        option(
            "JSON file with a list of tools in OpenAI's form that the model may call, with --chat."
            " Its calls are printed to stderr, or are part of the JSON with --json.",
            "--tools",
            panel="Context",
            metavar="FILE",
        ),
    ] = None
    html_to_text: Annotated[
        bool,
        option(
            "Read HTML pages without their markup (needs the extra `documents`).",
            "--html-to-text",
            panel="Context",
        ),
    ] = False

    @cached_property
    def tools_read(self) -> Any:
        """What the file of tools holds. It is read once, and so may be a pipe."""
        from star_attention.cli.inputs import read_json

        assert self.tools is not None, "only asked for where there is a file"
        return read_json(self.tools)


@dataclass(frozen=True, kw_only=True)
class QueryOptions:
    """The queries."""

    query: Annotated[
        list[str] | None,
        option(
            "A question about the text; may be repeated.",
            "--query",
            panel="Query",
            metavar="TEXT",
        ),
    ] = None
    query_file: Annotated[
        str | None,
        option("File with one query per line, `-` for stdin.", panel="Query", metavar="FILE"),
    ] = None
    batch: Annotated[
        bool,
        option(
            "Answer all queries in one batch, not one after another: faster, and up to rounding the"
            " same answers.",
            "--batch",
            panel="Query",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReplyOptions:
    """How queries are answered, and how answers are printed."""

    answer_prefix: Annotated[
        str,
        option(
            "Text that the answer continues (\\n is a line break); it is not printed.",
            panel="Answer",
            metavar="TEXT",
            show_default=False,
        ),
    ] = ""
    max_new_tokens: Annotated[
        str, option("Maximum tokens of an answer.", panel="Answer", metavar="SIZE")
    ] = str(MAX_NEW_TOKENS)
    second_look: Annotated[
        float,
        option(
            "Share of the text, 0 to 1, that is read again before a query is answered: what it"
            " attends to most, with everything before in sight. Takes the memory of one more copy"
            " of the encoded text.",
            panel="Answer",
            metavar="SHARE",
            show_default="none",
        ),
    ] = 0.0
    temperature: Annotated[
        float | None,
        option("Sampling temperature; 0 is greedy.", panel="Answer", metavar="X", min=0.0),
    ] = None
    top_p: Annotated[
        float | None,
        option(
            "Sample from the most likely tokens whose probabilities add up to this; above 0.",
            panel="Answer",
            metavar="X",
            max=1.0,
            callback=_above_0,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        option("Sample from this many most likely tokens.", panel="Answer", metavar="N", min=1),
    ] = None
    greedy: Annotated[
        bool,
        option(
            "Never sample, whatever the model's generation settings say.",
            "--greedy",
            panel="Answer",
        ),
    ] = False
    num_beams: Annotated[
        int | None,
        option(
            "Beam search with this many beams; the answer is not streamed.",
            panel="Answer",
            metavar="N",
            min=1,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        option(
            "Above 1, tokens of the text and the answer become less likely; below 1, more likely.",
            panel="Answer",
            metavar="X",
            callback=_above_0,
        ),
    ] = None
    seed: Annotated[
        int | None, option("Random seed for sampling.", panel="Answer", metavar="N")
    ] = None
    stop: Annotated[
        list[str] | None,
        option(
            "End the answer before this text (\\n is a line break); may be repeated.",
            "--stop",
            panel="Answer",
            metavar="TEXT",
        ),
    ] = None
    ignore_eos: Annotated[
        bool, option("Continue past end-of-sequence tokens.", "--ignore-eos", panel="Answer")
    ] = False
    logprobs: Annotated[
        int | None,
        option(
            "With --json: also print each token's log probability, and this number of most likely"
            " tokens in its place.",
            panel="Output",
            metavar="N",
            min=0,
        ),
    ] = None
    sources: Annotated[
        int,
        option(
            "Name at most this number of passages of the text that the answer attended to most; on"
            " stderr, or in the JSON with --json.",
            panel="Output",
            metavar="N",
            min=0,
            show_default="none",
        ),
    ] = 0
    show_special_tokens: Annotated[
        bool,
        option(
            "Print answers as the model writes them: with special tokens and its reasoning.",
            "--show-special-tokens",
            panel="Output",
        ),
    ] = False
    show_reasoning: Annotated[
        bool,
        option(
            "Print the model's reasoning to stderr, before the answer.",
            "--show-reasoning",
            panel="Output",
        ),
    ] = False
    json_schema: Annotated[
        str | None,
        option(
            "File with a JSON schema that the answer follows (needs the extra `json`).",
            "--json-schema",
            panel="Answer",
            metavar="FILE",
        ),
    ] = None
    tool_choice: Annotated[
        str | None,
        option(
            "Which of the tools answers call: auto (any or none), none, required (one of them), or"
            " the name of one. A call that has to be made needs the extra `json`.",
            "--tool-choice",
            panel="Answer",
            metavar="CHOICE",
            show_default="auto",
        ),
    ] = None
    json: Json = False
    no_stream: Annotated[
        bool, option("Print each answer only when it is complete.", "--no-stream", panel="Output")
    ] = False

    def generation_kwargs(self) -> dict[str, Any]:
        """Return the keyword arguments of `StarLLM.generate`.

        Any of temperature, top_p and top_k turns sampling on.

        Raises:
            TextError: If a text is not UTF-8.
            SizeError: If max_new_tokens is not a number of tokens.
            InvalidInputError: If it is not positive, or second_look is outside of 0 to 1.
        """
        from star_attention.cli.inputs import check_utf8

        for name, texts in (("answer prefix", [self.answer_prefix]), ("stop string", self.stop)):
            for text in texts or []:
                check_utf8(name, text)
        max_new_tokens = parse_size(self.max_new_tokens, "max_new_tokens")
        check_max_new_tokens(max_new_tokens)
        check_share(self.second_look)
        kwargs: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stop": [unescape(stop, "--stop") for stop in self.stop or []] or None,
            "answer_prefix": unescape(self.answer_prefix, "--answer-prefix"),
            "skip_special_tokens": not self.show_special_tokens,
            "second_look": self.second_look,
            "sources": self.sources,
        }
        sampling = without_none(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
        if self.greedy and sampling:
            names = ", ".join("--" + name.replace("_", "-") for name in sampling)
            warnings.warn(f"{names} ignored: --greedy was given", stacklevel=2)
        kwargs |= {"do_sample": False} if self.greedy else sampling
        if self.logprobs is not None and not self.json:
            raise typer.BadParameter("it needs --json", param_hint="--logprobs")
        return kwargs | without_none(
            num_beams=self.num_beams,
            repetition_penalty=self.repetition_penalty,
            logprobs=self.logprobs,
            json_schema=self._schema(),
            tool_choice=self.tool_choice,
        )

    def _schema(self) -> Any:
        if self.json_schema is None:
            return None
        from star_attention.cli.inputs import read_json

        # The other ranks' arguments do not count.
        return read_json(self.json_schema) if is_rank_0() else {}


@dataclass(frozen=True, kw_only=True)
class AnswerOptions(ReplyOptions, QueryOptions):
    """The queries, how they are answered, and how answers are printed."""


def without_none(**options: Any) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}
