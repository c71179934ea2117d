"""What a run's predictions say: metrics.json, summary.csv, report.md and a report.html that needs no other file."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from star_attention.errors import MissingPackageError
from star_attention.evals.reports.results import Compared, Results, length_name
from star_attention.evals.reports.stats import LEAST, Mean
from star_attention.evals.runs.variants import parse
from star_attention.evals.suites import babilong, infinitebench

METRICS, SUMMARY, MARKDOWN, PAGE, PICTURES = (
    "metrics.json",
    "summary.csv",
    "report.md",
    "report.html",
    "pictures",
)

_FOUND_PROSE = "pydoc_data.topics"
"""What `sources.prose` names the prose that it finds by itself."""

_MARK, _TOO_FEW = " *", " (too few)"
"""Behind differences; `Section.legend` explains them."""

_MOST_BESIDE = 5
"""Variants beside one another in a table. More of them stand below one another, so that a page can hold their names."""


def write(folder: str | Path) -> list[Path]:
    """All four files and, where matplotlib is installed, the pictures, from what the folder holds; the files written.

    Raises `InvalidInputError` for a folder that holds no run, or a damaged one.
    """
    place = Path(folder)
    results = Results.read(place)
    pictures: dict[str, Path] = {}
    notes = []
    try:
        from star_attention.evals.reports import plots

        pictures = plots.draw(results, place / PICTURES)
    except MissingPackageError:
        notes.append(
            'Without pictures: matplotlib is not installed; run: pip install "star-attention[plot]"'
        )
    sections = _sections(results, pictures, notes)
    made = [place / METRICS, place / SUMMARY, place / MARKDOWN, place / PAGE]
    made[0].write_text(json.dumps(metrics(results), indent=2) + "\n", encoding="utf-8")
    with made[1].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(_summary(results))
    made[2].write_text(_markdown(results, sections), encoding="utf-8")
    made[3].write_text(_page(results, sections), encoding="utf-8")
    return made + list(pictures.values())


def metrics(results: Results) -> dict[str, Any]:
    """metrics.json: what the run was, and every mean and difference. `length` null: over all lengths."""

    def over(**cells: Any) -> list[dict[str, Any]]:
        found = [results.compared(variant, **cells) for variant in results.variants]
        return [
            cells | {"length": cells.get("length")} | one.as_dict()
            for one in found
            if one is not None
        ]

    lengths = [None, *results.lengths]
    speeds = [
        results.speed(variant, length) for variant in results.variants for length in results.lengths
    ]
    return {
        "baseline": results.baseline,
        "missing": results.missing,
        "overall": [line for length in lengths for line in over(length=length)],
        "groups": [
            line
            for group in results.groups
            for length in lengths
            for line in over(group=group, length=length)
        ],
        "tasks": [
            line
            for task in results.tasks
            for length in lengths
            for line in over(task=task, length=length)
        ],
        "speed": [asdict(speed) for speed in speeds if speed is not None],
        "at_limit": [asdict(results.at_limit(variant)) for variant in results.variants],
        "run": dict(results.run),
    }


# ------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True, kw_only=True)
class Section:
    """words: columns, from the first on, that hold words and not numbers. The table's marks are explained below it."""

    title: str
    lines: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()
    words: int = 1
    picture: Path | None = None

    @property
    def legend(self) -> str:
        cells = [cell for row in self.table for cell in row]
        marks = []
        if any(cell.endswith(_MARK) for cell in cells):
            marks.append(f"{_MARK.strip()} the interval does not hold 0")
        if any(cell.endswith(_TOO_FEW) for cell in cells):
            marks.append(
                f"{_TOO_FEW.strip()} no interval, where a task and length has fewer than {LEAST} contexts"
            )
        return f"Marks: {'; '.join(marks)}." if marks else ""


def short(results: Results) -> list[str]:
    """One line for each variant: its accuracy over all, and how it stands to the baseline. One more where answers were cut off."""
    lines = []
    for variant in results.variants:
        found = results.compared(variant)
        if found is None:
            lines.append(f"{results.name(variant)}: – (no task and length that all variants have)")
            continue
        line = f"{results.name(variant)}: {accuracy(found.mean)}"
        if variant != results.baseline:
            line += f"; against {results.name(results.baseline)} {told(found)}"
        lines.append(line)
    return lines + _cut_off(results)


def _cut_off(results: Results) -> list[str]:
    """(Many tasks end all answers at the limit, so that only those that are not right are worth a word.)"""
    counts = list(map(results.at_limit, results.variants))
    wrong = [
        f"{results.name(one.variant)} ({one.not_right:,} of {one.answers:,})"
        for one in counts
        if one.not_right
    ]
    if not wrong:
        return []
    right = sum(one.ended - one.not_right for one in counts)
    beside = f" {right:,} right ones ended there too." if right else ""
    line = f"Answers that ended at the token limit and are not fully right: {', '.join(wrong)}; --max-new-tokens gives more."
    return [line + beside]


