"""The options of the benchmarks. Each group makes the benchmark that it configures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.model_options import Device, Dtype, TensorParallel, Weights
from star_attention.cli.options import option
from star_attention.cli.sizes import token_count, token_counts
from star_attention.cli.torchrun import rank_and_size
from star_attention.config import KV_SETTINGS, StarConfig, check_device, check_dtype
from star_attention.errors import InvalidInputError, quote
from star_attention.planning.second_look import check_share

if TYPE_CHECKING:
    from star_attention.bench.decode import Decode
    from star_attention.bench.kernels import Kernels
    from star_attention.bench.prefill.benchmark import Prefill
    from star_attention.bench.questions import Questions
    from star_attention.bench.startup import Startup

PANEL = "Benchmark"

Compile = Annotated[
    bool | None,
    option(
        "Use compiled layers and CUDA graphs.",
        "--compile/--no-compile",
        panel=PANEL,
        show_default="on a GPU, where Triton is installed",
    ),
]
Contexts = Annotated[
    str,
    option(
        "Lengths in tokens, separated by commas, or a range of doublings: 8k..64k.",
        panel=PANEL,
        metavar="SIZES",
    ),
]
Block = Annotated[str, option("Block size of Star Attention.", panel=PANEL, metavar="SIZE")]
Blocks = Annotated[str, option("Block sizes, separated by commas.", panel=PANEL, metavar="SIZES")]
Repeats = Annotated[
    int,
    option("Runs of each measurement; the median counts.", panel=PANEL, metavar="N", min=1),
]
SliceWeights = Annotated[
    bool | None,
    option(
        "On several ranks, multiply a slice of the weights on each, or all of them.",
        "--slice-weights/--no-slice-weights",
        panel=PANEL,
        show_default="both",
    ),
]
Alone = Annotated[
    bool,
    option(
        "On several ranks, rank 0 also measures by itself, while the others wait.",
        "--alone/--no-alone",
        panel=PANEL,
    ),
]
QueryTokens = Annotated[int, option("Tokens of a query.", panel=PANEL, metavar="N", min=1)]


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The model to measure, its device, and the output folder."""

    model: Annotated[
        str | None,
        option("Model folder or hub id.", "--model", "-m", panel=PANEL, metavar="MODEL"),
    ] = None
    shapes: Annotated[
        str | None,
        option(
            "Random weights in the shapes of llama-3.1-8b, llama-3.2-1b, smollm2-135m,"
            " deepseek-v2-lite, gemma-3-4b or gemma-3-12b, instead of a model.",
            "--shapes",
            panel=PANEL,
            metavar="NAME",
        ),
    ] = None
    dtype: Dtype = "auto"
    weights: Weights = None
    device: Device = "auto"
    tensor_parallel: TensorParallel = 1
    out: Annotated[
        str | None,
        option(
            "Folder for the JSON and the pictures. A measurement in it is never overwritten.",
            "--out",
            panel=PANEL,
            metavar="FOLDER",
        ),
    ] = None

    def __post_init__(self) -> None:
        """Check, before torch is imported, what needs no weights."""
        check_dtype(self.dtype)
        check_device(self.device)
        from star_attention.hf.loading import weight_formats

        weight_formats.check_name(self.weights)
        if self.model is not None:
            from star_attention.hf.loading import checks, files

            checks.check_can_quantize(files.locate(self.model), {}, self.weights)


@dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    context: Contexts = "32k"
    block: Annotated[
        str,
        option(
            "Block sizes, separated by commas; /4 is a quarter of the context.",
            panel=PANEL,
            metavar="SIZES",
        ),
    ] = "/4,/8"
    methods: Annotated[
        str | None,
        option(
            "Methods, separated by commas: stock (transformers), stock-cudnn (the same with"
            " cuDNN's attention), dense and star (this library), balanced and high (star with that"
            " preset of look-back), official (the paper's implementation, which encodes the anchor"
            " with each block), streaming_llm (the block is its window), default (star with the"
            " block size of the engine's rule); on several ranks also ring and ring-contiguous"
            " (exact attention over ranks, balanced and as in the paper).",
            panel=PANEL,
            metavar="NAMES",
            show_default="stock,dense,official,star; on several ranks"
            " ring,ring-contiguous,official,star",
        ),
    ] = None
    alone: Annotated[
        str,
        option(
            "On several ranks, methods that rank 0 also measures by itself; none for no method.",
            "--alone",
            panel=PANEL,
            metavar="NAMES",
        ),
    ] = "star"
    settings: Annotated[
        dict[str, Any],
        ConfigOptions("anchor_size", "tokens_per_forward", "kv_dtype", "balance_ranks"),
    ] = field(default_factory=dict)
    repeats: Annotated[
        int,
        option(
            "Runs of each measurement after the first; the median counts. With 0 the first counts.",
            panel=PANEL,
            metavar="N",
            min=0,
        ),
    ] = 3
    dense_up_to: Annotated[
        str | None,
        option(
            "Longest context at which dense methods run. Beyond it their time is extrapolated from"
            " their two longest runs.",
            "--dense-up-to",
            panel=PANEL,
            metavar="SIZE",
        ),
    ] = None
    compile: Compile = None

    def benchmark(self, target: TargetOptions) -> Prefill:
        """Check the options."""
        from star_attention.bench.prefill.benchmark import Prefill
        from star_attention.bench.prefill.cases import Methods, plan_cases
        from star_attention.bench.prefill.contenders import EngineSettings
        from star_attention.hf.loading import load

        StarConfig.of(**self.settings)
        dense_up_to = (
            None if self.dense_up_to is None else token_count(self.dense_up_to, "dense-up-to")
        )
        return Prefill(
            cases=plan_cases(
                token_counts(self.context, "context"),
                names_of(self.block),
                Methods.of(
                    None if self.methods is None else names_of(self.methods),
                    [] if self.alone == "none" else names_of(self.alone),
                    rank_and_size()[1],
                    tensor_parallel=target.tensor_parallel,
                ),
                device=load.pick_device(target.device),
                dense_up_to=dense_up_to,
            ),
            repeats=self.repeats,
            engine=EngineSettings(compile=self.compile, **self.settings),
        )


@dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    context: Contexts = "16k"
    block: Block = "16k"
    queries: Annotated[
        int, option("Queries answered in a batch.", panel=PANEL, metavar="N", min=1)
    ] = 1
    query_tokens: QueryTokens = 64
    answer_tokens: Annotated[
        int, option("Tokens of an answer.", panel=PANEL, metavar="N", min=2)
    ] = 256
    repeats: Repeats = 3
    settings: Annotated[dict[str, Any], ConfigOptions(*KV_SETTINGS)] = field(default_factory=dict)
    compile: Compile = None
    slice_weights: SliceWeights = None
    alone: Alone = True

    def benchmark(self) -> Decode:
        """Check the options."""
        from star_attention.bench.decode import Decode

        StarConfig.of(**self.settings)
        return Decode(
            contexts=token_counts(self.context, "context"),
            block=token_count(self.block, "block_size"),
            queries=self.queries,
            query_tokens=self.query_tokens,
            answer_tokens=self.answer_tokens,
            repeats=self.repeats,
            compile=self.compile,
            slice_weights=self.slice_weights,
            alone=self.alone,
            **self.settings,
        )


