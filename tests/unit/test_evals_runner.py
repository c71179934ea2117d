"""Answers of a run are the engine's; bad samples are refused before the first answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError, SizeError
from star_attention.evals.reports import report
from star_attention.evals.reports.results import Results
from star_attention.evals.runs.engines import encode, engine_for
from star_attention.evals.runs.jobs import with_nominal_lengths
from star_attention.evals.runs.predictions import PREDICTIONS, read_predictions
from star_attention.evals.runs.progress import duration
from star_attention.evals.runs.prompts import chat_tokens
from star_attention.evals.runs.run_folder import MARKDOWN, read_run
from star_attention.evals.runs.variants import Variant, parse, parse_all
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import bundled_tokenizer, text_model
from tests.evals_runs import VARIANTS, engine, lines, run, samples


def test_an_anchor_above_the_block_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SizeError, match="anchor of 128 tokens and blocks of 64 at 256"):
        run(engine(), samples(), [parse("star:/4:128")], tmp_path, suite="ruler")
    assert not (tmp_path / PREDICTIONS).exists()


def test_predictions_are_the_engines_answers(tmp_path: Path) -> None:
    two = samples(2)
    summary = run(engine(), two, VARIANTS, tmp_path, suite="ruler")
    assert (summary.new, summary.earlier, summary.skipped) == (4, 0, 0)
    predictions = list(read_predictions(tmp_path))
    assert [line.key for line in predictions] == [(s.id, v.key) for s in two for v in VARIANTS]
    for prediction, settings in zip(
        predictions[:2], ({"method": "dense"}, {"block_size": 64}), strict=True
    ):
        star = StarLLM(text_model(), bundled_tokenizer(), **settings)
        context = star.encode(two[0].context)
        reply = star.generate(
            context, two[0].query, answer_prefix=" It is", max_new_tokens=3, do_sample=False
        )
        assert prediction.prediction == reply.text
        assert prediction.block_size == context.plan.block_size
        ids = len(context_ids(star.tokenizer, two[0].context))
        assert (prediction.context_tokens, prediction.blocks) == (ids, context.plan.num_blocks)
        assert prediction.query_tokens == len(query_ids(star.tokenizer, two[0].query + " It is"))
        assert prediction.answer_tokens == 3
    record = read_run(tmp_path)
    assert record["variants"]["star:/4"]["plans"] == [
        {"length": 256, "ranks": 1, "block_size": 64, "anchor_size": 64}
    ]
    assert record["variants"]["dense"]["plans"] == [{"length": 256, "ranks": 1}]
    assert record["cells"] == [{"task": "needles", "length": 256, "samples": 2}]
    assert {"date", "command", "hardware", "git", "ranks"} <= set(record["sessions"][0])
    assert record["settings"]["model"]["weights"]


def test_rows_give_the_same_answers(tmp_path: Path) -> None:
    """Of several contexts and questions at once, with look-back and a second look among them."""
    four = [replace(s, max_new_tokens=n) for n, s in enumerate(samples(4, sharing=2), start=2)]
    variants = parse_all("dense,star:/4,star:/8:lookback=2@lower,star:/4:second_look=0.5")
    said: list[str] = []
    run(engine(), four, variants, tmp_path / "single")
    # As of a run that was killed: the rest is answered in rows.
    (tmp_path / "rows").mkdir()
    run(engine(), four[:1], variants[:1], tmp_path / "rows")
    summary = run(engine(), four, variants, tmp_path / "rows", rows=3, progress=said.append)
    assert (summary.new, summary.earlier) == (15, 1)
    assert said[-1].startswith("16 of 16 answers") or said[-1].startswith("15 of 15 answers")
    single, together = (
        {line.key: (line.prediction, line.answer_tokens, line.query_tokens) for line in lines}
        for lines in (read_predictions(tmp_path / name) for name in ("single", "rows"))
    )
    assert together == single


def test_numbers_of_rows_that_do_not_work(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="rows: expected 1 or more, got 0"):
        run(engine(), samples(), VARIANTS, tmp_path, rows=0)


def test_a_shared_context_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encodings = []
    encode = StarLLM.encode
    monkeypatch.setattr(
        StarLLM, "encode", lambda self, *a, **k: encodings.append(a) or encode(self, *a, **k)
    )
    run(engine(), samples(6, sharing=3), VARIANTS, tmp_path)
    assert len(encodings) == 4  # two contexts, two variants
    assert {line["sharing"] for line in lines(tmp_path)} == {3}
    comparison = Results.read(tmp_path).compared("dense")
    assert comparison is not None
    assert (comparison.mean.n, comparison.mean.contexts) == (6, 2)


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    (sample,) = samples(1)
    run(engine(), [sample], [Variant(method="dense")], tmp_path, chat=True)
    star = StarLLM(text_model(), bundled_tokenizer(), method="dense")
    content = [{"role": "user", "content": [{"type": "text", "text": sample.context}]}]
    reply = star.generate(
        star.encode(content),
        sample.query,
        answer_prefix=" It is",
        max_new_tokens=3,
        do_sample=False,
    )
    (prediction,) = read_predictions(tmp_path)
    assert (prediction.prediction, prediction.query_tokens) == (reply.text, reply.query_tokens)
    plain = len(query_ids(star.tokenizer, sample.query + " It is"))
    assert plain < prediction.query_tokens <= plain + chat_tokens(star.tokenizer)


def test_a_prefix_without_a_query_takes_its_place(tmp_path: Path) -> None:
    sample = replace(samples(1)[0], query="")
    run(engine(), [sample], [Variant(method="dense")], tmp_path)
    with pytest.raises(InvalidInputError, match="has no query, which a chat requires"):
        run(engine(), [sample], [Variant(method="dense")], tmp_path / "chat", chat=True)


def test_an_ablation_changes_what_blocks_see(tmp_path: Path) -> None:
    star, (sample,) = engine(), samples(1)
    variants = parse_all("star:/4,star:/4:anchor=none")
    contexts = [
        encode(engine_for(star, variant, variant.sizes(256)), variant, sample.context, seed=0)
        for variant in variants
    ]
    keys = [context.kv.layers[-1].pair()[0] for context in contexts]
    assert keys[0].shape == keys[1].shape
    assert not keys[0].equal(keys[1])
    assert run(star, [sample], variants, tmp_path).new == 2


def test_limit_counts_for_each_task(tmp_path: Path) -> None:
    summary = run(engine(), samples(3) + samples(3, task="others"), VARIANTS[:1], tmp_path, limit=2)
    assert summary.new == 4
    assert {line["sample"] for line in lines(tmp_path)} == {
        "needles-0",
        "needles-1",
        "others-0",
        "others-1",
    }


def test_limit_counts_for_each_depth(tmp_path: Path) -> None:
    six = [replace(sample, meta={"depth": i % 2 * 50}) for i, sample in enumerate(samples(6))]
    run(engine(), six, VARIANTS[:1], tmp_path, limit=2)
    assert [line["sample"] for line in lines(tmp_path)] == [
        f"needles-{index}" for index in range(4)
    ]


def test_lengths_that_are_each_samples_own_count_are_named_by_powers_of_two(tmp_path: Path) -> None:
    counts = (4100, 4090, 3001, 2201, 2049, 8100)
    own = [replace(sample, length=n) for sample, n in zip(samples(6), counts, strict=True)]
    nominal = [sample.length for sample in with_nominal_lengths(own)]
    assert nominal == [4096, 4096, 4096, 4096, 2048, 8192]
    few = (0, 768, 1000, 1500, 3072, 6001)
    intended = [replace(sample, length=n) for sample, n in zip(samples(6), few, strict=True)]
    assert with_nominal_lengths(intended) == intended
    run(engine(), own, VARIANTS[:1], tmp_path, limit=1)
    assert [(line["sample"], line["length"]) for line in lines(tmp_path)] == [
        ("needles-0", 4096),
        ("needles-4", 2048),
        ("needles-5", 8192),
    ]
    assert run(engine(), own[:1], VARIANTS[:1], tmp_path).earlier == 3, (
        "another length alone does not make another sample"
    )


def test_fractions_in_data_sets_refer_to_the_contexts_own_tokens(tmp_path: Path) -> None:
    (sample,) = samples(1)
    run(engine(), [replace(sample, length=4096)], [parse("star:/4")], tmp_path)
    tokens = len(context_ids(bundled_tokenizer(), sample.context))
    assert [line["block_size"] for line in lines(tmp_path)] == [-(-tokens // 4)]


def test_progress_ends_with_all(tmp_path: Path) -> None:
    messages: list[str] = []
    run(engine(), samples(2), VARIANTS, tmp_path, progress=messages.append)
    assert messages[-1].startswith("4 of 4 answers, in ")
    assert [duration(s) for s in (42.4, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


def test_ablations_that_cannot_run_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    star = engine()
    monkeypatch.setattr(star.runtime.handle, "rotaries", [object()])
    with pytest.raises(
        InvalidInputError,
        match=r"variant 'star:/4:anchor=none' changes the anchor, which works on one rank only",
    ):
        run(star, samples(1), parse_all("dense,star:/4:anchor=none"), tmp_path)
    assert not (tmp_path / PREDICTIONS).exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "needles-0"}, "two samples have the id 'needles-0'"),
        ({"metric": "magic"}, "metric 'magic' of sample bad is unknown"),
        ({"context": ""}, "sample bad has no context"),
        ({"query": "", "answer_prefix": ""}, "sample bad has no query"),
        ({"max_new_tokens": 0}, "sample bad has max_new_tokens 0"),
        ({"answers": ("",)}, "sample bad scores an empty answer as right"),
    ],
)
def test_bad_samples_are_refused(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    both = [*samples(1), replace(samples(1)[0], **({"id": "bad"} | bad))]
    with pytest.raises(InvalidInputError) as caught:
        run(engine(), both, VARIANTS, tmp_path)
    assert message in str(caught.value)
    assert not (tmp_path / PREDICTIONS).exists() or not (tmp_path / PREDICTIONS).read_bytes()


def test_no_samples_or_no_variants_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no samples to run"):
        run(engine(), [], VARIANTS, tmp_path)
    with pytest.raises(InvalidInputError, match="no variants to run"):
        run(engine(), samples(1), [], tmp_path)


def test_samples_beyond_the_models_positions_are_refused_or_listed(tmp_path: Path) -> None:
    limit = text_model().config.max_position_embeddings
    short, star = samples(1)[0], engine()
    long = replace(short, id="long", context="one two three four\n" * (limit // 4))
    with pytest.raises(ContextLengthError) as caught:
        run(star, [short, long], VARIANTS[:1], tmp_path)
    assert "1 of 2 samples are too long for the model: long needs " in str(caught.value)
    assert f"the model has {limit:,} positions" in str(caught.value)
    summary = run(star, [short, long], VARIANTS[:1], tmp_path, skip_too_long=True)
    assert (summary.new, summary.skipped) == (1, 1)
    report.write(tmp_path)
    assert "| long |" in (tmp_path / MARKDOWN).read_text()
    with pytest.raises(ContextLengthError, match="all 1 samples are longer"):
        run(star, [long], VARIANTS[:1], tmp_path / "none", skip_too_long=True)
