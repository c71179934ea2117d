"""Run a benchmark: print the ceilings, a table and a line of JSON, and save JSON and pictures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from star_attention.cli.bench.options import StartupOptions, TargetOptions
from star_attention.cli.formatting import table
from star_attention.cli.paths import check_output_folder
from star_attention.cli.streams import say
from star_attention.cli.torchrun import is_rank_0, rank_and_size
from star_attention.errors import ContextLengthError, InvalidInputError

if TYPE_CHECKING:
    from star_attention.bench.benchmark import Benchmark, Target
    from star_attention.bench.startup import Startup
    from star_attention.distributed import Comm
    from star_attention.tools.machine import Ceilings


def measure(
    benchmark: Benchmark[Any],
    options: TargetOptions,
    quiet: bool,
    budget_s: float | None = None,
) -> None:
    """Measure in this process: print the ceilings, then the results, and save them if asked to.

    Under torchrun all ranks measure together, and rank 0 prints and saves. After `budget_s` seconds
    no further row is begun.

    Raises:
        InvalidInputError: the model or the folder cannot be used.
        ContextLengthError: the model has too few positions.
        MissingPackageError: pictures are wanted, and matplotlib is not installed.
    """
    run = Run.start([benchmark.name], options, quiet, budget_s)
    target = run.load(benchmark.longest_input, options.tensor_parallel)
    rows = run.rows(benchmark, target, [])
    run.finish(benchmark, benchmark.record(target, rows), rows, target.ceilings)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The benchmarks of one command, on all ranks.

    Attributes:
        options: the model and the output folder.
        comm: the ranks.
        progress: called with a line before each measurement.
        stop_at: the time (`time.monotonic`) after which no row is begun; None for no limit.
    """

    options: TargetOptions
    comm: Comm
    progress: Callable[[str], None]
    stop_at: float | None = None

    @classmethod
    def start(
        cls, names: list[str], options: TargetOptions, quiet: bool, budget_s: float | None = None
    ) -> Run:
        """Meet the other ranks, and check the files of these benchmarks. Collective."""
        from star_attention.distributed import from_environment

        stop_at = None if budget_s is None else time.monotonic() + budget_s
        comm = from_environment(None)

        def check_output() -> None:
            if options.out is not None:
                from star_attention.tools.plotting import require_matplotlib

                for name in names:
                    _json_file(name, options)
                require_matplotlib()

        with comm.collective("startup"):
            comm.run_on_rank_0(check_output)
        return cls(options=options, comm=comm, progress=_progress(quiet), stop_at=stop_at)

    def load(self, longest_input: int, tensor_parallel: int) -> Target:
        """Load the model, and print it with its ceilings. Collective."""
        from star_attention.bench.benchmark import Target
        from star_attention.bench.models import load_model
        from star_attention.hf.loading.positions import max_positions
        from star_attention.hf.logs import hide_progress_bars
        from star_attention.tools import machine

        hide_progress_bars()
        options, comm = self.options, self.comm
        model = load_model(
            options.model,
            options.shapes,
            dtype=options.dtype,
            weights=options.weights,
            device=options.device,
            comm=comm,
            tensor_parallel=tensor_parallel,
        )
        limit = max_positions(model.config.get_text_config(decoder=True))
        if limit is not None and longest_input > limit:
            raise ContextLengthError(
                f"{longest_input:,} tokens are more than the model's {limit:,} positions;"
                " give a shorter --context"
            )
        target = Target.of(model, self.progress, comm, tensor_parallel)
        ranks = "" if comm.size == 1 else f"{comm.size} ranks, each a "
        dtype = target.dtype_name + (f", weights {target.weights}" if target.weights else "")
        print(f"{target.name}, {dtype}, on {ranks}{machine.hardware(target.device)}")
        print(f"{target.ceilings}\n", flush=True)
        return target

    def rows(self, benchmark: Benchmark[Any], target: Target, earlier: list[Any]) -> list[Any]:
        """Measure, and save each row with those before it. Collective.

        Args:
            earlier: rows of the same benchmark, measured with other targets.
        """
        rows = list(earlier)
        for row in benchmark.run(target):
            rows.append(row)
            self.progress(_line(benchmark, row))
            if self.comm.rank == 0:
                record = benchmark.record(target, rows) | {"finished": False}
                _save(record, self.options, first=len(rows) == 1)
            if self.out_of_time():
                self.progress("no time is left for the other rows")
                break
        return rows

    def out_of_time(self) -> bool:
        """Return True once no more rows are to be begun. Collective if there is a limit."""
        if self.stop_at is None:
            return False
        stop_at = self.stop_at
        with self.comm.collective("a benchmark"):
            return bool(self.comm.run_on_rank_0(lambda: time.monotonic() > stop_at))

    def finish(
        self,
        benchmark: Benchmark[Any],
        record: dict[str, Any],
        rows: list[Any],
        ceilings: Ceilings,
    ) -> None:
        """Print the rows, and save their record and their pictures, on rank 0."""
        if self.comm.rank:
            return
        _print(benchmark.table(rows), record, benchmark.comparison(rows))
        _save(record, self.options, first=not rows)
        if self.options.out is not None:
            benchmark.draw(rows, ceilings, Path(self.options.out))


