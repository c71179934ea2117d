"""`star-attention bench`: measurements beside the machine's ceilings, a table and then one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from star_attention.cli.options import (
    Device,
    Dtype,
    KvDevice,
    KvDtype,
    Quiet,
    TokensPerForward,
    option,
    size,
    sizes,
)
from star_attention.cli.progress import table
from star_attention.cli.session import check_folder
from star_attention.cli.streams import say
from star_attention.config import StarConfig
from star_attention.errors import ContextLengthError, InvalidInputError

if TYPE_CHECKING:
    from star_attention.planning.cost import ModelShape
    from star_attention.tools.machine import Ceilings

Compile = Annotated[
    bool | None,
    option(
        "With compiled layers and CUDA graphs, or without.",
        "--compile/--no-compile",
        panel="Benchmark",
        show_default="on a GPU, where Triton is installed",
    ),
]
Contexts = Annotated[
    str,
    option(
        "Lengths in tokens, with commas between, or doublings: 8k..64k.",
        panel="Benchmark",
        metavar="SIZES",
    ),
]
Block = Annotated[str, option("Block size of Star Attention.", panel="Benchmark", metavar="SIZE")]
Repeats = Annotated[
    int, option("Runs of each, of which the median counts.", panel="Benchmark", metavar="N", min=1)
]
QueryTokens = Annotated[int, option("Tokens of a query.", panel="Benchmark", metavar="N", min=1)]


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured, and where the results go."""

    model: Annotated[
        str | None,
        option("Model folder, or hub id.", "--model", "-m", panel="Model", metavar="MODEL"),
    ] = None
    shapes: Annotated[
        str | None,
        option(
            "Instead of a model: random weights of the shapes of llama-3.1-8b or llama-3.2-1b.",
            "--shapes",
            panel="Model",
            metavar="NAME",
        ),
    ] = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    out: Annotated[
        str | None,
        option(
            "A folder for the JSON and the pictures; it must not hold the same benchmark's already.",
            "--out",
            panel="Output",
            metavar="FOLDER",
        ),
    ] = None


def prefill(
    subject: Subject,
    context: Contexts = "32k",
    block: Annotated[
        str,
        option(
            "Block sizes, with commas between; /4 is a quarter of the context.",
            panel="Benchmark",
            metavar="SIZES",
        ),
    ] = "/4,/8",
    methods: Annotated[
        str,
        option(
            "Of stock (transformers), stock-cudnn (pinned to cuDNN's attention), dense and star (ours), official (the paper's"
            " implementation, which encodes the anchor for each block), streaming_llm (the block is its window), with commas"
            " between.",
            panel="Benchmark",
            metavar="NAMES",
        ),
    ] = "stock,dense,official,star",
    tokens_per_forward: TokensPerForward = None,
    repeats: Annotated[
        int,
        option(
            "Runs of each after the first, of which the median counts; with 0 the first counts.",
            panel="Benchmark",
            metavar="N",
            min=0,
        ),
    ] = 3,
    dense_up_to: Annotated[
        str | None,
        option(
            "Longest context at which dense methods run; beyond it their time is worked out from their two longest runs.",
            "--dense-up-to",
            panel="Benchmark",
            metavar="SIZE",
        ),
    ] = None,
    kv_dtype: KvDtype = None,
    compile: Compile = None,
    quiet: Quiet = False,
) -> None:
    """Time to encode a context, beside dense attention and the paper's own scheme.

    Every method is measured in the same run, on random token ids. The rate counts a method's own operations; "of FLOP ratio"
    says how much of what the operations promise against dense attention is reached.

    Example: star-attention bench prefill -m models/needle-17m --context 8k,32k --block 4k
    """
    from star_attention.bench import prefill as bench
    from star_attention.hf.loading import load

    StarConfig.of(tokens_per_forward=tokens_per_forward, kv_dtype=kv_dtype)
    cases = bench.cases(
        sizes(context, "context"),
        [one.strip() for one in block.split(",")],
        [one.strip() for one in methods.split(",")],
        device=load.pick_device(subject.device),
        dense_up_to=None if dense_up_to is None else size(dense_up_to, "dense-up-to"),
    )
    longest = max((case.context for case in cases if not case.extrapolated), default=0)
    bench_model, shape, ceilings, progress = _begin("prefill", subject, quiet, longest)
    rows = bench.run(
        bench_model,
        shape,
        ceilings,
        cases,
        repeats=repeats,
        tokens_per_forward=tokens_per_forward,
        compile=compile,
        kv_dtype=kv_dtype,
        progress=progress,
    )
    _report("prefill", subject, bench_model, ceilings, rows, bench.table(rows))
    if subject.out is not None:
        from star_attention.bench import plots

        plots.prefill_plots(rows, ceilings.flops_per_s, Path(subject.out))


