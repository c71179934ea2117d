"""The figures of a run, one module for each kind."""

from __future__ import annotations

from pathlib import Path

from star_attention.evals.reports.plots.bars import by_group, by_variant
from star_attention.evals.reports.plots.depth import by_depth
from star_attention.evals.reports.plots.lines import by_length, by_speed
from star_attention.evals.reports.plots.sweep import sweep
from star_attention.evals.reports.results import Results, is_timed
from star_attention.evals.runs.variants import parse
from star_attention.tools.plotting import require_matplotlib


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw the figures that have something to show, and remove the others.

    Returns:
        The PNG files by name: "length", "groups", "variants", "blocks", "anchors", "depth",
        "speed".

    Raises:
        MissingPackageError: Without matplotlib.
    """
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    has_ablations = any(parse(key).is_ablation for key in results.variants)
    figures = {
        "length": by_length(results) if sum(map(bool, results.lengths)) > 1 else None,
        "groups": by_group(results) if len(results.groups) > 1 else None,
        "variants": by_variant(results) if has_ablations else None,
        "blocks": sweep(results, "block"),
        "anchors": sweep(results, "anchor"),
        "depth": by_depth(results),
        "speed": by_speed(results) if any(map(is_timed, results.variants)) else None,
    }
    files = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(path, dpi=150, facecolor="white")
            files[name] = path
    return files
