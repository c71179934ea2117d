"""The folder of a run: `run.json` says what its answers depend on, `predictions.jsonl` has them as they come."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from star_attention.errors import InvalidInputError
from star_attention.evals.runs.variants import Variant
from star_attention.evals.samples.sample import Sample
from star_attention.hf.loading import identity

RUN, PREDICTIONS = "run.json", "predictions.jsonl"
FORMAT = 3

_KEYS = (
    "settings",
    "settings_sha256",
    "cells",
    "variants",
    "skipped",
    "left_out",
    "prose",
    "sessions",
)
"""Of run.json, beside its format."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of predictions.jsonl.

    sample, variant, settings: its key: the sample's id, `Variant.key`, and the hash of run.json's `settings`.
    sample_sha256, context_sha256: of all of the sample, and of its context (first 16 digits). group: `Sample.group`.
    score: 0 to 1. block_size, anchor_size, blocks: as they were resolved for this context. encode_s: of the context;
    sharing: samples of the run on that encoding. answer_s: of the whole answer. peak_bytes: the larger of both phases'; None on a
    CPU.
    """

    sample: str
    variant: str
    settings: str
    task: str
    group: str
    length: int
    sample_sha256: str
    context_sha256: str
    prediction: str
    answers: tuple[str, ...]
    metric: str
    score: float
    finish_reason: str
    context_tokens: int
    query_tokens: int
    answer_tokens: int
    block_size: int
    anchor_size: int
    blocks: int
    encode_s: float
    sharing: int
    answer_s: float
    peak_bytes: int | None
    meta: Mapping[str, Any]

    @property
    def key(self) -> tuple[str, str]:
        return self.sample, self.variant

    @property
    def question_s(self) -> float:
        """Seconds for one question, with its share of the encoding."""
        return self.encode_s / self.sharing + self.answer_s


def check_place(out: Path) -> None:
    """Raises `InvalidInputError` for what is no folder and cannot become one, and for one without a run that has files of the names
    that a run and its reports would write.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InvalidInputError(f"{out} is no folder; give another one with --out")
    from star_attention.evals.reports import report  # (which reads what this module keeps)

    names = (report.METRICS, report.SUMMARY, report.MARKDOWN, report.PAGE, report.PICTURES)
    found = [name for name in names if (out / name).exists()]
    if found and not (out / RUN).exists():
        raise InvalidInputError(
            f"{out} holds no run, but {', '.join(found)}, which the reports would replace; give a new folder with --out"
        )


def read_run(folder: Path) -> dict[str, Any]:
    """run.json of a folder. Raises `InvalidInputError` where there is none, or one that is damaged."""
    found = find_run(folder)
    if found is None:
        raise InvalidInputError(
            f"{folder} holds no {RUN}; give a folder that `eval` has written with --out"
        )
    return found


def find_run(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise InvalidInputError(
                f"{path} has format {found['format']}, this version reads {FORMAT}"
            )
        missing = [name for name in _KEYS if name not in found]
        missing += [
            name
            for name in ("suite", "options", "model")
            if not missing and name not in found["settings"]
        ]
        if missing:
            raise InvalidInputError(
                f"{path} is damaged ({', '.join(missing)} missing); give another folder"
            )
        return dict(found)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except InvalidInputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} is damaged ({error}); give another folder") from None


def read_predictions(folder: Path, *, whole: bool = True) -> Iterator[Prediction]:
    """Those of a folder, in order. A last line without an end is what a kill has left, and is passed over.

    whole: raise where there are none.

    Raises `InvalidInputError` for a damaged line, with its number, and for two of one sample and variant.
    """
    path = folder / PREDICTIONS
    names = {one.name for one in fields(Prediction)}
    seen: dict[tuple[str, str], int] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    values = json.loads(line)
                    if set(values) != names:
                        raise ValueError(
                            f"fields {', '.join(sorted(set(values) ^ names))} are missing or unknown"
                        )
                    prediction = Prediction(**values | {"answers": tuple(values["answers"])})
                    prediction.key.__hash__()
                except (ValueError, TypeError) as error:
                    raise InvalidInputError(
                        f"{path}, line {number:,} is damaged ({error}); remove that line, and run again to make it anew"
                    ) from None
                if prediction.key in seen:
                    raise InvalidInputError(
                        f"{path}, line {number:,} repeats line {seen[prediction.key]:,} (sample {prediction.sample}, variant"
                        f" {prediction.variant}); remove one of them"
                    )
                seen[prediction.key] = number
                yield prediction
    except FileNotFoundError:
        pass
    if whole and not seen:
        raise InvalidInputError(f"{path} holds no predictions; run `eval` first")