def decode(
    subject: Subject,
    context: Contexts = "16k",
    block: Block = "16k",
    queries: Annotated[
        int, option("Queries answered at once.", panel="Benchmark", metavar="N", min=1)
    ] = 1,
    query_tokens: QueryTokens = 64,
    answer_tokens: Annotated[
        int, option("Tokens of an answer.", panel="Benchmark", metavar="N", min=2)
    ] = 256,
    repeats: Repeats = 3,
    kv_dtype: KvDtype = None,
    kv_device: KvDevice = None,
    compile: Compile = None,
    quiet: Quiet = False,
) -> None:
    """Time for each token of an answer, beside what reading weights, keys and values once would take.

    Unless --compile or --no-compile is given, both are measured where there is a GPU.

    Example: star-attention bench decode --shapes llama-3.1-8b --context 16k,128k
    """
    from star_attention.bench import decode as bench

    StarConfig.of(kv_dtype=kv_dtype, kv_device=kv_device)
    lengths, block_size = sizes(context, "context"), size(block, "block_size")
    longest = max(lengths) + query_tokens + answer_tokens
    bench_model, shape, ceilings, progress = _begin("decode", subject, quiet, longest)
    on_gpu = next(bench_model.parameters()).device.type == "cuda"
    rows = bench.run(
        bench_model,
        shape,
        ceilings,
        contexts=lengths,
        block=block_size,
        queries=queries,
        query_tokens=query_tokens,
        tokens=answer_tokens,
        repeats=repeats,
        compile=[compile] if compile is not None else [True, False] if on_gpu else [False],
        kv_dtype=kv_dtype,
        kv_device=kv_device,
        progress=progress,
    )
    _report("decode", subject, bench_model, ceilings, rows, bench.table(rows))
    if subject.out is not None:
        from star_attention.bench import plots

        plots.decode_plots(rows, Path(subject.out))


def questions(
    subject: Subject,
    context: Contexts = "16k",
    block: Block = "4k",
    questions: Annotated[
        int, option("Questions on each text.", panel="Benchmark", metavar="N", min=1)
    ] = 20,
    query_tokens: QueryTokens = 64,
    answer_tokens: Annotated[
        int, option("Tokens of an answer.", panel="Benchmark", metavar="N", min=1)
    ] = 32,
    repeats: Repeats = 3,
    compile: Compile = None,
    quiet: Quiet = False,
) -> None:
    """Time for many questions on one text: encoded once, against transformers reading it again for each.

    One question is measured (the median of --repeats) and counted --questions times.

    Example: star-attention bench questions -m models/needle-17m --context 8k --questions 100
    """
    from star_attention.bench import questions as bench

    lengths, block_size = sizes(context, "context"), size(block, "block_size")
    longest = max(lengths) + query_tokens + answer_tokens
    bench_model, _, ceilings, progress = _begin("questions", subject, quiet, longest)
    rows = bench.run(
        bench_model,
        contexts=lengths,
        block=block_size,
        questions=questions,
        query_tokens=query_tokens,
        tokens=answer_tokens,
        repeats=repeats,
        compile=compile,
        progress=progress,
    )
    _report("questions", subject, bench_model, ceilings, rows, bench.table(rows))


def kernels(
    subject: Subject,
    context: Contexts = "16k,128k",
    block: Annotated[
        str, option("Block sizes, with commas between.", panel="Benchmark", metavar="SIZES")
    ] = "4k,16k",
    repeats: Repeats = 10,
    quiet: Quiet = False,
) -> None:
    """Attention kernels one by one, in the model's shapes, beside the ceiling that bounds each.

    Example: star-attention bench kernels --shapes llama-3.1-8b
    """
    from star_attention.bench import kernels as bench

    lengths, blocks = sizes(context, "context"), sizes(block, "block_size")
    bench_model, shape, ceilings, progress = _begin("kernels", subject, quiet)
    first = next(bench_model.parameters())
    rows = bench.run(
        max(shape.attention, key=lambda call: call.heads),
        shape.hidden_size,
        ceilings,
        first.device,
        first.dtype,
        blocks=blocks,
        contexts=lengths,
        repeats=repeats,
        progress=progress,
    )
    _report("kernels", subject, bench_model, ceilings, rows, bench.table(rows))


