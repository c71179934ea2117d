"""Parts of a run, each in a folder of its own, joined: the report is that of one run, and what cannot be one is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.errors import InvalidInputError
from star_attention.evals.reports import report
from star_attention.evals.reports.results import Results
from star_attention.evals.runs import run_folder
from star_attention.evals.runs.merge import join
from star_attention.evals.runs.run_folder import Prediction
from star_attention.evals.runs.runner import run
from tests.unit.test_evals_report import folder
from tests.unit.test_evals_runner import VARIANTS, engine, samples


def change_run(place: Path, change: Callable[[dict[str, Any]], None]) -> None:
    told = run_folder.read_run(place)
    change(told)
    (place / run_folder.RUN).write_text(json.dumps(told))


def test_parts_are_reported_as_the_whole(tmp_path: Path) -> None:
    whole = folder(tmp_path / "whole", lengths=(1024, 2048))
    parts = [folder(tmp_path / str(length), lengths=(length,)) for length in (1024, 2048)]
    join(parts, tmp_path / "joined")
    for place in (whole, tmp_path / "joined"):
        report.write(place)
    told = [
        json.loads((place / report.METRICS).read_text()) for place in (whole, tmp_path / "joined")
    ]
    for name in ("baseline", "missing", "overall", "groups", "tasks", "speed"):
        assert told[0][name] == told[1][name], name
    assert (tmp_path / "joined" / "pictures" / "length.png").exists()
    assert len(told[1]["run"]["sessions"]) == 2


def test_variants_of_the_same_samples_are_compared(tmp_path: Path) -> None:
    parts = [
        folder(tmp_path / str(place), key)
        for place, key in enumerate(("dense", "star:/4", "star:/2"))
    ]
    join(parts, tmp_path / "joined")
    results = Results.read(tmp_path / "joined")
    assert results.variants == ["dense", "star:/4", "star:/2"]
    assert results.missing == 0
    compared = results.compared("star:/4")
    assert compared is not None
    assert compared.difference is not None


def test_what_two_folders_have_is_taken_once(tmp_path: Path) -> None:
    parts = [folder(tmp_path / "a", count=4), folder(tmp_path / "b", count=8)]
    join(parts, tmp_path / "joined")
    results = Results.read(tmp_path / "joined")
    assert len(results.predictions) == len(Results.read(tmp_path / "b").predictions)
    assert results.missing == 0


def test_parts_may_have_samples_of_the_same_tasks(tmp_path: Path) -> None:
    """How many there are is counted, so that a join is called complete only where it is."""
    halves = [folder(tmp_path / str(half), change=every_second(half)) for half in (0, 1)]
    with pytest.raises(
        InvalidInputError,
        match=r"0 has 4 of 8 samples of niah at 1,024 tokens, .*run its command again",
    ):
        join(halves, tmp_path / "joined")
    for half in halves:
        change_run(half, halved)
    join(halves, tmp_path / "joined")
    results = Results.read(tmp_path / "joined")
    assert results.missing == 0
    assert {cell["samples"] for cell in results.run["cells"]} == {8}
    assert len(results.predictions) == 3 * 2 * 8 * 2


def every_second(first: int) -> Callable[[Prediction], Prediction | None]:
    return lambda one: one if int(one.sample[-1]) % 2 == first else None


def halved(told: dict[str, Any]) -> None:
    for cells in (told["cells"], *(variant["cells"] for variant in told["variants"].values())):
        for cell in cells:
            cell["samples"] = 4


def test_a_part_that_is_not_complete_is_told_so(tmp_path: Path) -> None:
    parts = [
        folder(tmp_path / "a", lengths=(1024,)),
        folder(
            tmp_path / "b",
            lengths=(2048,),
            change=lambda one: one if one.sample[-1] != "7" else None,
        ),
    ]
    join(parts, tmp_path / "joined")
    assert Results.read(tmp_path / "joined").missing == 3 * 2


def test_a_joined_run_goes_on(tmp_path: Path) -> None:
    """Of real runs: what is there is not done again, and more may be added."""
    star = engine()
    run(star, samples(4)[:2], VARIANTS, tmp_path / "a")
    run(star, samples(4)[2:], VARIANTS, tmp_path / "b")
    join([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    done = run(star, samples(5), VARIANTS, tmp_path / "joined")
    assert (done.found, done.made) == (8, 2)
    assert Results.read(tmp_path / "joined").missing == 0


def other_setting(told: dict[str, Any]) -> None:
    told["settings"]["seed"] = 1


def other_options(told: dict[str, Any]) -> None:
    told["settings"]["options"] = {"words": "eval"}


def other_prose(told: dict[str, Any]) -> None:
    told["prose"]["essays"] = "5678"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_setting,
            r"b was made with another seed \(1\) than .*a \(0\); report on each by itself",
        ),
        (
            other_options,
            r"b was made with another options\.words \(eval\) than .*a \(not given\); report",
        ),
        (
            other_prose,
            r"b was made with another essays \(5678\) than .*a \(1234\), so that their samples differ",
        ),
    ],
)
def test_other_settings_are_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    parts = [folder(tmp_path / name) for name in "ab"]
    change_run(parts[1], change)
    with pytest.raises(InvalidInputError, match=message):
        join(parts, tmp_path / "joined")
    with pytest.raises(
        InvalidInputError, match=r"a was made with another .*; report on each by itself"
    ):
        join(parts[::-1], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sample_sha256="1"), r"sample niah-1024-0 of .*b is not that of .*a"),
        (dict(prediction="no"), r"a and .*b answer sample niah-1024-0, variant dense, differently"),
    ],
)
def test_other_samples_and_answers_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    parts = [
        folder(tmp_path / "a"),
        folder(tmp_path / "b", change=lambda one: dataclasses.replace(one, **change)),
    ]
    with pytest.raises(InvalidInputError, match=message):
        join(parts, tmp_path / "joined")


def test_from_the_command_line(tmp_path: Path) -> None:
    parts = [str(folder(tmp_path / str(length), lengths=(length,))) for length in (1024, 2048)]
    out = tmp_path / "joined"
    done = CliRunner().invoke(app, ["eval", "report", *parts])
    assert done.exit_code == 1
    assert "2 folders are to be joined, into none; name a new one with --out" in done.output
    done = CliRunner().invoke(app, ["eval", "report", *parts, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert (out / report.PAGE).exists()
    done = CliRunner().invoke(app, ["eval", "report", *parts, "--out", str(out)])
    assert done.exit_code == 1
    assert "holds a run already" in " ".join(done.output.split())
