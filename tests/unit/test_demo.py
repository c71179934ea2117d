"""The demo: the sentences about its numbers, and a small run with its files."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from star_attention.demo import heatmap, report
from star_attention.demo.result import (
    DENSE,
    MODES,
    NONE,
    SMALL,
    STAR,
    DemoResult,
    Example,
    GradedAnswer,
    Trial,
    band,
)
from star_attention.demo.run import run_demo
from star_attention.demo.settings import DemoSettings
from star_attention.errors import (
    MissingPackageError,
    ModelNotFoundError,
    SizeError,
)
from tests.engines import BUNDLED

# One of pytest's processes runs the demo, once.
pytestmark = pytest.mark.xdist_group("demo")

# ------------------------------------------------------------------ what the report says


def trial(mode: str, length: int = 16384, *, correct: int = 10, encode_s: float = 1.0) -> Trial:
    block = length if mode == DENSE else length // 4
    answers = [
        GradedAnswer(
            key=f"k{i}", number="1", depth=i / 9, position=i, text=" 1", correct=i < correct
        )
        for i in range(10)
    ]
    return Trial(
        mode=mode,
        length=length,
        seed=0,
        tokens=length,
        num_blocks=1 if mode == DENSE else 4,
        block_size=block,
        anchor_size={DENSE: 0, STAR: block, SMALL: block // 16, NONE: 0}[mode],
        encode_s=encode_s,
        first_token_s=0.5,
        kv_bytes=2**20,
        answers=tuple(answers),
    )


def result(**correct: int) -> DemoResult:
    """A result with these numbers of correct answers; star takes half of dense's time."""
    counts = dict(
        zip(
            MODES,
            (correct.get(name, 10) for name in ("dense", "star", "small", "none")),
            strict=True,
        )
    )
    trials = [
        trial(mode, correct=count, encode_s=2.0 if mode == DENSE else 1.0)
        for mode, count in counts.items()
    ]
    return DemoResult(
        trials=(*trials, trial(DENSE, 8192, correct=0), trial(STAR, 8192, correct=5)),
        example=Example(
            before="a <b>\n", line="the fact\n", after="c & d\n", query="<|q|>?", answer=" 1"
        ),
        settings={
            "model": "m",
            "parameters": 17_000_000,
            "tokens": 16384,
            "samples": 1,
            "facts": 10,
        },
        versions={"python": "3"},
        total_s=1.0,
    )


def test_the_sentences_follow_the_numbers() -> None:
    """Forbids canned sentences: each verdict must depend on the measurements."""
    first, second = report.summary(result())
    assert "16k tokens" in first
    assert "as many as dense" in first
    assert "in 50% of the time (1.0 s instead of 2.0 s)" in first
    assert "so this small model (17M parameters) hardly needs an anchor" in second
    assert "fewer than dense attention (10)" in report.summary(result(star=7))[0]
    assert "more than dense attention (6)" in report.summary(result(dense=6))[0]
    assert "needs its anchor, and loses 70 points without it" in report.summary(result(none=3))[1]
    assert "too few facts are found" in report.summary(result(dense=1, star=1, small=1, none=1))[1]
    for sentence in (first, second):
        assert sentence.endswith(".")
        assert ". " not in sentence
    assert "takes as long to encode" in report.summary(with_times(dense=1.0, others=1.0))[0]
    assert "takes 3.00 times as long" in report.summary(with_times(dense=1.0, others=3.0))[0]


def with_times(dense: float, others: float) -> DemoResult:
    """The same result with other times of phase 1."""
    trials = [
        dataclasses.replace(trial, encode_s=dense if trial.mode == DENSE else others)
        for trial in result().trials
    ]
    return dataclasses.replace(result(), trials=tuple(trials))


def test_ratios_are_relative_to_dense_and_times_are_medians() -> None:
    noisy = result()
    noisy = dataclasses.replace(
        noisy, trials=(*noisy.trials, trial(STAR, encode_s=9.0), trial(STAR, encode_s=1.5))
    )
    row = noisy.row(STAR)
    assert row.encode_s == 1.5
    assert row.encode_ratio == 0.75
    assert row.score.asked == 30
    assert row.kv_ratio == 1


def test_the_heat_map_puts_each_score_in_its_cell() -> None:
    """Forbids swapped axes: star finds the first half of the depths at 8K and all at 16K."""
    cells = {(row, column): accuracy for row, column, accuracy in heatmap.cells(result(), STAR)}
    assert [cells[row, 0] for row in range(10)] == [1.0] * 5 + [0.0] * 5
    assert [cells[row, 1] for row in range(10)] == [1.0] * 10


@pytest.mark.parametrize("lengths", [[2048], [1024, 2048], [512, 1024, 2048, 4096]])
def test_titles_do_not_overlap(lengths: list[int]) -> None:
    """Forbids panels narrower than their titles, as at a single length."""
    pytest.importorskip("matplotlib")
    trials = tuple(trial(mode, length) for mode in MODES for length in lengths)
    narrow = dataclasses.replace(result(), trials=trials)
    figure = heatmap.draw(narrow, report.caption(narrow))
    figure.draw_without_rendering()
    left, right = (axis.title.get_window_extent() for axis in figure.axes)
    assert left.x1 + 5 < right.x0


