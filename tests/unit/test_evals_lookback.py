"""Variants that look back, or a second time: in runs, perplexity, figures, and older folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from star_attention.errors import InvalidInputError
from star_attention.evals.reports.plots.sweep import sweep
from star_attention.evals.reports.results import Results
from star_attention.evals.runs import perplexity
from star_attention.evals.runs.engines import engine_for
from star_attention.evals.runs.predictions import PREDICTIONS, read_predictions
from star_attention.evals.runs.run_folder import read_run
from star_attention.evals.runs.variants import parse, parse_all
from star_attention.hf.text.tokens import query_ids
from tests.evals_runs import engine, lines, run, samples

LOOKING_BACK = "star:/8:lookback=2@lower"
KEY = "star:/8:64:lookback=2@lower"


def test_a_run_records_what_was_seen(tmp_path: Path) -> None:
    run(engine(), samples(2), parse_all(f"dense,star:/8,{LOOKING_BACK}"), tmp_path)
    recorded = {
        line["variant"]: (line["anchor_size"], line["lookback"], line["lookback_layers"])
        for line in lines(tmp_path)
    }
    block = lines(tmp_path)[1]["block_size"]
    assert recorded["star:/8"] == (block, 0, None)
    assert recorded[KEY] == (min(64, block), 2, "lower")
    variants = read_run(tmp_path)["variants"]
    (plan,) = variants[KEY]["plans"]
    assert (plan["lookback"], plan["lookback_layers"]) == (2, "lower")
    assert "lookback" not in variants["star:/8"]["plans"][0]


def test_a_run_with_a_second_look_records_it(tmp_path: Path) -> None:
    """Everything computed again is dense attention, to the letter of the answers."""
    look = "star:/8:second_look=1"
    run(engine(), samples(2), parse_all(f"dense,star:/8,{look}"), tmp_path)
    recorded = {line["variant"]: line["second_look"] for line in lines(tmp_path)}
    assert recorded == {"dense": 0, "star:/8": 0, look: 1}
    answers: dict[str, list[str]] = {}
    for prediction in read_predictions(tmp_path):
        answers.setdefault(prediction.variant, []).append(prediction.prediction)
    assert answers[look] == answers["dense"] != answers["star:/8"]
    variants = read_run(tmp_path)["variants"]
    assert [plan["second_look"] for plan in variants[look]["plans"]] == [1]
    assert "second_look" not in variants["star:/8"]["plans"][0]


def test_perplexity_refuses_a_second_look() -> None:
    star = engine()
    windows = perplexity.windows_of(star.tokenizer, "one two three " * 90, length=64, count=1)
    with pytest.raises(InvalidInputError, match="has a second look, which is taken for a query"):
        perplexity.run(star, windows, parse_all("star:/8:second_look=0.1"), tail=8)


def test_a_folder_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    """Its predictions lack the fields, and its plans must not be listed twice."""
    run(engine(), samples(2), parse_all("dense,star:/8"), tmp_path)
    earlier = lines(tmp_path)
    for line in earlier:
        del line["lookback"], line["lookback_layers"], line["second_look"]
    text = "".join(json.dumps(line) + "\n" for line in earlier)
    (tmp_path / PREDICTIONS).write_text(text)
    summary = run(engine(), samples(3), parse_all(f"dense,star:/8,{LOOKING_BACK}"), tmp_path)
    assert (summary.earlier, summary.new) == (4, 5)
    assert {prediction.lookback for prediction in read_predictions(tmp_path)} == {0, 2}
    plans = read_run(tmp_path)["variants"]["star:/8"]["plans"]
    assert len(plans) == len({json.dumps(plan) for plan in plans}) == 1


def test_layers_that_do_not_exist_are_refused_before_the_first_answer(tmp_path: Path) -> None:
    star, variants = engine(), parse_all("dense,star:/8:lookback=1@0-40")
    with pytest.raises(InvalidInputError, match="contains layer 40, and the model has layers"):
        run(star, samples(1), variants, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    windows = perplexity.windows_of(star.tokenizer, "one two three " * 90, length=64, count=1)
    with pytest.raises(InvalidInputError, match="contains layer 40, and the model has layers"):
        perplexity.run(star, windows, variants, tail=9, progress=pytest.fail)


def test_variants_without_it_do_not_inherit_the_engines() -> None:
    star = engine().with_config(lookback=2, lookback_layers="lower")
    assert engine_for(star, parse("dense"), (None, None)).config.lookback == 0
    changed = engine_for(star, parse("star:lookback=1"), (None, 64)).config
    assert (changed.lookback, changed.lookback_layers) == (1, "all")


def test_perplexity_with_enough_lookback_is_that_of_dense_attention() -> None:
    star = engine()
    text = "".join(sample.context for sample in samples(4))
    assert len(query_ids(star.tokenizer, text)) > 192
    windows = perplexity.windows_of(star.tokenizer, text, length=96, count=2)
    dense, blocks, back = perplexity.run(
        star, windows, parse_all("dense,star:16:lookback=1@lower,star:16:lookback=5"), tail=24
    )
    assert back.windows == pytest.approx(dense.windows, abs=1e-4)
    assert blocks.windows != pytest.approx(dense.windows, abs=1e-4)
    assert (blocks.lookback, blocks.lookback_layers) == (1, "lower")
    assert (dense.lookback, dense.lookback_layers) == (0, None)


def test_sweeps_draw_it_as_a_line_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    looking_back = ",".join(f"star:/{part}:16:lookback=1" for part in (8, 4))
    run(engine(), samples(2), parse_all(f"dense,star:/8:16,star:/4:16,{looking_back}"), tmp_path)
    figure = sweep(Results.read(tmp_path), "block")
    (legend,) = [axes.get_legend() or figure.legends[0] for axes in figure.axes]
    labels = {text.get_text() for text in legend.get_texts()}
    assert {"star, 256, anchor 16", "star, 256, anchor 16, lookback=1"} <= labels
