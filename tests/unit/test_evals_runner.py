"""A run goes on where it was killed, with nothing lost or doubled; what cannot be run is refused before the first answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import ContextLengthError, InvalidInputError, SizeError
from star_attention.evals.reports import report, results
from star_attention.evals.runs import perplexity, run_folder, runner
from star_attention.evals.runs.run_folder import PREDICTIONS, RUN
from star_attention.evals.runs.variants import Variant, parse, parse_all
from star_attention.evals.samples.sample import Sample
from star_attention.hf.text.tokens import context_ids, query_ids
from tests.engines import bundled_tokenizer, text_model

VARIANTS = parse_all("dense,star:/4")


def engine() -> StarLLM:
    return StarLLM(text_model(), bundled_tokenizer())


def samples(count: int = 4, *, on: int = 1, task: str = "needles") -> list[Sample]:
    """`on` questions in a row have one context."""
    return [
        Sample(
            id=f"{task}-{i}",
            task=task,
            length=256,
            context="".join(
                f"The number of box {line} is {line * 37 + i // on}.\n" for line in range(12)
            ),
            query=f"What is the number of box {i % 12}?",
            answer_prefix=" It is",
            answers=(str(i),),
            max_new_tokens=3,
            metric="string_match_all",
            meta={"category": "retrieval"},
        )
        for i in range(count)
    ]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / PREDICTIONS).read_text().splitlines()]


# ------------------------------------------------------------------ variants


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [
        ("star", "star", "star"),
        ("star:/4", "star:/4", "star b=/4"),
        ("star:4096:1024", "star:4k:1k", "star b=4k a=1k"),
        ("star:1000:=", "star:1000", "star b=1000"),
        ("star::64", "star::64", "star a=64"),
        ("star:/4:0:kv=fp8", "star:/4:0:kv=fp8", "star b=/4 a=0 kv=fp8"),
        ("star:/4:anchor=random", "star:/4:anchor=random", "star b=/4 anchor=random"),
        ("streaming_llm:2k:64", "streaming_llm:2k:64", "streaming_llm window=2k sinks=64"),
        ("streaming_llm:2k:=", "streaming_llm:2k:=", "streaming_llm window=2k sinks=2k"),
        (" dense", "dense", "dense"),
    ],
)
def test_variants_are_read_back_from_their_keys(text: str, key: str, name: str) -> None:
    variant = parse(text)
    assert (variant.key, variant.name) == (key, name)
    assert parse(variant.key) == variant


def test_a_share_is_rounded_up_so_that_blocks_are_as_many() -> None:
    assert parse("star:/4").sizes(1001) == (251, None)
    assert parse("star:/4:/8").sizes(1024) == (256, 128)
    assert parse("streaming_llm:/4:=").sizes(1024) == (256, 256)
    assert parse("dense").sizes(1024) == (None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "method 'magic' is unknown; choose one of star, dense"),
        ("dense:4k", "'dense' takes no block and no anchor"),
        ("star:/x", "'/x' is no share of the length"),
        ("star:0", "block_size 0 is too small"),
        ("star:4k:-1", "anchor_size -1 is too small"),
        ("star:many", "block_size 'many' is not a number of tokens"),
        ("star:4k:1k:2", "has '2' out of place"),
        ("star:/4:colour=red", "'colour=red', which is no setting"),
        ("star:/4:kv=fp3", "kv_dtype 'fp3' is unknown"),
        ("star:/4:anchor=magic", "anchor 'magic' is unknown; choose one of first-block"),
        ("streaming_llm:1k:anchor=random", "ablations of the anchor are of method 'star'"),
        ("streaming_llm::=", "give a block_size with it"),
        ("star:256:512", "has an anchor of 512 tokens and blocks of 256"),
        ("dense,", "variants 'dense,' have an empty one; give methods with single commas between"),
        ("dense,star:4k,star:4096", "variant 'star:4k' is named twice"),
    ],
)
def test_bad_variants(text: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        parse_all(text)
    assert message in str(caught.value)


def test_an_anchor_above_the_block_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SizeError, match="anchor of 128 tokens and blocks of 64 at 256"):
        runner.run(engine(), samples(), [parse("star:/4:128")], tmp_path, suite="ruler")
    assert not (tmp_path / PREDICTIONS).exists()


# ------------------------------------------------------------------ answers


def test_predictions_are_the_engines_answers(tmp_path: Path) -> None:
    some = samples(2)
    done = runner.run(engine(), some, VARIANTS, tmp_path, suite="ruler")
    assert (done.made, done.found, done.skipped) == (4, 0, 0)
    made = list(run_folder.read_predictions(tmp_path))
    assert [one.key for one in made] == [(s.id, v.key) for s in some for v in VARIANTS]
    for prediction, settings in zip(
        made[:2], ({"method": "dense"}, {"block_size": 64}), strict=True
    ):
        star = StarLLM(text_model(), bundled_tokenizer(), **settings)
        context = star.encode(some[0].context)
        reply = star.generate(
            context, some[0].query, answer_prefix=" It is", max_new_tokens=3, do_sample=False
        )
        assert prediction.prediction == reply.text
        assert prediction.block_size == context.plan.block_size
        ids = len(context_ids(star.tokenizer, some[0].context))
        assert (prediction.context_tokens, prediction.blocks) == (ids, context.plan.num_blocks)
        assert prediction.query_tokens == len(query_ids(star.tokenizer, some[0].query + " It is"))
        assert prediction.answer_tokens == 3
    told = json.loads((tmp_path / RUN).read_text())
    assert told["variants"]["star:/4"]["plans"] == [
        {"length": 256, "ranks": 1, "block_size": 64, "anchor_size": 64}
    ]
    assert told["variants"]["dense"]["plans"] == [{"length": 256, "ranks": 1}]
    assert told["cells"] == [{"task": "needles", "length": 256, "samples": 2}]
    assert {"date", "command", "hardware", "git", "ranks"} <= set(told["sessions"][0])
    assert told["settings"]["model"]["weights"]


def test_a_shared_context_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encodings = []
    encode = StarLLM.encode
    monkeypatch.setattr(
        StarLLM, "encode", lambda self, *a, **k: encodings.append(a) or encode(self, *a, **k)
    )
    runner.run(engine(), samples(6, on=3), VARIANTS, tmp_path)
    assert len(encodings) == 4  # two contexts, two variants
    assert {line["sharing"] for line in lines(tmp_path)} == {3}
    found = results.Results.read(tmp_path).compared("dense")
    assert found is not None
    assert (found.mean.n, found.mean.contexts) == (6, 2)


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    (sample,) = samples(1)
    runner.run(engine(), [sample], [Variant(method="dense")], tmp_path, chat=True)
    star = StarLLM(text_model(), bundled_tokenizer(), method="dense")
    content = [{"role": "user", "content": [{"type": "text", "text": sample.context}]}]
    reply = star.generate(
        star.encode(content),
        sample.query,
        answer_prefix=" It is",
        max_new_tokens=3,
        do_sample=False,
    )
    (made,) = run_folder.read_predictions(tmp_path)
    assert (made.prediction, made.query_tokens) == (reply.text, reply.query_tokens)
    plain = len(query_ids(star.tokenizer, sample.query + " It is"))
    assert plain < made.query_tokens <= plain + runner.chat_tokens(star.tokenizer)


def test_a_prefix_without_a_query_is_asked(tmp_path: Path) -> None:
    sample = replace(samples(1)[0], query="")
    runner.run(engine(), [sample], [Variant(method="dense")], tmp_path)
    with pytest.raises(InvalidInputError, match="has no query, which a chat needs"):
        runner.run(engine(), [sample], [Variant(method="dense")], tmp_path / "chat", chat=True)


def test_an_ablation_changes_what_blocks_see(tmp_path: Path) -> None:
    star, (sample,) = engine(), samples(1)
    variants = parse_all("star:/4,star:/4:anchor=none")
    contexts = [
        runner.encoded(runner.engine_of(star, one, one.sizes(256)), one, sample.context, seed=0)
        for one in variants
    ]
    keys = [context.kv.layers[-1].pair()[0] for context in contexts]
    assert keys[0].shape == keys[1].shape
    assert not keys[0].equal(keys[1])
    assert runner.run(star, [sample], variants, tmp_path).made == 2


def test_limit_counts_for_each_task(tmp_path: Path) -> None:
    done = runner.run(
        engine(), samples(3) + samples(3, task="others"), VARIANTS[:1], tmp_path, limit=2
    )
    assert done.made == 4
    assert {line["sample"] for line in lines(tmp_path)} == {
        "needles-0",
        "needles-1",
        "others-0",
        "others-1",
    }


def test_limit_counts_for_each_depth(tmp_path: Path) -> None:
    some = [replace(one, meta={"depth": index % 2 * 50}) for index, one in enumerate(samples(6))]
    runner.run(engine(), some, VARIANTS[:1], tmp_path, limit=2)
    assert [line["sample"] for line in lines(tmp_path)] == [
        f"needles-{index}" for index in range(4)
    ]


def test_lengths_that_are_each_samples_own_count_are_named_by_powers_of_two(tmp_path: Path) -> None:
    counts = (4100, 4090, 3001, 2201, 2049, 8100)
    some = [replace(one, length=count) for one, count in zip(samples(6), counts, strict=True)]
    named = [one.length for one in runner.with_nominal_lengths(some)]
    assert named == [4096, 4096, 4096, 4096, 2048, 8192]
    meant = [
        replace(one, length=count)
        for one, count in zip(samples(6), (0, 768, 1000, 1500, 3072, 6001), strict=True)
    ]
    assert runner.with_nominal_lengths(meant) == meant
    runner.run(engine(), some, VARIANTS[:1], tmp_path, limit=1)
    assert [(line["sample"], line["length"]) for line in lines(tmp_path)] == [
        ("needles-0", 4096),
        ("needles-4", 2048),
        ("needles-5", 8192),
    ]
    assert runner.run(engine(), some[:1], VARIANTS[:1], tmp_path).found == 3, (
        "its length alone makes no other sample"
    )


def test_shares_of_data_sets_are_of_the_contexts_own_tokens(tmp_path: Path) -> None:
    (sample,) = samples(1)
    runner.run(engine(), [replace(sample, length=4096)], [parse("star:/4")], tmp_path)
    tokens = len(context_ids(bundled_tokenizer(), sample.context))
    assert [line["block_size"] for line in lines(tmp_path)] == [-(-tokens // 4)]


def test_progress_ends_with_all(tmp_path: Path) -> None:
    told: list[str] = []
    runner.run(engine(), samples(2), VARIANTS, tmp_path, progress=told.append)
    assert told[-1].startswith("4 of 4 answers, in ")
    assert [runner.clock(s) for s in (42.4, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


# ------------------------------------------------------------------ going on


SCRIPT = """
import sys
from star_attention import StarLLM
from star_attention.evals import runner
from tests.unit.test_evals_runner import VARIANTS, samples
star = StarLLM.from_pretrained(sys.argv[1], device="cpu")
runner.run(star, samples(40, on=4), VARIANTS, sys.argv[2])
"""


def test_a_killed_run_goes_on_to_the_same_report(tmp_path: Path) -> None:
    model, killed, whole = tmp_path / "model", tmp_path / "killed", tmp_path / "whole"
    text_model().save_pretrained(model)
    bundled_tokenizer().save_pretrained(model)
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, model, killed],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
    )
    file = killed / PREDICTIONS
    ends = time.monotonic() + 60
    while not file.is_file() or file.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < ends
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = file.read_bytes()
    before = kept.count(b"\n")
    assert 5 <= before < 80, "killed in the middle"
    file.write_bytes(
        kept[: kept.rfind(b"\n") + 1] + b'{"sample": "needles-'
    )  # what a kill in a write leaves

    star = StarLLM.from_pretrained(model, device="cpu")
    done = runner.run(star, samples(40, on=4), VARIANTS, killed)
    assert (done.found, done.made) == (before, 80 - before)
    runner.run(star, samples(40, on=4), VARIANTS, whole)
    assert file.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1]), "nothing is written anew"
    assert sorted(map(untimed, lines(killed)), key=str) == sorted(
        map(untimed, lines(whole)), key=str
    )
    assert accuracy(killed) == accuracy(whole)
    assert len(json.loads((killed / RUN).read_text())["sessions"]) == 2
    assert runner.run(star, samples(40, on=4), VARIANTS, killed).made == 0


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.endswith("_s")}


def accuracy(folder: Path) -> Any:
    report.write(folder)
    found = json.loads((folder / report.METRICS).read_text())
    return {name: found[name] for name in ("baseline", "missing", "overall", "groups", "tasks")}


def test_more_samples_and_variants_may_come_later(tmp_path: Path) -> None:
    star = engine()
    runner.run(star, samples(2), VARIANTS[:1], tmp_path)
    assert runner.run(star, samples(3), VARIANTS, tmp_path).made == 4
    keys = [(line["sample"], line["variant"]) for line in lines(tmp_path)]
    assert len(keys) == len(set(keys)) == 6


def test_a_run_that_is_whole_is_never_called_incomplete(tmp_path: Path) -> None:
    star = engine()
    runner.run(star, samples(2) + samples(2, task="others"), VARIANTS[:1], tmp_path)
    runner.run(star, samples(2), VARIANTS, tmp_path)
    assert results.Results.read(tmp_path).missing == 0
    runner.run(star, samples(1, task="third"), VARIANTS[1:], tmp_path)
    assert results.Results.read(tmp_path).missing == 0
    file = tmp_path / PREDICTIONS
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert results.Results.read(tmp_path).missing == 1


def test_the_same_samples_may_come_from_elsewhere(tmp_path: Path) -> None:
    star = engine()
    runner.run(star, samples(1), VARIANTS[:1], tmp_path, options={"files": ["a"], "compat": "x"})
    done = runner.run(
        star, samples(2), VARIANTS[:1], tmp_path, options={"files": ["./a", "b"], "compat": "x"}
    )
    assert (done.found, done.made) == (1, 1)
    told = run_folder.read_run(tmp_path)
    assert told["settings"]["options"] == {"compat": "x"}
    assert [session["options"] for session in told["sessions"]] == [
        {"files": ["a"]},
        {"files": ["./a", "b"]},
    ]
    report.write(tmp_path)
    assert "compat=x; files=a; files=./a, b" in (tmp_path / report.MARKDOWN).read_text()


def test_settings_hold_what_changes_answers(tmp_path: Path) -> None:
    runner.run(engine(), samples(1), VARIANTS[:1], tmp_path)
    settings = run_folder.read_run(tmp_path)["settings"]
    assert (settings["ranks"], settings["device"], settings["reserve_tokens"]) == (
        1,
        "cpu",
        engine().config.reserve_tokens,
    )


def test_what_is_no_folder_of_a_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(InvalidInputError, match=r"is no folder; give another one with --out"):
            runner.run(engine(), samples(1), VARIANTS[:1], out)
    with pytest.raises(InvalidInputError, match=r"holds no run\.json"):
        report.write(file)
    runner.run(engine(), samples(1), VARIANTS[:1], tmp_path)
    whole = json.loads((tmp_path / RUN).read_text())
    for bad, missing in (
        ({**whole, "settings": {}}, "suite, options, model"),
        ({"format": run_folder.FORMAT}, "settings, "),
    ):
        (tmp_path / RUN).write_text(json.dumps(bad))
        with pytest.raises(InvalidInputError, match=rf"run\.json is damaged \({missing}"):
            runner.run(engine(), samples(1), VARIANTS[:1], tmp_path)


def test_files_of_a_user_are_not_replaced(tmp_path: Path) -> None:
    notes = tmp_path / report.MARKDOWN
    notes.write_text("my own")
    with pytest.raises(
        InvalidInputError, match=r"holds no run, but report\.md, which the reports would replace"
    ):
        runner.run(engine(), samples(1), VARIANTS[:1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [report.MARKDOWN]
    assert notes.read_text() == "my own"


def test_ablations_that_cannot_run_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    star = engine()
    monkeypatch.setattr(star.runtime.handle, "rotaries", [object()])
    with pytest.raises(
        InvalidInputError,
        match=r"variant 'star:/4:anchor=none' changes the anchor, which works on one rank",
    ):
        runner.run(star, samples(1), parse_all("dense,star:/4:anchor=none"), tmp_path)
    assert not (tmp_path / PREDICTIONS).exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed: 0, and this one's is 1"),
        ({"chat": True}, "chat: False, and this one's is True"),
        ({"max_new_tokens": 9}, "max_new_tokens: not given, and this one's is 9"),
        ({"suite": "ruler"}, "suite: files, and this one's is ruler"),
        ({"options": {"compat": "x"}}, "options.compat: not given, and this one's is x"),
    ],
)
def test_another_setting_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    star = engine()
    runner.run(star, samples(1), VARIANTS, tmp_path)
    before = (tmp_path / PREDICTIONS).read_bytes()
    with pytest.raises(InvalidInputError) as caught:
        runner.run(star, samples(2), VARIANTS, tmp_path, **change)
    assert f"another {field}" in str(caught.value)
    assert (tmp_path / PREDICTIONS).read_bytes() == before


def test_an_option_that_is_left_out_is_refused_by_name(tmp_path: Path) -> None:
    star = engine()
    runner.run(star, samples(1), VARIANTS, tmp_path, options={"words": "eval"})
    with pytest.raises(
        InvalidInputError, match=r"another options\.words: eval, and this one's is not given"
    ):
        runner.run(star, samples(1), VARIANTS, tmp_path)


def test_another_model_is_refused_by_field(tmp_path: Path) -> None:
    runner.run(engine(), samples(1), VARIANTS[:1], tmp_path)
    path = tmp_path / RUN
    path.write_text(path.read_text().replace('"hidden_size": 48', '"hidden_size": 64'))
    with pytest.raises(
        InvalidInputError, match=r"another config\.hidden_size: 64, and this one's is 48"
    ):
        runner.run(engine(), samples(1), VARIANTS[:1], tmp_path)


def test_other_texts_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    star, (sample,) = engine(), samples(1)
    of_prose = replace(sample, meta={"prose": "a", "prose_sha256": "1" * 16})
    runner.run(star, [of_prose], VARIANTS[:1], tmp_path)
    other = replace(
        of_prose, context=sample.context * 2, meta={"prose": "a", "prose_sha256": "2" * 16}
    )
    with pytest.raises(
        InvalidInputError,
        match=r"sample needles-0 has another prose: 1{16}, and this one's is 2{16}",
    ):
        runner.run(star, [other], VARIANTS, tmp_path)
    with pytest.raises(InvalidInputError, match="sample needles-0 has another text or answers"):
        runner.run(star, [replace(of_prose, answers=("7",))], VARIANTS, tmp_path)


def test_a_damaged_line_is_named_by_its_number(tmp_path: Path) -> None:
    star = engine()
    runner.run(star, samples(3), VARIANTS[:1], tmp_path)
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
            runner.run(star, samples(3), VARIANTS[:1], tmp_path)
        assert message in str(caught.value)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    star = engine()
    runner.run(star, samples(1), VARIANTS[:1], tmp_path)
    with (
        run_folder.opened(tmp_path / PREDICTIONS),
        pytest.raises(InvalidInputError, match="another run is writing to"),
    ):
        runner.run(star, samples(2), VARIANTS[:1], tmp_path)


# ------------------------------------------------------------------ refused before the first answer


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "needles-0"}, "two samples have the id 'needles-0'"),
        ({"metric": "magic"}, "metric 'magic' of sample bad is unknown"),
        ({"context": ""}, "sample bad has no context"),
        ({"query": "", "answer_prefix": ""}, "sample bad has no query"),
        ({"max_new_tokens": 0}, "sample bad has max_new_tokens 0"),
        ({"answers": ("",)}, "sample bad counts an empty answer as right"),
    ],
)
def test_bad_samples(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    some = [*samples(1), replace(samples(1)[0], **({"id": "bad"} | bad))]
    with pytest.raises(InvalidInputError) as caught:
        runner.run(engine(), some, VARIANTS, tmp_path)
    assert message in str(caught.value)
    assert not (tmp_path / PREDICTIONS).exists() or not (tmp_path / PREDICTIONS).read_bytes()


def test_no_samples_and_no_variants(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no samples to run"):
        runner.run(engine(), [], VARIANTS, tmp_path)
    with pytest.raises(InvalidInputError, match="no variants to run"):
        runner.run(engine(), samples(1), [], tmp_path)


def test_samples_beyond_the_model_are_refused_or_listed(tmp_path: Path) -> None:
    limit = text_model().config.max_position_embeddings
    short, star = samples(1)[0], engine()
    long = replace(short, id="long", context="one two three four\n" * (limit // 4))
    with pytest.raises(ContextLengthError) as caught:
        runner.run(star, [short, long], VARIANTS[:1], tmp_path)
    assert "1 of 2 samples are too long for the model: long needs " in str(caught.value)
    assert f"the model has {limit:,} positions" in str(caught.value)
    done = runner.run(star, [short, long], VARIANTS[:1], tmp_path, skip_too_long=True)
    assert (done.made, done.skipped) == (1, 1)
    report.write(tmp_path)
    assert "| long |" in (tmp_path / report.MARKDOWN).read_text()
    with pytest.raises(ContextLengthError, match="all 1 samples are longer"):
        runner.run(star, [long], VARIANTS[:1], tmp_path / "none", skip_too_long=True)


# ------------------------------------------------------------------ perplexity


def test_perplexity_is_that_of_the_plain_model() -> None:
    import torch

    star = engine()
    text = "".join(samples(3)[0].context for _ in range(4))
    windows = perplexity.windows_of(star.tokenizer, text, length=96, count=3)
    assert all(len(window) == 96 and window[0] == star.tokenizer.bos_token_id for window in windows)
    joined = [token for window in windows for token in window[1:]]
    assert joined == query_ids(star.tokenizer, text)[: len(joined)]
    dense, blocks, one = perplexity.run(
        star, windows, parse_all("dense,star:16,star:96"), tail=24, batch=2
    )
    with torch.no_grad():
        for window, loss in zip(windows, dense.windows, strict=True):
            logits_SV = text_model()(torch.tensor([window])).logits[0]
            expected = torch.nn.functional.cross_entropy(
                logits_SV[-25:-1], torch.tensor(window[-24:])
            )
            assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert one.windows == pytest.approx(dense.windows, abs=1e-4)
    assert blocks.windows != pytest.approx(dense.windows, abs=1e-4)
    assert dense.difference is None
    assert blocks.difference is not None
    assert blocks.difference.value == pytest.approx(blocks.nll.value - dense.nll.value)
    assert (blocks.block_size, blocks.anchor_size) == (16, 16)


def test_windows_that_there_are_not() -> None:
    star = engine()
    with pytest.raises(SizeError, match=r"enough for 0 windows of 64 and not for 1"):
        perplexity.windows_of(star.tokenizer, "short", length=64, count=None)
    windows = perplexity.windows_of(
        star.tokenizer, "one two three four five " * 30, length=64, count=1
    )
    with pytest.raises(
        SizeError, match="tail 63 leaves windows of 64 tokens no context; give 1 to 62"
    ):
        perplexity.run(star, windows, VARIANTS, tail=63)