def measure_elsewhere(
    benchmark: Benchmark[Any],
    measured: Callable[[Callable[[str], None]], Iterator[Any]],
    head: dict[str, Any],
    options: TargetOptions,
    *,
    quiet: bool,
    budget_s: float | None,
) -> list[Any]:
    """Measure what runs somewhere else, without a model here; print and save its rows.

    Args:
        benchmark: the benchmark.
        measured: yields its rows, given what to call with a line before each.
        head: what the JSON says of the model.
        options: where to save.
        quiet: True to print no lines before rows.
        budget_s: seconds after which no further row is begun; None for no limit.
    """
    from star_attention.tools import machine

    run = Run.start([benchmark.name], options, quiet, budget_s)
    record: dict[str, Any] = {"benchmark": benchmark.name, **head, **machine.circumstances()}
    rows: list[Any] = []
    for row in measured(run.progress):
        rows.append(row)
        run.progress(_line(benchmark, row))
        record["rows"] = [asdict(row) for row in rows]
        _save(record | {"finished": False}, options, first=len(rows) == 1)
        if run.out_of_time():
            run.progress("no time is left for the other rows")
            break
    record["rows"] = [asdict(row) for row in rows]
    _print(benchmark.table(rows), record, benchmark.comparison(rows))
    _save(record, options, first=not rows)
    return rows


def measure_new_processes(
    benchmark: Startup, startup: StartupOptions, options: TargetOptions, quiet: bool
) -> None:
    """Measure start-up in new processes, as many at once as there are ranks; print and save."""
    from star_attention.bench.startup import run_in_new_processes
    from star_attention.tools import machine

    _json_file(benchmark.name, options)
    rank, ranks = rank_and_size()
    if ranks > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(ranks):
        raise InvalidInputError(
            f"start-up is measured on one machine, and these {ranks} ranks are on several; start"
            " them on one, or measure with --in-this-process"
        )
    if rank:
        # Rank 0 starts all processes that are measured.
        return
    arguments = startup.arguments(options)
    record, rows = run_in_new_processes(arguments, _progress(quiet), ranks)
    print(f"{record['model']}, {record['dtype']}, on {record['hardware']}\n")
    record |= {"command": machine.command(), "rows": [asdict(row) for row in rows]}
    _print(benchmark.table(rows), record)
    _save(record, options, first=True)


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
    return (lambda line: None) if quiet or not is_rank_0() else say


def _line(benchmark: Benchmark[Any], row: Any) -> str:
    """Return a row's figures in a line, for those who wait for the others."""
    head, cells = benchmark.table([row])[:2]
    named = (f"{name} {cell}".strip() for name, cell in zip(head, cells, strict=False) if cell)
    return f"  {', '.join(named)}"


def _print(
    lines: list[tuple[str, ...]],
    record: dict[str, Any],
    comparison: list[tuple[str, ...]] | None = None,
) -> None:
    for cells in filter(None, (lines, comparison)):
        print(table(cells) + "\n")
    print(json.dumps(record), flush=True)


def _save(record: dict[str, Any], options: TargetOptions, *, first: bool) -> None:
    """Write the JSON, over what this run has written of it before."""
    # Asked again: another process may have written it in the meantime.
    file = _json_file(record["benchmark"], options) if first else None
    if options.out is None:
        return
    file = file or Path(options.out, f"{record['benchmark']}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