@pytest.mark.parametrize("facts", [10, 20, 30])
def test_every_tenth_of_the_text_has_as_many_facts(facts: int) -> None:
    """Forbids cells with different numbers of questions, by rounding at the borders or the end."""
    tenths = [band(index / (facts - 1)) for index in range(facts)]
    assert [tenths.count(tenth) for tenth in range(10)] == [facts // 10] * 10


def test_the_page_escapes_its_input(tmp_path: Path) -> None:
    report.write(result(), tmp_path)
    page = (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;" in page
    assert "c &amp; d" in page
    assert "&lt;|q|&gt;" in page


# ------------------------------------------------------------------ a run


SAMPLES = 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, Path, list[str]]:
    """2K tokens with the bundled model; seconds."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    settings = DemoSettings(model=BUNDLED, tokens=2048, facts=10, samples=SAMPLES)
    lines: list[str] = []
    return run_demo(settings, out, progress=lines.append), out, lines


def test_the_bundled_model_finds_the_facts(run: tuple[DemoResult, Path, list[str]]) -> None:
    """At most one of ten may be missed; without its anchor most are."""
    demo, _, lines = run
    assert demo.lengths == [1024, 2048]
    assert len(lines) == len(demo.trials) == SAMPLES * (4 + 2)
    for row in demo.rows:
        assert row.score.asked == 10 * SAMPLES
        assert row.score.accuracy <= 0.5 if row.mode == NONE else row.score.accuracy >= 0.9
        # One device stores the keys and values of every token once.
        assert row.kv_bytes == demo.row(DENSE).kv_bytes
    for trial in demo.trials:
        for answer in trial.answers:
            assert answer.correct == (answer.text.strip() == answer.number)
    assert [(row.num_blocks, row.anchor_size) for row in demo.rows] == [
        (1, 0),
        (4, 512),
        (4, 32),
        (4, 0),
    ]


def test_the_json_contains_the_numbers_of_the_table(
    run: tuple[DemoResult, Path, list[str]],
) -> None:
    demo, out, _ = run
    data = json.loads((out / "demo.json").read_text(encoding="utf-8"))
    assert data["settings"]["seed"] == 0
    assert {"star-attention", "python", "torch", "transformers", "matplotlib"} <= set(
        data["versions"]
    )
    assert [row["mode"] for row in data["table"]] == list(MODES)
    for written, row in zip(data["table"], demo.rows, strict=True):
        answers = [
            answer["correct"]
            for trial in data["trials"]
            if (trial["mode"], trial["length"]) == (row.mode, 2048)
            for answer in trial["answers"]
        ]
        assert written["accuracy"] == row.score.accuracy == sum(answers) / len(answers)
    assert len(data["heatmap"]["star"]) == len(data["heatmap"]["dense"]) == 2 * 10
    assert data["summary"] == list(report.summary(demo))


class Resources(HTMLParser):
    """The resources that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += (
            [tag] if tag in ("script", "link", "iframe", "object", "embed", "base") else []
        )
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "data", "action") and not (
                value or ""
            ).startswith("data:"):
                self.loads.append(f"{tag} {name}={value}")


def test_the_page_loads_nothing(run: tuple[DemoResult, Path, list[str]]) -> None:
    demo, out, _ = run
    page = (out / "demo.html").read_text(encoding="utf-8")
    resources = Resources()
    resources.feed(page)
    assert resources.loads == []
    assert "@import" not in page
    assert "url(" not in page
    assert "://" not in page
    assert "$" not in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<svg") == 2
    assert " ".join(report.summary(demo)).split(",")[0] in page


def test_the_heat_map_is_an_image(run: tuple[DemoResult, Path, list[str]]) -> None:
    with Image.open(run[1] / "heatmap.png") as picture:
        picture.verify()
        assert min(picture.size) > 400


def test_one_table_is_printed(run: tuple[DemoResult, Path, list[str]]) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    report.print_report(run[0], console)
    text = console.export_text()
    assert text.count("encode s") == 1
    for mode in MODES:
        assert len(re.findall(rf"^│ {mode}\b.*│$", text, re.MULTILINE)) == 1
    assert report.as_text(run[0]).count("encode s") == 1


def test_a_missing_matplotlib_is_an_error_before_anything_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r'pip install "star-attention\[plot\]"'):
        run_demo(DemoSettings(model="no-such-model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SizeError, match="samples 0 is below 1"):
        run_demo(DemoSettings(model=BUNDLED, samples=0), tmp_path)
    with pytest.raises(ModelNotFoundError):
        run_demo(DemoSettings(model="./no-such-model"), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        run_demo(DemoSettings(model=BUNDLED), tmp_path / "file")
