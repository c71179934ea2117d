"""`star-attention eval` with a small random model: runs, reports, and errors in one line."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from star_attention.cli import app
from star_attention.errors import SizeError
from star_attention.evals.runs.predictions import sha256
from star_attention.evals.runs.run_folder import FIGURES, MARKDOWN, METRICS, PAGE, RUN, SUMMARY
from star_attention.evals.runs.sources import SuiteSource
from star_attention.evals.suites import SUITES, get
from tests.engines import bundled_tokenizer, text_model
from tests.evals_cli import SHORT, error, ok, predictions, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


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
    result = ok(model, *arguments, "--samples", "1", "--variants", "dense,star:/4")
    assert result.stdout.startswith("dense: ")
    assert "star b=/4: " in result.stdout
    assert "4 samples, 2 variants" in result.stderr
    assert "8 of 8 answers, in " in result.stderr
    assert "--chat uses this model's chat template" in result.stderr
    lines = predictions(tmp_path)
    assert {(line.task, line.length, line.variant) for line in lines} == {
        (task, length, variant)
        for task in ("niah_single_1", "vt")
        for length in (768, 1024)
        for variant in ("dense", "star:/4")
    }
    assert {(line.length, line.block_size) for line in lines if line.variant == "star:/4"} == {
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
    assert [(line.sample, line.variant) for line in predictions(tmp_path / "run")] == [
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
    expected = "error: this model has no chat template; leave out --chat"
    assert (
        error(tmp_path / "model", "run", data, "--chat", "--out", tmp_path / "a", *SHORT)
        == expected
    )
    assert (
        error(
            tmp_path / "model", "niah", "--length", "512", "--chat", "--out", tmp_path / "b", *SHORT
        )
        == expected
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
    ok(model, *arguments, "--prompts", own, "--out", tmp_path / "generated")
    (prediction,) = predictions(tmp_path / "generated")
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
    assert {line.meta["depth"] for line in predictions(tmp_path)} == {0, 100}
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
    assert [line.sharing for line in predictions(tmp_path)] == [3] * 6


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


def test_data_sets_of_several_lengths_run_together(model: Path, tmp_path: Path) -> None:
    row = {"input_context": "One. Two. Three.\n" * 9, "input_query": "Which?", "outputs": ["Two"]}
    files = [tmp_path / "data" / size / "vt" / "validation.jsonl" for size in ("4096", "8k")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(row) + "\n")
    ok(model, "run", files[0], "--variants", "dense", "--out", tmp_path / "out", *SHORT)
    ok(model, "run", *files, "--variants", "dense", "--out", tmp_path / "out", *SHORT)
    assert [(line.sample, line.length) for line in predictions(tmp_path / "out")] == [
        ("vt-4096-0", 4096),
        ("vt-8192-0", 8192),
    ]


def test_special_tokens_of_data_sets_are_read_as_the_option_says(
    model: Path, tmp_path: Path
) -> None:
    row = {"context": "The tea<eos> is hot.\n" * 9, "query": "Is it<eos>?", "answers": ["yes"]}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    command = ["run", file, "--variants", "dense", *SHORT]
    tokens = {}
    for option in ("--allow-special-tokens", "--no-allow-special-tokens"):
        ok(model, *command, option, "--out", tmp_path / option)
        (line,) = predictions(tmp_path / option)
        tokens[option] = (line.context_tokens, line.query_tokens)
        settings = json.loads((tmp_path / option / RUN).read_text())["settings"]
        assert settings["allow_special_tokens"] is (option == "--allow-special-tokens")
    tokenizer = bundled_tokenizer()
    as_text = len(tokenizer("<eos>", add_special_tokens=False, split_special_tokens=True).input_ids)
    (context, query), (literal_context, literal_query) = tokens.values()
    assert literal_context - context == 9 * (as_text - 1)
    assert literal_query - query == as_text - 1
    # A run goes on as it began.
    assert "allow_special_tokens" in error(
        model, *command, "--out", tmp_path / "--allow-special-tokens"
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
    result = CliRunner().invoke(app, ["eval", "report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / METRICS).read_text() == before
    result = CliRunner().invoke(app, ["eval", "report", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert "holds no run.json" in result.stderr


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
def test_commands_that_cannot_run_are_refused(
    model: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in error(model, *arguments, "--out", tmp_path / "out", *SHORT)
    assert not (tmp_path / "out" / METRICS).exists()


def test_unnamed_tasks_that_do_not_fit_are_left_out(model: Path, tmp_path: Path) -> None:
    source = SuiteSource.parse("ruler", tasks=None, lengths="320,1k", count=5)
    samples, left_out = source.load(bundled_tokenizer(), chat=False)
    assert left_out["vt at 320 tokens"].startswith("length 320 is too short for a sample of vt")
    assert "niah_multikey_1 at 320 tokens" in left_out, "only some of its samples would have fitted"
    assert not any(
        sample.length == 320 and sample.task in ("vt", "niah_multikey_1") for sample in samples
    )
    assert {sample.task for sample in samples if sample.length == 1024} == set(
        get("ruler").tasks
    ) - {
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
