"""The pictures of a benchmark: time and memory against length, speed-ups, answers against their floor.

Colours are those of Okabe and Ito (2008), told apart by every common form of colour blindness; markers differ as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from star_attention.bench import decode, prefill
from star_attention.errors import InvalidInputError
from star_attention.planning.plan import format_size
from star_attention.tools import machine
from star_attention.tools.plotting import require_matplotlib

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"


def of_files(files: list[Path], folder: Path) -> list[Path]:
    """The pictures of what benchmarks have written, rows of one kind together; the files written.

    Raises `InvalidInputError` for files that are none, and where one kind was measured on several machines or models.
    """
    require_matplotlib()
    prefills: list[prefill.Row] = []
    decodes: list[decode.Row] = []
    of: dict[str, tuple[Any, Path]] = {}
    rates = []
    for path in files:
        found = machine.recorded(path, "prefill", "decode")
        kind = found["benchmark"]
        try:
            same = found["model"], found["dtype"], found["hardware"]
            if kind == "prefill":
                prefills += [prefill.Row(**row) for row in found["rows"]]
                rates.append(float(found["ceilings"]["flops_per_s"]))
            if kind == "decode":
                decodes += [decode.Row(**row) for row in found["rows"]]
        except (ValueError, KeyError, TypeError):
            raise InvalidInputError(
                f"{path} is no JSON of `bench {kind}` as this version writes it"
            ) from None
        before = of.setdefault(kind, (same, path))
        if before[0] != same:
            raise InvalidInputError(
                f"{before[1]} and {path} differ: {before[0]} and {same}; draw them apart"
            )
    folder.mkdir(parents=True, exist_ok=True)
    made = prefill_plots(prefills, median(rates), folder) if prefills else []
    return made + (decode_plots(decodes, folder) if decodes else [])


def prefill_plots(rows: list[prefill.Row], flops_per_s: float, folder: Path) -> list[Path]:
    """Time against length with the floor of each method's operations, speed-ups, and working memory; the files written."""
    made = [_save(_time_against_length(rows, flops_per_s), folder / "prefill-time.png")]
    if any(row.method == "star" and _baseline(row, rows) for row in rows):
        made.append(_save(_speed_ups(rows), folder / "prefill-speedup.png"))
    if any(row.working_bytes is not None for row in rows):
        made.append(_save(_memory(rows), folder / "prefill-memory.png"))
    return made


def decode_plots(rows: list[decode.Row], folder: Path) -> list[Path]:
    """Milliseconds a token against length, with the floor of the bytes; the files written."""
    return [_save(_milliseconds_a_token(rows), folder / "decode.png")]


def _milliseconds_a_token(rows: list[decode.Row]) -> Any:
    figure, axes = _figure("context, tokens", "ms a token")
    for index, compiled in enumerate(sorted({row.compiled for row in rows}, reverse=True)):
        some = [row for row in rows if row.compiled == compiled and row.token_s is not None]
        name = "compiled, CUDA graphs" if compiled else "plain"
        _line(
            axes,
            index,
            name,
            [row.context for row in some],
            [(row.token_s or 0.0) * 1e3 for row in some],
        )
    lengths = sorted({(row.context, row.floor_s) for row in rows})
    floors = [floor * 1e3 for _, floor in lengths]
    style = _floor_style([length for length, _ in lengths], "--")
    axes.plot([length for length, _ in lengths], floors, color="#777777", label="floor", **style)
    _finish(axes, [length for length, _ in lengths])
    axes.set_ylim(bottom=0)
    return figure


def _time_against_length(rows: list[prefill.Row], flops_per_s: float) -> Any:
    figure, axes = _figure("context, tokens", "seconds")
    style = _floor_style([row.context for row in rows], ":")
    for name, some, colour, marker in _series(rows):
        lengths = [row.context for row in some]
        axes.plot(
            lengths, [row.seconds or 0.0 for row in some], color=colour, marker=marker, label=name
        )
        axes.plot(
            lengths, [row.flops / flops_per_s for row in some], color=colour, linewidth=1, **style
        )
    axes.plot([], [], color="#777777", label="floor: operations at the ceiling", **style)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_log_ticks())
    axes.yaxis.set_major_formatter("{x:g}")
    _finish(axes, sorted({row.context for row in rows}))
    return figure


def _speed_ups(rows: list[prefill.Row]) -> Any:
    figure, axes = _figure("", "times as fast as dense attention")
    bars = [
        (row, factor) for row in rows if row.method == "star" and (factor := _baseline(row, rows))
    ]
    bars.sort(key=lambda bar: (bar[0].context, -(bar[0].block or 0), bar[0].kv_dtype or ""))
    names = [
        "\n".join(
            [format_size(row.context), f"block {format_size(row.block or 0)}", row.kv_dtype or ""]
        )
        for row, _ in bars
    ]
    drawn = axes.bar(names, [factor for _, factor in bars], color=_COLOURS[0])
    axes.bar_label(drawn, fmt="%.2f")
    axes.tick_params("x", labelsize=8)
    axes.axhline(1, color="#777777", linewidth=1)
    return figure


def _series(rows: list[prefill.Row]) -> Iterator[tuple[str, list[prefill.Row], str, str]]:
    """Each with its colour, which is its method's, and a marker that tells a method's settings apart."""
    drawn: dict[str, int] = {}
    for name, some in prefill.series(rows):
        method = some[0].method
        index = drawn[method] = drawn.get(method, -1) + 1
        yield (
            name,
            some,
            _COLOURS[prefill.METHODS.index(method) % len(_COLOURS)],
            _MARKERS[index % len(_MARKERS)],
        )


def _baseline(row: prefill.Row, rows: list[prefill.Row]) -> float | None:
    return prefill.speed_up(row, rows, "dense") or prefill.speed_up(row, rows, "stock")


def _memory(rows: list[prefill.Row]) -> Any:
    figure, axes = _figure("context, tokens", "GiB beyond weights and KV")
    for name, every, colour, marker in _series(rows):
        some = [row for row in every if row.working_bytes is not None]
        memory = [(row.working_bytes or 0) / 2**30 for row in some]
        axes.plot([row.context for row in some], memory, color=colour, marker=marker, label=name)
    _finish(axes, sorted({row.context for row in rows}))
    axes.set_ylim(bottom=0)
    return figure


def _figure(across: str, up: str) -> tuple[Any, Any]:
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _line(axes: Any, index: int, name: str, lengths: list[int], values: list[float]) -> None:
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    axes.plot(lengths, values, color=colour, marker=marker, label=name)


def _floor_style(lengths: list[int], line: str) -> dict[str, Any]:
    """A line, or a dash where there is one length alone, at which a line would not be seen."""
    return (
        dict(linestyle=line)
        if len(set(lengths)) > 1
        else dict(linestyle="", marker="_", markersize=14)
    )


def _finish(axes: Any, lengths: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [format_size(length) for length in lengths])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _log_ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(base=10, subs=(1, 2, 5))


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150)
    return path