@dataclass(frozen=True, kw_only=True)
class QuestionsOptions:
    context: Contexts = "16k"
    block: Block = "4k"
    questions: Annotated[
        int, option("Questions on each text.", panel=PANEL, metavar="N", min=1)
    ] = 20
    methods: Annotated[
        str | None,
        option(
            "Methods, separated by commas: stock (transformers), dense, star, balanced and high"
            " (star with that --quality), ring.",
            panel=PANEL,
            metavar="NAMES",
            show_default="stock,dense,star; on several ranks star",
        ),
    ] = None
    batch: Annotated[
        int,
        option("Questions answered at once, by this library.", panel=PANEL, metavar="N", min=1),
    ] = 1
    query_tokens: QueryTokens = 64
    answer_tokens: Annotated[
        int, option("Tokens of an answer.", panel=PANEL, metavar="N", min=1)
    ] = 32
    repeats: Repeats = 3
    compile: Compile = None
    slice_weights: SliceWeights = None
    alone: Alone = True
    edit: Annotated[
        bool,
        option(
            "Also time encoding the text with one block changed, as a share of encoding it anew;"
            " takes the memory of a second copy.",
            "--edit",
            panel=PANEL,
        ),
    ] = False
    second_look: Annotated[
        float,
        option(
            "Also time a second look at this share of the text, 0 to 1: what it adds to the first"
            " token of a question; takes the memory of a second copy.",
            "--second-look",
            panel=PANEL,
            metavar="SHARE",
        ),
    ] = 0.0

    def benchmark(self) -> Questions:
        """Check the options."""
        from star_attention.bench.questions import STOCK, Questions, engine_settings

        check_share(self.second_look)
        methods = None if self.methods is None else names_of(self.methods)
        for method in methods or ():
            if method != STOCK:
                StarConfig.of(**engine_settings(method))
        return Questions(
            contexts=token_counts(self.context, "context"),
            block=token_count(self.block, "block_size"),
            questions=self.questions,
            batch=self.batch,
            query_tokens=self.query_tokens,
            answer_tokens=self.answer_tokens,
            repeats=self.repeats,
            compile=self.compile,
            slice_weights=self.slice_weights,
            alone=self.alone,
            edit=self.edit,
            second_look=self.second_look,
            methods=methods,
        )


@dataclass(frozen=True, kw_only=True)
class KernelsOptions:
    context: Contexts = "16k,128k"
    block: Blocks = "4k,16k"
    repeats: Repeats = 10

    def benchmark(self) -> Kernels:
        """Check the options."""
        from star_attention.bench.kernels import Kernels

        return Kernels(
            contexts=token_counts(self.context, "context"),
            blocks=token_counts(self.block, "block_size"),
            repeats=self.repeats,
        )


@dataclass(frozen=True, kw_only=True)
class StartupOptions:
    context: Annotated[str, option("Tokens of the context.", panel=PANEL, metavar="SIZE")] = "48k"
    block: Block = "16k"
    query_tokens: QueryTokens = 64
    compile: Compile = None
    in_this_process: Annotated[
        bool,
        option(
            "Measure this process only, with the caches on disk as they are.",
            "--in-this-process",
            panel=PANEL,
        ),
    ] = False

    def benchmark(self) -> Startup:
        """Check the options."""
        from star_attention.bench.startup import Startup

        return Startup(
            context=token_count(self.context, "context"),
            block=token_count(self.block, "block_size"),
            query_tokens=self.query_tokens,
            compile=self.compile,
        )

    def arguments(self, target: TargetOptions) -> list[str]:
        """Return the arguments of the command that measures its own process with these options."""
        arguments = ["bench", "startup", "--in-this-process", "--quiet"]
        arguments += ["--dtype", target.dtype, "--device", target.device]
        arguments += ["--context", self.context, "--block", self.block]
        arguments += ["--query-tokens", str(self.query_tokens)]
        arguments += ["--tensor-parallel", str(target.tensor_parallel)]
        if target.model is not None:
            arguments += ["--model", target.model]
        if target.shapes is not None:
            arguments += ["--shapes", target.shapes]
        if target.weights is not None:
            arguments += ["--weights", target.weights]
        if self.compile is not None:
            arguments.append("--compile" if self.compile else "--no-compile")
        return arguments


def names_of(text: str) -> list[str]:
    """Split names that are separated by commas."""
    return [name.strip() for name in text.split(",")]


def known_names(what: str, text: str, known: Iterable[str]) -> list[str]:
    """Split names that are separated by commas, and check that they are known.

    Args:
        what: what the names are of, for the error.
        text: the names.
        known: those that there are.
    """
    names, known = names_of(text), list(known)
    for name in names:
        if name not in known:
            raise InvalidInputError(
                f"{what} {quote(name)} is unknown; choose from {', '.join(known)}"
            )
    return names