def accuracy(value: Mean) -> str:
    """In percent, with the standard error: `87.5 ± 1.2`."""
    error = "" if value.stderr is None else f" ± {100 * value.stderr:.1f}"
    return f"{100 * value.value:.1f}{error}"


def told(compared: Compared) -> str:
    """`-4.0 points, 95 % interval -6.1 to -1.9: lower`."""
    difference = compared.difference
    if difference is None:
        return f"not compared: {compared.unpaired}"
    if difference.low is None or difference.high is None:
        return f"{points(difference.value)} points, {difference.verdict}"
    interval = f"{points(difference.low)} to {points(difference.high)}"
    return f"{points(difference.value)} points, 95 % interval {interval}: {difference.verdict}"


def points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def _sections(results: Results, pictures: Mapping[str, Path], notes: list[str]) -> list[Section]:
    baseline = results.name(results.baseline)
    against = f"In percent, ± one standard error. Differences are against {baseline} on the same samples, in points, with the 95 %"
    against += " interval of a paired bootstrap; one whose interval holds 0 is no difference seen."
    words = 1 if len(results.variants) <= _MOST_BESIDE else 2
    lengths: list[tuple[str, dict[str, Any]]] = [
        (length_name(length), {"length": length}) for length in results.lengths
    ]
    sections = [
        Section(title="In short", lines=(*short(results), *_warnings(results), *notes)),
        Section(
            title="Accuracy by length",
            lines=(
                against,
                "A length's value is the mean of its tasks' means; all: the mean over tasks and lengths.",
            ),
            table=_table(
                results, lengths if len(lengths) == 1 else [("all lengths", {}), *lengths]
            ),
            words=words,
            picture=pictures.get("length"),
        ),
    ]
    if len(results.groups) > 1:
        sections.append(
            Section(
                title="By category",
                table=_table(results, [(group, {"group": group}) for group in results.groups]),
                words=words,
                picture=pictures.get("groups"),
            )
        )
    cells = [
        (
            f"{task}, {length_name(length)}{f' ({prose})' if prose else ''}",
            {"task": task, "length": length},
        )
        for task in results.tasks
        for prose in (results.prose(task=task),)
        for length in results.lengths
    ]
    sections.append(Section(title="By task and length", table=_table(results, cells), words=words))
    titles = {
        "variants": "Accuracy of each variant",
        "blocks": "Accuracy against block size",
        "anchors": "Accuracy against anchor size",
        "depth": "Accuracy by depth and length",
    }
    sections += [
        Section(title=title, picture=pictures[name])
        for name, title in titles.items()
        if name in pictures
    ]
    sections.append(
        Section(
            title="Speed",
            lines=("Medians on this machine; a question counts with its share of the encoding.",),
            table=_speeds(results),
            picture=pictures.get("speed"),
        )
    )
    if results.run["skipped"]:
        sections.append(
            Section(
                title="Left out",
                lines=("Longer than the model has positions for (--skip-too-long).",),
                table=(
                    ("sample", "tokens", "positions"),
                    *(
                        (one["sample"], f"{one['tokens']:,}", f"{one['positions']:,}")
                        for one in results.run["skipped"]
                    ),
                ),
            )
        )
    sections.append(
        Section(
            title="Variants",
            lines=(f"{SUMMARY} and {METRICS} name a variant as it is written for --variants.",),
            table=(
                ("variant", "written"),
                *((results.name(variant), variant) for variant in results.variants),
            ),
            words=2,
        )
    )
    sections.append(Section(title="How it was run", table=_facts(results), words=2))
    return sections