def opened(path: Path) -> IO[bytes]:
    """For appending, without a line that a kill has left unfinished; held against a second run in the same folder."""
    file = path.open("ab+")
    try:
        with contextlib.suppress(ImportError):  # (Windows has no such locks.)
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InvalidInputError(
            f"another run is writing to {path}; wait for it, or give another folder"
        ) from None
    except OSError:
        pass  # (some network file systems have no locks)
    file.seek(0)
    data = file.read()
    file.truncate(data.rfind(b"\n") + 1)
    return file


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first of the settings that differs, or that only one of them has: its name, and what it is in either."""
    for sides in ((one, other), (one["model"], other["model"])):
        mine, theirs = (
            {key: value for key, value in side.items() if key != "model"} for side in sides
        )
        found, swapped = identity.difference(mine, theirs), identity.difference(theirs, mine)
        if found is None and swapped is not None:
            found = swapped[0], swapped[2], swapped[1]
        if found is not None:
            own, others = ("not given" if value == "None" else value for value in found[1:])
            return found[0], own, others
    return None


def check_same(out: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises `InvalidInputError` naming the first setting that differs."""
    found = differing(before["settings"], plain(settings))
    if found is not None:
        field, other, own = found
        raise InvalidInputError(
            f"{out} holds a run with another {field}: {other}, and this one's is {own}; give another folder with --out, or the"
            " same settings"
        )


def check_found(out: Path, found: list[Prediction], samples: list[Sample], digest: str) -> None:
    """What is there already was made with these settings, and from these samples."""
    by_id = {sample.id: sample for sample in samples}
    for prediction in found:
        if prediction.settings != digest:
            raise InvalidInputError(
                f"{out} holds predictions of other settings ({prediction.settings}, these are {digest}); give another folder"
            )
        sample = by_id.get(prediction.sample)
        if sample is None or prediction.sample_sha256 == sample_sha256(sample):
            continue
        texts = [meta.get("prose_sha256") for meta in (prediction.meta, sample.meta)]
        what = (
            f"prose: {texts[0]}, and this one's is {texts[1]}"
            if texts[0] != texts[1]
            else "text or answers"
        )
        raise InvalidInputError(
            f"{out} holds a run in which sample {sample.id} has another {what}; give another folder"
        )


def write_run(
    out: Path,
    before: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    digest: str,
    samples: list[Sample],
    variants: Sequence[Variant],
    *,
    plans: Sequence[tuple[str, dict[str, Any]]],
    skipped: list[dict[str, Any]],
    left_out: Mapping[str, str],
    cells: Mapping[str, list[dict[str, Any]]],
    session: dict[str, Any],
) -> None:
    """run.json anew, with all that earlier calls said; a kill leaves the old one.

    plans: a variant's key and one of its resolved block plans. cells: of each variant, how many samples it has to answer.
    """
    before = before or {
        "cells": [],
        "variants": {},
        "skipped": [],
        "left_out": {},
        "prose": {},
        "sessions": [],
    }
    counts = {(cell["task"], cell["length"]): cell["samples"] for cell in before["cells"]}
    now: dict[tuple[str, int], int] = {}
    for sample in samples:
        now[sample.task, sample.length] = now.get((sample.task, sample.length), 0) + 1
    for cell, count in now.items():
        counts[cell] = max(count, counts.get(cell, 0))
    told = {name: dict(one) for name, one in before["variants"].items()}
    for variant in variants:
        told.setdefault(variant.key, {"name": variant.name, "plans": []})["cells"] = cells[
            variant.key
        ]
    for key, plan in plans:
        if plan not in told[key]["plans"]:
            told[key]["plans"].append(plan)
    prose = before["prose"] | {
        str(sample.meta["prose"]): str(sample.meta["prose_sha256"])
        for sample in samples
        if "prose_sha256" in sample.meta
    }
    told_skipped = {one["sample"]: one for one in [*before["skipped"], *skipped]}
    found = {
        "format": FORMAT,
        "settings": settings,
        "settings_sha256": digest,
        "cells": [
            {"task": task, "length": length, "samples": count}
            for (task, length), count in counts.items()
        ],
        "variants": told,
        "skipped": list(told_skipped.values()),
        "left_out": before["left_out"] | dict(left_out),
        "prose": prose,
        "sessions": [*before["sessions"], session],
    }
    write_json(out, found)


def write_json(out: Path, found: Mapping[str, Any]) -> None:
    """run.json, in one move."""
    part = out / (RUN + ".part")
    part.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    part.replace(out / RUN)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sample_sha256(sample: Sample) -> str:
    """Of all of a sample but its length, which is named by what other samples there are."""
    return sha256(canonical(sample.as_dict() | {"length": 0}))
