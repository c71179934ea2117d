"""The options that commands share, by topic. Defaults come from `config`; help texts end up in docs/cli.md."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from star_attention.config import (
    MAX_NEW_TOKENS,
    METHODS,
    STALL_S,
    TOKENS_PER_FORWARD,
    TOKENS_PER_FORWARD_GPU,
    StarConfig,
    check_max_new_tokens,
)
from star_attention.errors import InvalidInputError, SizeError
from star_attention.planning.plan import ANCHOR_SOURCES, format_size, parse_size

DEFAULT_BLOCK = "a quarter of the context, rounded up to a power of two, 1k to 32k"
"""`plan.default_block_size`, in words."""

QUARTER = "quarter"
"""What `plan --hardware` takes for a block size: the quickest from a quarter of the context on."""


def option(help: str, *names: str, panel: str, metavar: str | None = None, **more: Any) -> Any:
    """A typer option; those with a value have a metavar, flags have none."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, **more)


def _above_0(value: float | None) -> float | None:
    """A callback: typer's ranges include their ends."""
    if value is not None and not value > 0:
        raise typer.BadParameter(f"{value:g} is not above 0")
    return value


def size(text: str, name: str) -> int:
    """A number of tokens, as `parse_size` reads it.

    Raises `SizeError`, also for numbers below 1.
    """
    tokens = parse_size(text, name)
    if tokens < 1:
        raise SizeError(f"{name} {tokens:,} is below 1; give a positive number of tokens")
    return tokens


def sizes(text: str, name: str, *, of_ranks: bool = False) -> list[int]:
    """`128k`, several with commas between, or a range of doublings: `128k..1m`.

    Raises `InvalidInputError` for numbers below 1, and for a range that ends before it begins.
    """

    def one(part: str) -> int:
        if not of_ranks:
            return size(part, name)
        if not part.isdecimal() or int(part) < 1:
            raise InvalidInputError(
                f"{name} {part!r} is not a number of ranks; write 8, or 1..1024"
            )
        return int(part)

    found: list[int] = []
    for part in text.split(","):
        first, dots, last = part.strip().partition("..")
        if not dots:
            found.append(one(first))
            continue
        number, stop = one(first), one(last)
        if stop < number:
            raise InvalidInputError(f"{name} {part!r} ends before it begins")
        while number <= stop:
            found.append(number)
            number *= 2
    return found


Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES",
        help="Text files in UTF-8, `-` for stdin. Several are joined in order, with a line break between them.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary on stderr.")]
