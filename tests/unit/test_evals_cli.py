"""`star-attention eval` with a small random model: runs, resumes, reports, and errors in one line."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.errors import SizeError
from star_attention.evals.runs.predictions import Prediction, read_predictions, sha256
from star_attention.evals.runs.run_folder import FIGURES, MARKDOWN, METRICS, PAGE, RUN, SUMMARY
from star_attention.evals.runs.sources import SuiteSource
from star_attention.evals.runs.sweeps import TABLE_4
from star_attention.evals.runs.variants import parse
from star_attention.evals.suites import SUITES, get
from tests.engines import bundled_tokenizer, text_model

SHORT = ("--max-new-tokens", "2", "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    text_model().save_pretrained(folder)
    bundled_tokenizer().save_pretrained(folder)
    return folder


def invoke(model: Path, *arguments: object) -> Any:
    command, *others = map(str, arguments)
    return CliRunner().invoke(app, ["eval", command, *others, "-m", str(model), "--device", "cpu"])


def ok(model: Path, *arguments: object) -> Any:
    done = invoke(model, *arguments)
    assert done.exit_code == 0, done.output
    return done


def error(model: Path, *arguments: object) -> str:
    done = invoke(model, *arguments)
    assert done.exit_code == 1, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def predictions(folder: Path) -> list[Prediction]:
    return list(read_predictions(folder))


def test_a_suite_is_answered_reported_and_resumed(model: Path, tmp_path: Path) -> None:
    arguments = [
        "ruler",
        "--task",
        "niah_single_1,vt",
        "--length",
        "768,1k",
        "--out",
        tmp_path,
        "--max-new-tokens",
        "2",
    ]
    done = ok(model, *arguments, "--samples", "1", "--variants", "dense,star:/4")
    assert done.stdout.startswith("dense: ")
    assert "star b=/4: " in done.stdout
    assert "4 samples, 2 variants" in done.stderr
    assert "8 of 8 answers, in " in done.stderr
    assert "--chat uses this model's chat template" in done.stderr
    made = predictions(tmp_path)
    assert {(one.task, one.length, one.variant) for one in made} == {
        (task, length, variant)
        for task in ("niah_single_1", "vt")
        for length in (768, 1024)
        for variant in ("dense", "star:/4")
    }
    assert {(one.length, one.block_size) for one in made if one.variant == "star:/4"} == {
        (768, 192),
        (1024, 256),
    }
    for name in (METRICS, SUMMARY, MARKDOWN, PAGE, RUN):
        assert (tmp_path / name).is_file()
    more = ok(model, *arguments, "--samples", "2", "--variants", "dense,star:/4", "--limit", "2")
    assert "8 answers were already there" in more.stderr
    assert len(predictions(tmp_path)) == 16
    assert "another seed (0 there, 1 here)" in error(model, *arguments, "--seed", "1")


def test_data_sets_are_read_and_their_bad_lines_named(model: Path, tmp_path: Path) -> None:
    sample = {
        "context": "One. Two. Three.\n" * 9,
        "query": "Which?",
        "answers": ["Two"],
        "metric": "string_match_all",
    }
    sample |= {
        "id": "a",
        "task": "own",
        "length": 0,
        "answer_prefix": " It is",
        "max_new_tokens": 2,
        "meta": {},
    }
    data = tmp_path / "my.jsonl"
    data.write_text(json.dumps(sample) + "\n")
    ok(model, "run", data, "--variants", "dense,star:16", "--out", tmp_path / "run", "--quiet")
    assert [(one.sample, one.variant) for one in predictions(tmp_path / "run")] == [
        ("a", "dense"),
        ("a", "star:16"),
    ]
    assert "| own, as given |" in (tmp_path / "run" / MARKDOWN).read_text()
    data.write_text(json.dumps(sample) + '\n{"id": \n')
    message = error(model, "run", data, "--out", tmp_path / "other", *SHORT)
    assert re.search(r"my\.jsonl, line 2\b", message)
    message = error(model, "run", tmp_path / "none.jsonl", "--out", tmp_path / "other", *SHORT)
    assert message.endswith("none.jsonl does not exist; check the path")
    assert "data sets cannot be read from stdin" in error(
        model, "run", "-", "--out", tmp_path / "other", *SHORT
    )
    assert "is a folder; name the files in it" in error(
        model, "run", tmp_path, "--out", tmp_path / "other", *SHORT
    )


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    bare = copy.deepcopy(bundled_tokenizer())
    bare.chat_template = None
    for part in (text_model(), bare):
        part.save_pretrained(tmp_path / "model")
    data = tmp_path / "my.jsonl"
    data.write_text(json.dumps({"context": "It is 7.", "query": "What is it?", "answers": ["7"]}))
    told = "error: this model has no chat template; leave --chat out"
    assert error(tmp_path / "model", "run", data, "--chat", "--out", tmp_path / "a", *SHORT) == told
    assert (
        error(
            tmp_path / "model", "niah", "--length", "512", "--chat", "--out", tmp_path / "b", *SHORT
        )
        == told
    )


def test_published_prompts(model: Path, tmp_path: Path) -> None:
    own = tmp_path / "prompts.json"
    own.write_text(
        json.dumps(
            {"qa1": {"instruction": "Read this.", "examples": "None.", "post_prompt": "One word."}}
        )
    )
    arguments = [
        "babilong",
        "--task",
        "qa1",
        "--length",
        "512",
        "--samples",
        "1",
        "--variants",
        "dense",
        *SHORT,
    ]
    ok(model, *arguments, "--prompts", own, "--out", tmp_path / "made")
    (prediction,) = predictions(tmp_path / "made")
    assert prediction.meta["prompts_sha256"] == sha256(own.read_text())[:16]
    data = tmp_path / "qa1.jsonl"
    data.write_text(
        json.dumps(
            {"input": "Mary went to the office.", "question": "Where is Mary?", "target": "office"}
        )
    )
    ok(
        model,
        "run",
        data,
        "--prompts",
        own,
        "--variants",
        "dense",
        "--out",
        tmp_path / "read",
        *SHORT,
    )
    (from_file,) = predictions(tmp_path / "read")
    assert from_file.meta["prompts_sha256"] == prediction.meta["prompts_sha256"]
    assert "prompts '/none' does not exist" in error(
        model, *arguments, "--prompts", "/none", "--out", tmp_path / "no"
    )


def test_the_grid_of_depths_is_drawn(model: Path, tmp_path: Path) -> None:
    ok(
        model,
        "niah",
        "--length",
        "512",
        "--samples",
        "1",
        "--depths",
        "0,100",
        "--out",
        tmp_path,
        *SHORT,
    )
    assert {one.meta["depth"] for one in predictions(tmp_path)} == {0, 100}
    assert (tmp_path / FIGURES / "depth.png").is_file()


def test_questions_on_one_context_share_its_encoding(model: Path, tmp_path: Path) -> None:
    arguments = [
        "shared",
        "--task",
        "shared_kv",
        "--length",
        "1k",
        "--samples",
        "6",
        "--questions",
        "3",
    ]
    ok(model, *arguments, "--variants", "dense", "--out", tmp_path, *SHORT)
    assert [one.sharing for one in predictions(tmp_path)] == [3] * 6


@pytest.mark.parametrize(("suite", "task"), [("babilong", "qa1"), ("infinitebench", "passkey")])
def test_other_suites(model: Path, tmp_path: Path, suite: str, task: str) -> None:
    arguments = [
        "--task",
        task,
        "--length",
        "1k",
        "--samples",
        "1",
        "--variants",
        "star:/4",
        "--chat",
    ]
    ok(model, suite, *arguments, "--out", tmp_path, *SHORT)
    (prediction,) = predictions(tmp_path)
    assert prediction.task == task
    assert json.loads((tmp_path / RUN).read_text())["settings"]["suite"] == suite
    assert suite in SUITES


def test_sweeps_are_drawn(model: Path, tmp_path: Path) -> None:
    arguments = ["sweep", "--task", "niah_single_1", "--length", "512", "--samples", "1", *SHORT]
    ok(model, *arguments, "--blocks", "/4,/2", "--out", tmp_path / "blocks")
    assert {one.variant for one in predictions(tmp_path / "blocks")} == {
        "dense",
        "star:/4",
        "star:/2",
    }
    assert (tmp_path / "blocks" / FIGURES / "blocks.png").is_file()
    ok(model, *arguments, "--blocks", "/4", "--anchors", "0,=", "--out", tmp_path / "anchors")
    assert {one.variant for one in predictions(tmp_path / "anchors")} == {
        "dense",
        "star:/4:0",
        "star:/4",
    }
    assert (tmp_path / "anchors" / FIGURES / "anchors.png").is_file()


def test_sweeps_take_other_suites_and_their_data(model: Path, tmp_path: Path) -> None:
    background = tmp_path / "text.txt"
    background.write_text(
        "A cold wind comes down from the north. There is bread on the table. " * 200
    )
    arguments = [
        "--suite",
        "babilong",
        "--length",
        "768",
        "--samples",
        "1",
        "--background",
        background,
        *SHORT,
    ]
    ok(model, "sweep", *arguments, "--blocks", "/2", "--out", tmp_path / "out")
    assert {one.task for one in predictions(tmp_path / "out")} == {
        "qa1",
        "qa2",
        "qa3",
        "qa4",
        "qa5",
    }
    assert {one.meta["prose"] for one in predictions(tmp_path / "out")} == {"text.txt"}


@pytest.mark.parametrize("command", [["ruler"], ["sweep", "--blocks", "/2"]])
def test_held_out_words_and_tasks_with_spaces(
    model: Path, tmp_path: Path, command: list[str]
) -> None:
    arguments = [
        "--task",
        "niah_single_1, niah_multikey_1",
        "--length",
        "768",
        "--samples",
        "1",
        "--words",
        "eval",
    ]
    ok(model, *command, *arguments, "--out", tmp_path, *SHORT)
    made = predictions(tmp_path)
    assert {one.task for one in made} == {"niah_single_1", "niah_multikey_1"}
    assert all(one.meta["words"].endswith(", eval") for one in made)


def test_data_sets_of_several_lengths_run_together(model: Path, tmp_path: Path) -> None:
    row = {"input_context": "One. Two. Three.\n" * 9, "input_query": "Which?", "outputs": ["Two"]}
    files = [tmp_path / "data" / size / "vt" / "validation.jsonl" for size in ("4096", "8k")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(row) + "\n")
    ok(model, "run", files[0], "--variants", "dense", "--out", tmp_path / "out", *SHORT)
    ok(model, "run", *files, "--variants", "dense", "--out", tmp_path / "out", *SHORT)
    assert [(one.sample, one.length) for one in predictions(tmp_path / "out")] == [
        ("vt-4096-0", 4096),
        ("vt-8192-0", 8192),
    ]


def test_the_table_of_ablations(model: Path, tmp_path: Path) -> None:
    arguments = [
        "ablations",
        "--task",
        "niah_single_1",
        "--length",
        "512",
        "--samples",
        "1",
        "--out",
        tmp_path,
        *SHORT,
    ]
    ok(model, *arguments)
    made = [parse(one.variant) for one in predictions(tmp_path)]
    assert len(made) == 1 + len(TABLE_4)
    assert {one.anchor for one in made} >= {
        None,
        "none",
        "constant",
        "random",
        "shuffled",
        "previous-block",
    }
    assert {one.anchor_positions for one in made} == {None, "random", "previous-block"}


def test_perplexity(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(
        "A cold wind comes down from the north, and there is bread on the table.\n" * 40
    )
    arguments = [
        "perplexity",
        text,
        "--length",
        "128",
        "--tail",
        "32",
        "--windows",
        "3",
        "--variants",
        "dense,star:/4",
    ]
    done = ok(model, *arguments, "--out", tmp_path / "out")
    assert done.stdout.startswith("3 windows of 128 tokens, the last 32 predicted")
    dense, star = json.loads((tmp_path / "out" / "perplexity.json").read_text())["rows"]
    assert dense["difference"] is None
    assert (star["block_size"], len(star["windows"])) == (32, 3)
    assert f"{dense['perplexity']:.3f}" in done.stdout
    told = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert (told["text_sha256"], told["ranks"]) == (sha256(text.read_text()), 1)
    assert set(told["versions"]) == {"star_attention", "torch", "transformers"}
    assert "already exists; give another folder" in error(
        model, *arguments, "--out", tmp_path / "out"
    )


def test_a_report_is_written_again(model: Path, tmp_path: Path) -> None:
    ok(
        model,
        "ruler",
        "--task",
        "vt",
        "--length",
        "768",
        "--samples",
        "1",
        "--out",
        tmp_path,
        *SHORT,
    )
    before = (tmp_path / METRICS).read_text()
    (tmp_path / METRICS).unlink()
    done = CliRunner().invoke(app, ["eval", "report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / METRICS).read_text() == before
    done = CliRunner().invoke(app, ["eval", "report", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "holds no run.json" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["ruler", "--task", "vt", "--variants", "dense,magic"],
            "method 'magic' is unknown; choose one of star",
        ),
        (["ruler", "--task", "vt,magic"], "task 'magic' of ruler is unknown"),
        (["ruler", "--task", "vt,vt"], "a task is named twice"),
        (["ruler", "--task", "vt", "--length", "many"], "length 'many' is not a number of tokens"),
        (["ruler", "--task", "vt", "--length", "16"], "length 16 is too short for a sample of vt"),
        (
            ["ruler", "--task", "niah_single_1", "--length", "4k", "--samples", "1"],
            "too long for the model",
        ),
        (
            ["sweep", "--suite", "magic", "--task", "x"],
            "suite 'magic' is unknown; choose one of ruler",
        ),
    ],
)
def test_what_cannot_be_run(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in error(model, *arguments, "--out", tmp_path / "out", *SHORT)
    assert not (tmp_path / "out" / METRICS).exists()


def test_tasks_that_were_not_asked_for_are_left_out_where_they_do_not_fit(
    model: Path, tmp_path: Path
) -> None:
    data = SuiteSource.parse("ruler", tasks=None, lengths="320,1k", count=5)
    made, told = data.load(bundled_tokenizer(), chat=False)
    assert told["vt at 320 tokens"].startswith("length 320 is too short for a sample of vt")
    assert "niah_multikey_1 at 320 tokens" in told, "only some of its samples would have fitted"
    assert not any(
        sample.length == 320 and sample.task in ("vt", "niah_multikey_1") for sample in made
    )
    assert {sample.task for sample in made if sample.length == 1024} == set(get("ruler").tasks) - {
        "cwe",
        "qa_1",
        "qa_2",
    }
    with pytest.raises(SizeError, match="no task of ruler fits; the first: length 16 is too short"):
        SuiteSource.parse("ruler", tasks=None, lengths="16", count=1).load(
            bundled_tokenizer(), chat=False
        )
    with pytest.raises(SizeError, match="length 16 is too short"):
        SuiteSource.parse("niah", tasks=None, lengths="16,1k", count=1).load(
            bundled_tokenizer(), chat=False
        )
    ok(
        model,
        "ruler",
        "--length",
        "320",
        "--samples",
        "1",
        "--out",
        tmp_path,
        "--variants",
        "dense",
        *SHORT,
    )
    assert (
        "vt at 320 tokens is left out: length 320 is too short" in (tmp_path / MARKDOWN).read_text()
    )


def test_anchors_need_one_block(model: Path, tmp_path: Path) -> None:
    done = invoke(model, "sweep", "--anchors", "0,=", "--out", tmp_path)
    assert done.exit_code == 2
    assert "give --blocks /4" in done.stderr
