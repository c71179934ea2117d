"""Parts of a run are joined into one and reported as one; parts that differ are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.errors import InvalidInputError
from star_attention.evals.reports.results import Results
from star_attention.evals.runs.merge import join
from star_attention.evals.runs.predictions import Prediction
from star_attention.evals.runs.run_folder import PAGE, RUN, read_run
from tests.evals_reports import make_run, metrics_of
from tests.evals_runs import VARIANTS, engine, run, samples


def change_run(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    record = read_run(folder)
    change(record)
    (folder / RUN).write_text(json.dumps(record))


def test_parts_are_reported_as_the_whole(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "whole", lengths=(1024, 2048))
    parts = [make_run(tmp_path / str(length), lengths=(length,)) for length in (1024, 2048)]
    join(parts, tmp_path / "joined")
    expected, joined = (metrics_of(path) for path in (whole, tmp_path / "joined"))
    for name in ("baseline", "missing", "overall", "groups", "tasks", "speed"):
        assert joined[name] == expected[name], name
    assert (tmp_path / "joined" / "pictures" / "length.png").exists()
    assert len(joined["run"]["sessions"]) == 2


def test_variants_of_the_same_samples_are_compared(tmp_path: Path) -> None:
    parts = [
        make_run(tmp_path / str(index), key)
        for index, key in enumerate(("dense", "star:/4", "star:/2"))
    ]
    join(parts, tmp_path / "joined")
    results = Results.read(tmp_path / "joined")
    assert results.variants == ["dense", "star:/4", "star:/2"]
    assert results.missing == 0
    compared = results.compared("star:/4")
    assert compared is not None
    assert compared.difference is not None


def test_predictions_that_two_folders_hold_are_written_once(tmp_path: Path) -> None:
    parts = [make_run(tmp_path / "a", count=4), make_run(tmp_path / "b", count=8)]
    join(parts, tmp_path / "joined")
    results = Results.read(tmp_path / "joined")
    assert len(results.predictions) == len(Results.read(tmp_path / "b").predictions)
    assert results.missing == 0


def test_parts_may_have_samples_of_the_same_tasks(tmp_path: Path) -> None:
    """Counts are compared: a join is complete only if all samples are there."""
    halves = [make_run(tmp_path / str(half), change=every_second(half)) for half in (0, 1)]
    with pytest.raises(
        InvalidInputError,
        match=r"0 has 4 of 8 samples of niah at 1,024 tokens, .*run its command again",
    ):
        join(halves, tmp_path / "joined")
    for half in halves:
        change_run(half, halve)
    join(halves, tmp_path / "joined")
    results = Results.read(tmp_path / "joined")
    assert results.missing == 0
    assert {cell["samples"] for cell in results.run["cells"]} == {8}
    assert len(results.predictions) == 3 * 2 * 8 * 2


def every_second(first: int) -> Callable[[Prediction], Prediction | None]:
    return lambda prediction: prediction if int(prediction.sample[-1]) % 2 == first else None


def halve(record: dict[str, Any]) -> None:
    for cells in (record["cells"], *(line["cells"] for line in record["variants"].values())):
        for cell in cells:
            cell["samples"] = 4


def test_a_join_with_an_incomplete_part_is_incomplete(tmp_path: Path) -> None:
    parts = [
        make_run(tmp_path / "a", lengths=(1024,)),
        make_run(
            tmp_path / "b",
            lengths=(2048,),
            change=lambda prediction: prediction if prediction.sample[-1] != "7" else None,
        ),
    ]
    join(parts, tmp_path / "joined")
    assert Results.read(tmp_path / "joined").missing == 3 * 2


def test_a_joined_run_resumes(tmp_path: Path) -> None:
    """Real runs: existing answers are not made again, and more may be added."""
    star = engine()
    run(star, samples(4)[:2], VARIANTS, tmp_path / "a")
    run(star, samples(4)[2:], VARIANTS, tmp_path / "b")
    join([tmp_path / "a", tmp_path / "b"], tmp_path / "joined")
    summary = run(star, samples(5), VARIANTS, tmp_path / "joined")
    assert (summary.earlier, summary.new) == (8, 2)
    assert Results.read(tmp_path / "joined").missing == 0


def change_seed(record: dict[str, Any]) -> None:
    record["settings"]["seed"] = 1


def change_options(record: dict[str, Any]) -> None:
    record["settings"]["options"] = {"words": "eval"}


def change_prose(record: dict[str, Any]) -> None:
    record["prose"]["essays"] = "5678"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_seed,
            r"b was made with another seed \(1\) than .*a \(0\); report on each separately",
        ),
        (
            change_options,
            r"b was made with another options\.words \(eval\) than .*a \(not given\); report",
        ),
        (
            change_prose,
            r"b was made with another essays \(5678\) than .*a \(1234\), so their samples differ",
        ),
    ],
)
def test_other_settings_are_refused_by_name(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    parts = [make_run(tmp_path / name) for name in "ab"]
    change_run(parts[1], change)
    with pytest.raises(InvalidInputError, match=message):
        join(parts, tmp_path / "joined")
    with pytest.raises(
        InvalidInputError, match=r"a was made with another .*; report on each separately"
    ):
        join(parts[::-1], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sample_sha256="1"), r"sample niah-1024-0 of .*b differs from that of .*a"),
        (dict(prediction="no"), r"a and .*b answer sample niah-1024-0, variant dense, differently"),
    ],
)
def test_other_samples_and_answers_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    parts = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", change=lambda prediction: replace(prediction, **change)),
    ]
    with pytest.raises(InvalidInputError, match=message):
        join(parts, tmp_path / "joined")


def test_runs_are_joined_from_the_command_line(tmp_path: Path) -> None:
    parts = [str(make_run(tmp_path / str(length), lengths=(length,))) for length in (1024, 2048)]
    out = tmp_path / "joined"
    result = CliRunner().invoke(app, ["eval", "report", *parts])
    assert result.exit_code == 1
    assert "2 folders cannot be joined without a new folder; give one with --out" in result.output
    result = CliRunner().invoke(app, ["eval", "report", *parts, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert (out / PAGE).exists()
    result = CliRunner().invoke(app, ["eval", "report", *parts, "--out", str(out)])
    assert result.exit_code == 1
    assert "already holds a run" in " ".join(result.output.split())