Model = Annotated[
    str, option("Model folder, or hub id.", "--model", "-m", panel="Model", metavar="MODEL")
]
Dtype = Annotated[
    str,
    option(
        "Precision: auto (the checkpoint's), float32, bfloat16, float16.",
        panel="Model",
        metavar="TYPE",
    ),
]
Device = Annotated[
    # (Named, because typer 0.27 makes the option out of a metavar that differs in case only.)
    str,
    option(
        "auto (a GPU if there is one), cpu, cuda, cuda:1.",
        "--device",
        panel="Model",
        metavar="DEVICE",
    ),
]
TokensPerForward = Annotated[
    str | None,
    option(
        "Most tokens in one forward, which sets the working memory.",
        panel="Model",
        metavar="SIZE",
        show_default=f"{format_size(TOKENS_PER_FORWARD)} on CPU, {format_size(TOKENS_PER_FORWARD_GPU)} on a GPU",
    ),
]
BlockSize = Annotated[
    str | None,
    option(
        "Tokens encoded together.",
        panel="Context",
        metavar="SIZE",
        show_default=DEFAULT_BLOCK,
    ),
]
AnchorSize = Annotated[
    str | None,
    option(
        "Tokens at the head of the context that every block sees; 0 for none.",
        panel="Context",
        metavar="SIZE",
        show_default="the block size",
    ),
]
AnchorSource = Annotated[
    str,
    option(
        "How other ranks come by the anchor: broadcast, or local (each computes it; for links too slow to carry it).",
        "--anchor-source",
        panel="Ranks",
        metavar="NAME",
    ),
]
TensorParallel = Annotated[
    int,
    option(
        "Ranks that share the weights and heads of one host, for models that one device cannot hold.",
        "--tensor-parallel",
        panel="Ranks",
        metavar="N",
        min=1,
    ),
]
KvDtype = Annotated[
    str | None,
    option(
        "Precision of the encoded text's keys and values: fp8 takes a little over half of bfloat16's memory.",
        "--kv-dtype",
        panel="Context",
        metavar="TYPE",
        show_default="the model's",
    ),
]
KvDevice = Annotated[
    str | None,
    option(
        "Where the encoded text's keys and values are kept: cpu is the host's memory, for a GPU that is too small.",
        panel="Context",
        metavar="DEVICE",
        show_default="where they are computed",
    ),
]
Json = Annotated[bool, option("One JSON object a line on stdout.", "--json", panel="Output")]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    model: Model
    dtype: Dtype = "auto"
    device: Device = "auto"
    tokens_per_forward: TokensPerForward = None
    reserve_tokens: Annotated[
        str,
        option(
            "Tokens kept free for queries and answers, for models whose rotary frequencies depend on the length.",
            panel="Model",
            metavar="SIZE",
        ),
    ] = str(StarConfig.reserve_tokens)
    compile: Annotated[
        bool | None,
        option(
            "Compile layers and use CUDA graphs: faster after some seconds at the first use.",
            "--compile/--no-compile",
            panel="Model",
            show_default="on a GPU, where Triton is installed",
        ),
    ] = None
    tensor_parallel: TensorParallel = 1
    stall_limit: Annotated[
        float,
        option(
            "Seconds of silence after which the other ranks give a rank up; a long block is no silence.",
            "--stall-limit",
            panel="Ranks",
            metavar="X",
            min=1.0,
        ),
    ] = STALL_S


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    block_size: BlockSize = None
    anchor_size: AnchorSize = None
    method: Annotated[
        str, option(f"Attention method: {', '.join(METHODS)}.", panel="Context", metavar="NAME")
    ] = StarConfig.method
    anchor_source: AnchorSource = ANCHOR_SOURCES[0]
    ring_layout: Annotated[
        str,
        option(
            "How the ring method deals out tokens: zigzag (balanced), or contiguous.",
            "--ring-layout",
            panel="Ranks",
            metavar="NAME",
        ),
    ] = StarConfig.ring_layout
    kv_dtype: KvDtype = None
    kv_device: KvDevice = None
    chat: Annotated[
        bool,
        option(
            "Send text and query as one user message of the model's chat template.",
            "--chat",
            panel="Context",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    query: Annotated[
        list[str] | None,
        option("What follows the text; may be repeated.", "--query", panel="Query", metavar="TEXT"),
    ] = None
    query_file: Annotated[
        str | None,
        option("A file with one query a line, `-` for stdin.", panel="Query", metavar="FILE"),
    ] = None
    batch: Annotated[
        bool,
        option(
            "Answer several queries at once instead of one after another.", "--batch", panel="Query"
        ),
    ] = False
    answer_prefix: Annotated[
        str,
        option(
            "What the answer is made to begin with; not printed.",
            panel="Answer",
            metavar="TEXT",
            show_default=False,
        ),
    ] = ""
    max_new_tokens: Annotated[
        str, option("Most tokens of an answer.", panel="Answer", metavar="SIZE")
    ] = str(MAX_NEW_TOKENS)
    temperature: Annotated[
        float | None,
        option("Sample at this temperature; 0 is greedy.", panel="Answer", metavar="X", min=0.0),
    ] = None
    top_p: Annotated[
        float | None,
        option(
            "Sample from the most likely tokens of this total probability, above 0.",
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
        option("Never sample, whatever the model's own settings say.", "--greedy", panel="Answer"),
    ] = False
    num_beams: Annotated[
        int | None,
        option(
            "Beam search with this many beams; not streamed.", panel="Answer", metavar="N", min=1
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        option(
            "Above 1: make tokens of text and answer less likely; above 0 and below 1: more likely.",
            panel="Answer",
            metavar="X",
            callback=_above_0,
        ),
    ] = None
    seed: Annotated[
        int | None, option("Makes sampling repeatable.", panel="Answer", metavar="N")
    ] = None
    stop: Annotated[
        list[str] | None,
        option(
            "End an answer before this text; may be repeated.",
            "--stop",
            panel="Answer",
            metavar="TEXT",
        ),
    ] = None
    ignore_eos: Annotated[
        bool, option("Go on past end-of-sequence tokens.", "--ignore-eos", panel="Answer")
    ] = False
    json: Json = False
    no_stream: Annotated[
        bool, option("Print an answer when it is complete.", "--no-stream", panel="Output")
    ] = False

    def words(self) -> dict[str, Any]:
        """The keyword arguments of `StarLLM.generate`, which samples where a sampling word is given."""
        max_new_tokens = parse_size(self.max_new_tokens, "max_new_tokens")
        check_max_new_tokens(max_new_tokens)  # before a model is loaded
        words: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stop": self.stop or None,
            "answer_prefix": self.answer_prefix,
        }
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        sampling = {word: value for word, value in sampling.items() if value is not None}
        if self.greedy:
            words["do_sample"] = False
            if sampling:
                given = ", ".join("--" + word.replace("_", "-") for word in sampling)
                warnings.warn(f"{given} without effect: --greedy was given", stacklevel=2)
        else:
            words |= sampling
        others = {"num_beams": self.num_beams, "repetition_penalty": self.repetition_penalty}
        return words | {word: value for word, value in others.items() if value is not None}
