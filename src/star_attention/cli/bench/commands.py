"""The commands of `star-attention bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from star_attention.cli.bench.driver import measure, measure_new_processes
from star_attention.cli.bench.options import (
    DecodeOptions,
    KernelsOptions,
    PrefillOptions,
    QuestionsOptions,
    StartupOptions,
    TargetOptions,
)
from star_attention.cli.bench.ranks import RanksOptions, measure_ranks
from star_attention.cli.bench.rows import RowsOptions
from star_attention.cli.bench.serve import ServeBenchOptions, measure_server
from star_attention.cli.options import Quiet, option
from star_attention.cli.paths import check_output_folder


def prefill(target: TargetOptions, options: PrefillOptions, quiet: Quiet = False) -> None:
    """Time to encode a context, compared with dense attention and the official implementation.

    Every method is measured in the same run, on random token ids. The rate counts the operations
    that a method needs; "speed-up / FLOP ratio" is the speed-up over dense attention, divided by
    the ratio of their operations.

    Example: star-attention bench prefill -m models/needle-17m --context 4k --block 1k
    """
    measure(options.benchmark(target), target, quiet)


def decode(target: TargetOptions, options: DecodeOptions, quiet: Quiet = False) -> None:
    """Time per token of an answer, compared with reading weights, keys and values once.

    On a GPU compiled layers are measured as well as plain ones, unless --compile or --no-compile
    is given.

    Example: star-attention bench decode --shapes llama-3.1-8b --context 16k,128k
    """
    measure(options.benchmark(), target, quiet)


def questions(target: TargetOptions, options: QuestionsOptions, quiet: Quiet = False) -> None:
    """Time for many questions on one text, compared with transformers, which rereads it each time.

    One question is measured (the median of --repeats) and counted --questions times.

    Example: star-attention bench questions -m models/needle-17m --context 8k --questions 100
    """
    measure(options.benchmark(), target, quiet)


def rows(target: TargetOptions, options: RowsOptions, quiet: Quiet = False) -> None:
    """Tokens per second of many rows at once, compared with reading all they read once a step.

    Rows share decode steps (`StarLLM.batch`). They are measured in a single process, on random
    token ids.

    Example: star-attention bench rows --shapes llama-3.1-8b --context 16k --texts 16 --rows 64
    --cases lockstep,turnover
    """
    measure(options.benchmark(), target, quiet)


def serve(target: TargetOptions, options: ServeBenchOptions, quiet: Quiet = False) -> None:
    """Clients of a server over loopback, compared with the same work in Python.

    The server runs in a process of its own, the clients in others. Times are those of the clients;
    rates count from the first request to the last text.

    Example: star-attention bench serve --shapes llama-3.1-8b --out results --budget 240
    """
    measure_server(options, target, quiet)


def kernels(target: TargetOptions, options: KernelsOptions, quiet: Quiet = False) -> None:
    """Attention kernels one by one in the model's shapes, each with the ceiling that bounds it.

    Example: star-attention bench kernels --shapes llama-3.1-8b
    """
    measure(options.benchmark(), target, quiet)


def startup(target: TargetOptions, options: StartupOptions, quiet: Quiet = False) -> None:
    """Extra time of the first context, query and token, with empty and with filled caches on disk.

    Two processes are measured, one after the other, with cache folders of their own.

    Example: star-attention bench startup --shapes llama-3.1-8b
    """
    benchmark = options.benchmark()
    if options.in_this_process:
        measure(benchmark, target, quiet)
    else:
        measure_new_processes(benchmark, options, target, quiet)


def ranks(target: TargetOptions, options: RanksOptions, quiet: Quiet = False) -> None:
    """Both phases on several ranks, next to rank 0 alone: prefill, decode and questions in one run.

    The model is loaded once for each mesh; --tensor-parallel does not count. Rows that fail are
    reported, and the rest goes on.

    Example: torchrun --nproc-per-node 2 -m star_attention bench ranks --shapes llama-3.1-8b
    --out results --budget 500
    """
    measure_ranks(options, target, quiet)


def plot(
    files: Annotated[
        list[str],
        typer.Argument(help="JSON of `bench prefill` or `bench decode`.", metavar="FILES"),
    ],
    out: Annotated[
        str, option("Folder for the pictures.", "--out", panel="Output", metavar="FOLDER")
    ],
) -> None:
    """Draw the pictures of earlier measurements; several files share a picture.

    Example: star-attention bench plot prefill.json --out pictures
    """
    from star_attention.bench.pictures import draw_files

    check_output_folder(out)
    for file in draw_files([Path(name) for name in files], Path(out)):
        print(file)
