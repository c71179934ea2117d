"""Run a benchmark: print the ceilings, a table and a line of JSON, and save JSON and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.cli.bench.options import StartupOptions, TargetOptions
from star_attention.cli.formatting import table
from star_attention.cli.paths import check_output_folder
from star_attention.cli.streams import say
from star_attention.errors import ContextLengthError, InvalidInputError

if TYPE_CHECKING:
    from star_attention.bench.benchmark import Benchmark, Target
    from star_attention.bench.startup import Startup


def measure(benchmark: Benchmark[Any], options: TargetOptions, quiet: bool) -> None:
    """Measure in this process: print the ceilings, then the results, and save them if asked to.

    Raises:
        InvalidInputError: the model or the folder cannot be used.
        ContextLengthError: the model has too few positions.
        MissingPackageError: pictures are wanted, and matplotlib is not installed.
    """
    if _json_file(benchmark.name, options) is not None:
        from star_attention.tools.plotting import require_matplotlib

        require_matplotlib()
    target = _load(benchmark, options, _progress(quiet))
    rows = benchmark.run(target)
    _write(benchmark.table(rows), benchmark.record(target, rows), options)
    if options.out is not None:
        benchmark.draw(rows, target.ceilings, Path(options.out))


def measure_new_processes(
    benchmark: Startup, startup: StartupOptions, options: TargetOptions, quiet: bool
) -> None:
    """Measure start-up in new processes; print and save the rows of both."""
    from star_attention.bench.startup import run_in_new_processes
    from star_attention.tools import machine

    _json_file(benchmark.name, options)
    record, rows = run_in_new_processes(startup.arguments(options), _progress(quiet))
    print(f"{record['model']}, {record['dtype']}, on {record['hardware']}\n")
    record |= {"command": machine.command(), "rows": [asdict(row) for row in rows]}
    _write(benchmark.table(rows), record, options)


def _json_file(benchmark: str, options: TargetOptions) -> Path | None:
    """Return the JSON file to write, None without `--out`.

    Raises:
        InvalidInputError: it cannot be written, or exists.
    """
    if options.out is None:
        return None
    check_output_folder(options.out)
    file = Path(options.out, f"{benchmark}.json")
    if file.exists():
        raise InvalidInputError(
            f"{file} exists, and a measurement is never overwritten; give another folder with --out"
        )
    return file


def _progress(quiet: bool) -> Callable[[str], None]:
    return (lambda line: None) if quiet else say


def _load(
    benchmark: Benchmark[Any], options: TargetOptions, progress: Callable[[str], None]
) -> Target:
    """Load the model, and print it with its ceilings."""
    from star_attention.bench.benchmark import Target
    from star_attention.bench.models import load_model
    from star_attention.hf.loading import rope
    from star_attention.hf.logs import hide_progress_bars
    from star_attention.tools import machine

    hide_progress_bars()
    model = load_model(options.model, options.shapes, dtype=options.dtype, device=options.device)
    limit = rope.max_positions(model.config.get_text_config(decoder=True))
    if limit is not None and benchmark.longest_input > limit:
        raise ContextLengthError(
            f"{benchmark.longest_input:,} tokens are more than the model's {limit:,} positions;"
            " give a shorter --context"
        )
    target = Target.of(model, progress)
    print(f"{target.name}, {target.dtype_name}, on {machine.hardware(target.device)}")
    print(f"{target.ceilings}\n", flush=True)
    return target


def _write(lines: list[tuple[str, ...]], record: dict[str, Any], options: TargetOptions) -> None:
    print(table(lines) + "\n", flush=True)
    print(json.dumps(record), flush=True)
    # Asked again: another process may have written it in the meantime.
    file = _json_file(record["benchmark"], options)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
