"""A killed run resumes with nothing lost or doubled; a folder that does not fit is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from star_attention.evals.reports import report
from star_attention.evals.reports.results import Results
from star_attention.evals.runs.predictions import PREDICTIONS, open_predictions
from star_attention.evals.runs.run_folder import FORMAT, MARKDOWN, METRICS, RUN, read_run
from tests.engines import bundled_tokenizer, text_model
from tests.evals_runs import VARIANTS, engine, lines, run, samples
from tests.warm import python

SCRIPT = """
import sys
from star_attention import StarLLM
from tests.evals_runs import VARIANTS, run, samples
star = StarLLM.from_pretrained(sys.argv[1], device="cpu")
run(star, samples(40, sharing=4), VARIANTS, sys.argv[2])
"""


def test_a_killed_run_resumes_to_the_same_report(tmp_path: Path) -> None:
    model, killed, whole = tmp_path / "model", tmp_path / "killed", tmp_path / "whole"
    text_model().save_pretrained(model)
    bundled_tokenizer().save_pretrained(model)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        python("-c", SCRIPT, model, killed),
        cwd=root,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{root / 'src'}:{root}"},
        stderr=subprocess.PIPE,
    )
    file = killed / PREDICTIONS
    deadline = time.monotonic() + 60
    while not file.is_file() or file.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    answers = complete.count(b"\n")
    assert 5 <= answers < 80, "killed in the middle"
    # A kill during a write leaves a line without an end.
    file.write_bytes(complete + b'{"sample": "needles-')

    star = StarLLM.from_pretrained(model, device="cpu")
    summary = run(star, samples(40, sharing=4), VARIANTS, killed)
    assert (summary.earlier, summary.new) == (answers, 80 - answers)
    run(star, samples(40, sharing=4), VARIANTS, whole)
    assert file.read_bytes().startswith(complete), "nothing is rewritten"
    assert sorted(map(untimed, lines(killed)), key=str) == sorted(
        map(untimed, lines(whole)), key=str
    )
    assert accuracy(killed) == accuracy(whole)
    assert len(json.loads((killed / RUN).read_text())["sessions"]) == 2
    assert run(star, samples(40, sharing=4), VARIANTS, killed).new == 0


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.endswith("_s")}


def accuracy(folder: Path) -> Any:
    report.write(folder)
    metrics = json.loads((folder / METRICS).read_text())
    return {name: metrics[name] for name in ("baseline", "missing", "overall", "groups", "tasks")}


def test_more_samples_and_variants_may_come_later(tmp_path: Path) -> None:
    star = engine()
    run(star, samples(2), VARIANTS[:1], tmp_path)
    assert run(star, samples(3), VARIANTS, tmp_path).new == 4
    keys = [(line["sample"], line["variant"]) for line in lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 6


def test_a_run_that_is_whole_is_never_called_incomplete(tmp_path: Path) -> None:
    star = engine()
    run(star, samples(2) + samples(2, task="others"), VARIANTS[:1], tmp_path)
    run(star, samples(2), VARIANTS, tmp_path)
    assert Results.read(tmp_path).missing == 0
    run(star, samples(1, task="third"), VARIANTS[1:], tmp_path)
    assert Results.read(tmp_path).missing == 0
    file = tmp_path / PREDICTIONS
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert Results.read(tmp_path).missing == 1


def test_the_same_samples_may_come_from_elsewhere(tmp_path: Path) -> None:
    star = engine()
    run(star, samples(1), VARIANTS[:1], tmp_path, options={"files": ["a"], "compat": "x"})
    summary = run(
        star, samples(2), VARIANTS[:1], tmp_path, options={"files": ["./a", "b"], "compat": "x"}
    )
    assert (summary.earlier, summary.new) == (1, 1)
    record = read_run(tmp_path)
    assert record["settings"]["options"] == {"compat": "x"}
    assert [session["options"] for session in record["sessions"]] == [
        {"files": ["a"]},
        {"files": ["./a", "b"]},
    ]
    report.write(tmp_path)
    assert "compat=x; files=a; files=./a, b" in (tmp_path / MARKDOWN).read_text()


def test_settings_record_what_answers_depend_on(tmp_path: Path) -> None:
    run(engine(), samples(1), VARIANTS[:1], tmp_path)
    settings = read_run(tmp_path)["settings"]
    assert (settings["ranks"], settings["device"], settings["reserve_tokens"]) == (
        1,
        "cpu",
        engine().config.reserve_tokens,
    )


def test_a_path_that_is_not_a_run_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(
            InvalidInputError, match=r"is not a folder; give another one with --out"
        ):
            run(engine(), samples(1), VARIANTS[:1], out)
    with pytest.raises(InvalidInputError, match=r"holds no run\.json"):
        report.write(file)
    run(engine(), samples(1), VARIANTS[:1], tmp_path)
    whole = json.loads((tmp_path / RUN).read_text())
    for bad, missing in (
        ({**whole, "settings": {}}, "suite, options, model"),
        ({"format": FORMAT}, "settings, "),
    ):
        (tmp_path / RUN).write_text(json.dumps(bad))
        with pytest.raises(InvalidInputError, match=rf"run\.json is damaged \({missing}"):
            run(engine(), samples(1), VARIANTS[:1], tmp_path)


def test_files_of_a_user_are_not_overwritten(tmp_path: Path) -> None:
    notes = tmp_path / MARKDOWN
    notes.write_text("my own")
    with pytest.raises(
        InvalidInputError, match=r"holds no run, but report\.md, which the reports would overwrite"
    ):
        run(engine(), samples(1), VARIANTS[:1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARKDOWN]
    assert notes.read_text() == "my own"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed (0 there, 1 here)"),
        ({"chat": True}, "chat (False there, True here)"),
        ({"max_new_tokens": 9}, "max_new_tokens (not given there, 9 here)"),
        ({"suite": "ruler"}, "suite (files there, ruler here)"),
        ({"options": {"compat": "x"}}, "options.compat (not given there, x here)"),
    ],
)
def test_another_setting_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    star = engine()
    run(star, samples(1), VARIANTS, tmp_path)
    before = (tmp_path / PREDICTIONS).read_bytes()
    with pytest.raises(InvalidInputError) as caught:
        run(star, samples(2), VARIANTS, tmp_path, **change)
    assert f"another {field}" in str(caught.value)
    assert (tmp_path / PREDICTIONS).read_bytes() == before


def test_an_option_that_is_left_out_is_refused_by_name(tmp_path: Path) -> None:
    star = engine()
    run(star, samples(1), VARIANTS, tmp_path, options={"words": "eval"})
    with pytest.raises(
        InvalidInputError, match=r"another options\.words \(eval there, not given here\)"
    ):
        run(star, samples(1), VARIANTS, tmp_path)


def test_another_model_is_refused_by_field(tmp_path: Path) -> None:
    run(engine(), samples(1), VARIANTS[:1], tmp_path)
    path = tmp_path / RUN
    path.write_text(path.read_text().replace('"hidden_size": 48', '"hidden_size": 64'))
    with pytest.raises(
        InvalidInputError, match=r"another config\.hidden_size \(64 there, 48 here\)"
    ):
        run(engine(), samples(1), VARIANTS[:1], tmp_path)


def test_other_texts_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    star, (sample,) = engine(), samples(1)
    of_prose = replace(sample, meta={"prose": "a", "prose_sha256": "1" * 16})
    run(star, [of_prose], VARIANTS[:1], tmp_path)
    other = replace(
        of_prose, context=sample.context * 2, meta={"prose": "a", "prose_sha256": "2" * 16}
    )
    with pytest.raises(
        InvalidInputError,
        match=r"sample needles-0 has another prose \(1{16} there, 2{16} here\)",
    ):
        run(star, [other], VARIANTS, tmp_path)
    with pytest.raises(InvalidInputError, match="sample needles-0 has another text or answers"):
        run(star, [replace(of_prose, answers=("7",))], VARIANTS, tmp_path)


def test_a_damaged_line_is_named_by_its_number(tmp_path: Path) -> None:
    star = engine()
    run(star, samples(3), VARIANTS[:1], tmp_path)
    file = tmp_path / PREDICTIONS
    first, _, third = file.read_bytes().splitlines(keepends=True)
    for bad, message in (
        (b'{"sample": \n', "line 2 is damaged"),
        (b"[1]\n", "line 2 is damaged"),
        (b'{"sample": "x"}\n', "line 2 is damaged"),
        (first, "line 2 repeats line 1 (sample needles-0, variant dense)"),
    ):
        file.write_bytes(first + bad + third)
        with pytest.raises(InvalidInputError) as caught:
            run(star, samples(3), VARIANTS[:1], tmp_path)
        assert message in str(caught.value)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    star = engine()
    run(star, samples(1), VARIANTS[:1], tmp_path)
    with (
        open_predictions(tmp_path / PREDICTIONS),
        pytest.raises(InvalidInputError, match="another run is writing to"),
    ):
        run(star, samples(2), VARIANTS[:1], tmp_path)