def _warnings(results: Results) -> list[str]:
    found = []
    if results.missing:
        found.append(
            f"This run is not complete: {results.missing:,} predictions are missing; run the same command again."
        )
    found += [f"{what} is left out: {why}." for what, why in results.run["left_out"].items()]
    if results.partial:
        named = ", ".join(f"{task} at {length_name(length)}" for task, length in results.partial)
        found.append(
            f"Not all variants have {named}: means over several tasks or lengths leave that out."
        )
    if any(_FOUND_PROSE in results.prose(task=task) for task in results.tasks):
        found.append(
            f"Tasks marked {_FOUND_PROSE} stand in prose of the running Python, without --essays or --background: such numbers"
            " are no RULER or BABILong numbers."
        )
    asked = {one.task for one in results.predictions if "prompts_sha256" in one.meta}
    ours = [
        task
        for task in results.tasks
        if task in (*babilong.TASKS, *infinitebench.KINDS) and task not in asked
    ]
    if ours:
        found.append(
            f"{', '.join(ours)}: prompts of our own, so that these are no numbers of BABILong or InfiniteBench."
        )
    if asked and results.run["settings"]["suite"] == "babilong":
        found.append(f"{', '.join(sorted(asked))}: published prompts, but stories of our own.")
    for names, length in _repeated(results):
        found.append(
            f"{' and '.join(names)} have the same blocks and anchor at {length_name(length)}."
        )
    for variant in results.variants:
        some = results.some(variant)
        empty = sum(not one.prediction.strip() for one in some)
        if empty:
            found.append(
                f"{results.name(variant)}: {empty:,} of {len(some):,} predictions are empty."
            )
    whole = [
        f"{results.name(key)} at {length_name(length)}"
        for key, _ in results.star_variants()
        for length in results.lengths
        if (speed := results.speed(key, length)) is not None and speed.blocks == 1
    ]
    if whole:
        found.append(
            f"One block holds the whole context, which is then dense attention: {', '.join(whole)}."
        )
    return found


def _repeated(results: Results) -> list[tuple[list[str], int]]:
    """Variants whose sizes come out the same, with the length at which they do."""
    found: dict[tuple[Any, ...], list[str]] = {}
    for key in results.variants:
        variant = parse(key)
        for length in results.lengths if variant.has_blocks else ():
            speed = results.speed(key, length)
            if speed is not None:
                other = replace(variant, block_size=None, anchor_size=None)
                found.setdefault((length, other, speed.block_size, speed.anchor_size), []).append(
                    variant.name
                )
    return [(names, length) for (length, *_), names in found.items() if len(names) > 1]


def _table(results: Results, rows: list[tuple[str, dict[str, Any]]]) -> tuple[tuple[str, ...], ...]:
    """Each row some cells, with the accuracy of each variant and, behind them, the differences. Of many variants, a row for each
    of them.
    """
    beside = len(results.variants) <= _MOST_BESIDE
    others = [variant for variant in results.variants if variant != results.baseline]
    head: tuple[str, ...] = ("", "variant", "n", "accuracy", "difference")
    if beside:
        head = (
            "",
            "n",
            *map(results.name, results.variants),
            *(f"{results.name(one)}, difference" for one in others),
        )
    lines = [head]
    for title, cells in rows:
        found = {variant: results.compared(variant, **cells) for variant in results.variants}
        counts = {one.mean.n for one in found.values() if one is not None}
        if not counts:
            if any(results.some(variant, **cells) for variant in results.variants):
                lines.append(
                    (f"{title} (no cell that all variants have)", *("–",) * (len(head) - 1))
                )
            continue
        if not beside:
            names = (title, *("",) * (len(found) - 1))
            lines += [
                (name, *_row(results, variant, one))
                for name, (variant, one) in zip(names, found.items(), strict=True)
            ]
            continue
        n = f"{min(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"
        means = ["–" if one is None else accuracy(one.mean) for one in found.values()]
        lines.append((title, n, *means, *(_difference(found[variant]) for variant in others)))
    return tuple(lines)


def _row(results: Results, variant: str, found: Compared | None) -> tuple[str, ...]:
    if found is None:
        return results.name(variant), "–", "–", "–"
    difference = "" if variant == results.baseline else _difference(found)
    return results.name(variant), f"{found.mean.n:,}", accuracy(found.mean), difference


def _difference(found: Compared | None) -> str:
    if found is None:
        return "–"
    if found.difference is None:
        return "not compared"
    difference = found.difference
    if difference.low is None or difference.high is None:
        return f"{points(difference.value)}{_TOO_FEW}"
    mark = "" if difference.verdict == "no difference seen" else _MARK
    return f"{points(difference.value)} [{points(difference.low)}, {points(difference.high)}]{mark}"


def _speeds(results: Results) -> tuple[tuple[str, ...], ...]:
    lines = [
        (
            "",
            "length",
            "blocks",
            "block",
            "anchor",
            "encode s",
            "answer s",
            "question s",
            "peak GiB",
        )
    ]
    for variant in filter(results.is_timed, results.variants):
        for length in results.lengths:
            speed = results.speed(variant, length)
            if speed is not None:
                lines.append(
                    (
                        results.name(variant),
                        length_name(length),
                        f"{speed.blocks:,}",
                        f"{speed.block_size:,}",
                        f"{speed.anchor_size:,}",
                        f"{speed.encode_s:.3f}",
                        f"{speed.answer_s:.3f}",
                        f"{speed.question_s:.3f}",
                        "–" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**30:.2f}",
                    )
                )
    return tuple(lines)