def startup(
    subject: Subject,
    context: Annotated[
        str, option("Tokens of the context.", panel="Benchmark", metavar="SIZE")
    ] = "48k",
    block: Block = "16k",
    query_tokens: QueryTokens = 64,
    compile: Compile = None,
    in_this_process: Annotated[
        bool,
        option(
            "Measure this process alone, with the caches that there are.",
            "--in-this-process",
            panel="Benchmark",
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """What the first context, query and token of a process cost beyond their work, with empty and with filled caches on disk.

    Two processes are measured one after the other, with a cache folder of their own.

    Example: star-attention bench startup --shapes llama-3.1-8b
    """
    from star_attention.bench import startup as bench
    from star_attention.tools import machine

    length, block_size = size(context, "context"), size(block, "block_size")
    if in_this_process:
        bench_model, _, ceilings, progress = _begin(
            "startup", subject, quiet, length + query_tokens + 2
        )
        rows = bench.in_this_process(
            bench_model,
            context=length,
            block=block_size,
            query_tokens=query_tokens,
            compile=compile,
            progress=progress,
        )
        _report("startup", subject, bench_model, ceilings, rows, bench.table(rows))
        return
    _target("startup", subject)
    arguments = [
        "bench",
        "startup",
        "--in-this-process",
        "--quiet",
        "--dtype",
        subject.dtype,
        "--device",
        subject.device,
    ]
    arguments += ["--context", context, "--block", block, "--query-tokens", str(query_tokens)]
    arguments += [] if subject.model is None else ["--model", subject.model]
    arguments += [] if subject.shapes is None else ["--shapes", subject.shapes]
    arguments += [] if compile is None else ["--compile" if compile else "--no-compile"]
    found, rows = bench.in_new_processes(arguments, lambda line: None if quiet else say(line))
    print(f"{found['model']}, {found['dtype']}, on {found['hardware']}\n")
    found |= {"command": machine.command(), "rows": [asdict(row) for row in rows]}
    _write("startup", subject, found, bench.table(rows))


def plot(
    files: Annotated[
        list[str],
        typer.Argument(help="JSON of `bench prefill` or `bench decode`.", metavar="FILES"),
    ],
    out: Annotated[
        str, option("A folder for the pictures.", "--out", panel="Output", metavar="FOLDER")
    ],
) -> None:
    """Draw the pictures of measurements that were made before, those of several files in one.

    Example: star-attention bench plot prefill.json --out pictures
    """
    from star_attention.bench import plots

    check_folder(out)
    for made in plots.of_files([Path(name) for name in files], Path(out)):
        print(made)


COMMANDS: tuple[Callable[..., None], ...] = (prefill, decode, questions, kernels, startup, plot)


def _target(what: str, subject: Subject) -> Path | None:
    """The JSON to be written, if there is one to be.

    Raises `InvalidInputError` where it cannot be, or would replace another.
    """
    if subject.out is None:
        return None
    check_folder(subject.out)
    target = Path(subject.out, f"{what}.json")
    if target.exists():
        raise InvalidInputError(
            f"{target} holds a measurement, which would be lost; give another folder with --out"
        )
    return target


def _begin(
    what: str, subject: Subject, quiet: bool, longest: int = 0
) -> tuple[Any, ModelShape, Ceilings, Callable[[str], None]]:
    """The loaded model, its shape, the ceilings (printed first), and what is told on the way. longest: positions that are needed.

    Raises `ContextLengthError` where the model has fewer.
    """
    if _target(what, subject) is not None:
        from star_attention.tools.plotting import require_matplotlib

        require_matplotlib()

    def progress(line: str) -> None:
        if not quiet:
            say(line)

    from star_attention.bench.subject import model_of, name_of
    from star_attention.hf.loading import rope
    from star_attention.hf.logs import hide_progress_bars
    from star_attention.hf.shape import model_shape
    from star_attention.tools import machine

    hide_progress_bars()
    model = model_of(subject.model, subject.shapes, dtype=subject.dtype, device=subject.device)
    limit = rope.max_positions(model.config.get_text_config(decoder=True))
    if limit is not None and longest > limit:
        raise ContextLengthError(
            f"{longest:,} tokens are more than the model's {limit:,} positions; give a shorter --context"
        )
    first = next(model.parameters())
    ceilings = machine.ceilings(first.device, first.dtype)
    kind = str(first.dtype).removeprefix("torch.")
    print(
        f"{name_of(model)}, {kind}, on {machine.hardware(first.device)}\n{ceilings}\n", flush=True
    )
    return model, model_shape(model.config, kind), ceilings, progress


def _report(
    what: str,
    subject: Subject,
    model: Any,
    ceilings: Ceilings,
    rows: list[Any],
    lines: list[tuple[str, ...]],
) -> None:
    """The table, then one line of JSON."""
    from star_attention.bench.subject import name_of
    from star_attention.tools import machine

    first = next(model.parameters())
    found = {
        "benchmark": what,
        "model": name_of(model),
        "dtype": str(first.dtype).removeprefix("torch."),
    }
    found |= machine.record(first.device, ceilings) | {"rows": [asdict(row) for row in rows]}
    _write(what, subject, found, lines)


def _write(
    what: str, subject: Subject, found: dict[str, Any], lines: list[tuple[str, ...]]
) -> None:
    """What was found, for people, in one line of JSON, and in the folder."""
    print(table(lines) + "\n", flush=True)
    print(json.dumps(found), flush=True)
    target = _target(what, subject)
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