def _facts(results: Results) -> tuple[tuple[str, ...], ...]:
    settings, sessions = results.run["settings"], results.run["sessions"]

    def all_of(name: str) -> str:
        return ", ".join(dict.fromkeys(_plain(session[name]) for session in sessions))

    options = [
        *settings["options"].items(),
        *(item for session in sessions for item in session["options"].items()),
    ]

    facts = {
        "suite": settings["suite"],
        "options": "; ".join(dict.fromkeys(f"{name}={_plain(value)}" for name, value in options))
        or "none",
        "seed": settings["seed"],
        "chat template": _plain(settings["chat"]),
        "decoding": settings["decoding"],
        "max_new_tokens": settings["max_new_tokens"] or "each sample's own",
        "reserve_tokens": settings["reserve_tokens"],
        "prose": ", ".join(f"{name} ({sha})" for name, sha in results.run["prose"].items())
        or "none",
        "model": all_of("model"),
        "precision": settings["model"]["dtype"].removeprefix("torch."),
        "weights (sampled)": settings["model"]["weights"][:16],
        "tokenizer": _plain(settings["model"]["tokenizer"])[:16],
        "hardware": all_of("hardware"),
        "ranks": all_of("ranks"),
        "versions": ", ".join(f"{name} {number}" for name, number in settings["versions"].items()),
        "git": all_of("git"),
        "dates": all_of("date"),
        "commands": all_of("command"),
        "settings": results.run["settings_sha256"],
    }
    return (("", ""), *((name, str(value)) for name, value in facts.items()))


def _plain(value: Any) -> str:
    """As one would write it: lists with commas, and no words of Python's."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _summary(results: Results) -> list[tuple[Any, ...]]:
    head = (
        "task",
        "length",
        "variant",
        "n",
        "accuracy",
        "stderr",
        "empty",
        "cut_off",
        "baseline",
        "difference",
    )
    lines: list[tuple[Any, ...]] = [(*head, "low", "high", "verdict", "question_s", "prose")]
    for task in results.tasks:
        for length in results.lengths:
            for variant in results.variants:
                found = results.compared(variant, task=task, length=length)
                if found is None:
                    continue
                some = results.some(variant, task=task, length=length)
                beside: tuple[Any, ...] = ("", "", "", "", "")
                if found.difference is not None:
                    one = found.difference
                    beside = (results.baseline, one.value, one.low, one.high, one.verdict)
                empty = sum(not prediction.prediction.strip() for prediction in some)
                seconds = median(prediction.question_s for prediction in some)
                mean = found.mean
                lines.append(
                    (
                        task,
                        length,
                        variant,
                        mean.n,
                        mean.value,
                        mean.stderr,
                        empty,
                        results.at_limit(variant, task=task, length=length).not_right,
                        *beside,
                        seconds,
                        results.prose(task=task),
                    )
                )
    return lines


# ------------------------------------------------------------------------------------------------- pages


def _title(results: Results) -> str:
    names = f"{len(results.variants)} variants"
    if len(results.variants) <= _MOST_BESIDE:
        names = ", ".join(map(results.name, results.variants))
    return f"{results.run['settings']['suite']}: {names}"


def _markdown(results: Results, sections: list[Section]) -> str:
    parts = [f"# {_title(results)}"]
    for section in sections:
        parts.append(f"## {section.title}")
        parts += ["\n".join(f"- {line}" for line in section.lines)] if section.lines else []
        if section.table:
            head, *rows = section.table
            rule = (*("---",) * section.words, *("---:",) * (len(head) - section.words))
            lines = [head, rule, *rows]
            parts.append(
                "\n".join(
                    "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                    for line in lines
                )
            )
        parts += [section.legend] if section.legend else []
        if section.picture is not None:
            parts.append(f"![{section.title}]({PICTURES}/{section.picture.name})")
    return "\n\n".join(parts) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
table.words th:nth-child(2), table.words td:nth-child(2) { text-align: left }
table.facts td { overflow-wrap: anywhere }
img { max-width: 100%; height: auto }
"""


def _page(results: Results, sections: list[Section]) -> str:
    parts = [f"<h1>{escape(_title(results))}</h1>"]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        if section.lines:
            parts.append(
                "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in section.lines) + "</ul>"
            )
        if section.table:
            head, *rows = section.table
            kinds = ["words"] * (section.words > 1) + ["facts"] * (not any(head))
            kind = f' class="{" ".join(kinds)}"' if kinds else ""
            titles = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
            lines = [
                "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            ]
            parts.append(f"<table{kind}><tr>{titles}</tr>{''.join(lines)}</table>")
        parts += [f"<p>{escape(section.legend)}</p>"] if section.legend else []
        if section.picture is not None:
            data = base64.b64encode(section.picture.read_bytes()).decode()
            parts.append(
                f'<p><img alt="{escape(section.title)}" src="data:image/png;base64,{data}"></p>'
            )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(_title(results))}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n"
    )
