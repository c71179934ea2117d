"""Calibration: its texts, what follows from measurements, its file, and a measured model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.calibration import report, run, texts
from star_attention.calibration.measure import measure
from star_attention.calibration.result import (
    FLOOR,
    PAPER,
    Gain,
    Loss,
    Measured,
    Result,
    Variant,
    layer_runs,
    student_t,
)
from star_attention.calibration.settings import CalibrationSettings
from star_attention.config import StarConfig
from star_attention.errors import InvalidInputError, SizeError
from star_attention.planning.calibration import Calibration, Lookback, ModelFacts
from star_attention.runtime import model_facts
from star_attention.storage.header import read_header
from tests.command_line import MODEL, QUESTION, failed, ok
from tests.engines import BUNDLED, text_model
from tests.real_model import packaged_file

PROSE = texts.prose()[:100_000]
"""Enough for every test here, and quick to tokenize."""


@pytest.fixture(scope="module")
def star() -> StarLLM:
    return StarLLM.from_pretrained(BUNDLED, dtype="float32", device="cpu")


# ------------------------------------------------------------------------------- texts


def test_answers_are_in_the_context_in_the_order_of_the_text(star: StarLLM) -> None:
    settings = CalibrationSettings(length=1024, samples=3)
    samples = texts.samples(star.tokenizer, PROSE, settings)
    assert len(samples) == 3
    for sample in samples:
        assert len(sample.context) == 1024
        context = star.tokenizer.decode(sample.context)
        for probe, count in zip(sample.facts, texts.VALUES_OF_KEYS, strict=True):
            answer = star.tokenizer.decode(probe.ids[-probe.measured :]).strip()
            places = [context.find(f" is: {value}.") for value in answer.split(", ")]
            assert len(places) == count
            assert places == sorted(places)
            assert places[0] > 0
        assert sample.text.measured == len(sample.text.ids) - 1
    assert samples[0].context != samples[1].context


def test_the_same_seed_gives_the_same_contexts(star: StarLLM) -> None:
    settings = CalibrationSettings(length=512, samples=3)
    first, again, other = (
        texts.samples(star.tokenizer, PROSE, replace(settings, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_a_text_too_short_is_refused_with_a_length_that_works(star: StarLLM) -> None:
    text = "The river rose in the night, and the bridge was gone by noon. " * 40
    settings = CalibrationSettings(length=2048, samples=3)
    with pytest.raises(SizeError, match=r"give a longer text, or --length \d+") as refused:
        texts.samples(star.tokenizer, text, settings)
    length = int(str(refused.value).rsplit(" ", 1)[1])
    samples = texts.samples(star.tokenizer, text, replace(settings, length=length))
    assert {len(sample.context) for sample in samples} == {length}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 3}, "blocks 3 are too few"),
        ({"samples": 2}, "samples 2 are too few"),
        ({"length": 100}, "length 100 leaves less than 16 tokens"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(SizeError, match=message):
        CalibrationSettings(**settings)


def test_a_length_beyond_the_positions_is_refused(star: StarLLM) -> None:
    with pytest.raises(SizeError, match=r"65,536 positions; give a length of at most 65,024"):
        run.calibrate(star, CalibrationSettings(length=65536))


# --------------------------------------------------------------------- what follows


def measured(loss: float, lookback: int, layers: str, noise: float = 0.0) -> Measured:
    """Return losses of four samples around a mean."""
    variant = Variant(name="", settings=Lookback(lookback=lookback, lookback_layers=layers))
    signs = (1, -1, 1, -1)
    losses = tuple(Loss(facts=loss + sign * noise, text=3.0) for sign in signs)
    return Measured(variant=variant, losses=losses)


def result(halves: list[float], *, near: float, noise: float = 0.01) -> Result:
    runs = layer_runs(12, 3)
    floor = measured(2.0, 0, "all")
    return Result(
        floor=replace(floor, variant=FLOOR),
        paper=replace(floor, variant=PAPER),
        near=measured(near, 1, "all"),
        ceiling=measured(min(halves) - 0.1, 3, "all"),
        groups=tuple(measured(1.9, 2, layers) for layers in layer_runs(12, 1)),
        # Of opposite signs in neighbors, which it would cancel out otherwise.
        halves=tuple(
            measured(loss, 2, layers, noise * (-1) ** number)
            for number, (loss, layers) in enumerate(zip(halves, runs, strict=True))
        ),
        far=measured(min(halves) - 0.1, 6, runs[halves.index(min(halves))]),
    )


@pytest.mark.parametrize(
    ("halves", "layers"), [([1.0, 1.2, 1.4, 1.6], "0-5"), ([1.6, 1.4, 1.2, 1.0], "6-11")]
)
def test_the_best_half_of_the_layers_is_chosen(halves: list[float], layers: str) -> None:
    chosen = result(halves, near=1.5)
    assert chosen.balanced == Lookback(lookback=2, lookback_layers=layers)
    assert chosen.high == Lookback(lookback=6, lookback_layers=layers)
    assert f"layers {layers} need other blocks" in chosen.reason


def test_halves_that_equal_all_layers_at_their_price_are_chosen() -> None:
    """Two blocks in the layers that need them, where one block in all is no better."""
    assert result([1.0, 1.2, 1.4, 1.6], near=1.0).balanced.lookback == 2


@pytest.mark.parametrize(
    ("near", "noise", "reason"),
    [
        (1.1, 0.5, "layers do not differ beyond the noise"),
        (0.9, 0.001, "1 block in all layers is better than 2 in layers 0-5"),
    ],
)
def test_without_layers_to_choose_all_look_back(near: float, noise: float, reason: str) -> None:
    """Forbids choosing layers by chance."""
    chosen = result([1.0, 1.05, 1.02, 1.06], near=near, noise=noise)
    assert chosen.balanced == Lookback(lookback=1, lookback_layers="all")
    assert chosen.high == Lookback(lookback=3, lookback_layers="all")
    assert reason in chosen.reason


def test_a_model_that_gains_nothing_is_told() -> None:
    chosen = result([2.3, 2.4, 2.5, 2.6], near=2.2)
    assert "gains nothing beyond the noise" in chosen.reason


@pytest.mark.parametrize("num_layers", [2, 3, 5, 6, 10, 16, 30, 31, 80])
def test_runs_of_half_the_layers_cost_what_the_paper_costs(num_layers: int) -> None:
    groups = len(layer_runs(num_layers, 1))
    runs = [
        [int(number) for number in layers.split("-")]
        for layers in layer_runs(num_layers, max(1, groups // 2))
    ]
    sizes = {numbers[-1] - numbers[0] + 1 for numbers in runs}
    assert max(sizes) <= -(-num_layers // 2)
    assert runs[0][0] == 0
    assert runs[-1][-1] == num_layers - 1


@pytest.mark.parametrize(("degrees", "quantile"), [(2, 4.303), (5, 2.571), (15, 2.131)])
def test_quantiles_are_student_s(degrees: int, quantile: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, rel=0.01)


def test_an_interval_is_around_the_mean() -> None:
    gain = Gain.of([1.0, 2.0, 3.0])
    # 4.303 / sqrt(3)
    assert gain.value == 2.0
    assert gain.high - 2.0 == pytest.approx(2.484, rel=0.01)
    assert gain.is_seen is False


# --------------------------------------------------------------------------- the file


def calibration(star: StarLLM, **changes: Any) -> Calibration:
    layers = changes.pop("layers_that_look", "5-9")
    facts = replace(model_facts(star.runtime), **changes)
    return Calibration(
        model=facts,
        settings={
            "balanced": Lookback(lookback=2, lookback_layers=layers),
            "high": Lookback(lookback=4, lookback_layers=layers),
        },
    )


def test_a_calibration_sets_the_look_back(star: StarLLM, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    written = calibration(star)
    written.write(path)
    assert Calibration.read(path) == written
    # In another precision the weights cannot be compared, and are not.
    for dtype in ("float32", "bfloat16"):
        calibrated = StarLLM.from_pretrained(
            BUNDLED, calibration=path, block_size=64, dtype=dtype, device="cpu"
        )
        assert (calibrated.config.lookback, calibrated.config.lookback_layers) == (2, "5-9")
    explicit = StarLLM.from_pretrained(BUNDLED, calibration=path, lookback=1, device="cpu")
    assert (explicit.config.lookback, explicit.config.lookback_layers) == (1, "5-9")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 30, "layers_that_look": "0-29"}, "in layers: 30 in the calibration, 10 in"),
        ({"model_type": "qwen3"}, "in model_type: qwen3 in the calibration, llama in this"),
        ({"config": "0"}, "differs in config"),
        ({"weights": "0"}, "differs in weights"),
    ],
)
def test_a_calibration_of_another_model_is_refused(
    star: StarLLM, tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "calibration.json"
    calibration(star, **change).write(path)
    with pytest.raises(InvalidInputError, match=f"another model: .*{message}"):
        StarLLM.from_pretrained(BUNDLED, calibration=path, dtype="float32", device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read .*; give a file"),
        ("{", "is not a calibration"),
        ("[1]", "is not a calibration"),
        ('{"format": "star-attention calibration", "version": 9}', "has version 9"),
        ('{"format": "star-attention calibration", "version": 1}', "is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidInputError, match=message):
        StarLLM.from_pretrained(BUNDLED, calibration=path)


def test_a_config_that_looks_back_is_no_calibration_s(star: StarLLM, tmp_path: Path) -> None:
    """Forbids the file's layers in place of those of a `StarConfig`, without a word."""
    path, config = tmp_path / "file.json", StarConfig(lookback=3, lookback_layers="upper")
    calibration(star).write(path)
    with pytest.raises(InvalidInputError, match="lookback 3 in config, and a calibration, which"):
        StarLLM.from_pretrained(BUNDLED, config=config, calibration=path)
    loaded = StarLLM.from_pretrained(BUNDLED, config=config, calibration=path, lookback=1)
    assert (loaded.config.lookback, loaded.config.lookback_layers) == (1, "5-9")


def test_settings_in_a_file_are_checked(star: StarLLM, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    values = calibration(star).as_dict()
    values["settings"]["balanced"]["lookback"] = -1
    path.write_text(json.dumps(values))
    with pytest.raises(InvalidInputError, match=r"is damaged \(lookback -1 is not a number"):
        Calibration.read(path)


# ---------------------------------------------------------------------------- measured


def halves_of(star: StarLLM, settings: CalibrationSettings) -> dict[str, Measured]:
    """Measure the lower and the upper half of the layers."""
    layers = layer_runs(len(star.runtime.handle.windows), 3)
    variants = [
        Variant(name=name, settings=Lookback(lookback=2, lookback_layers=run_of_layers))
        for name, run_of_layers in (("lower", layers[0]), ("upper", layers[-1]))
    ]
    samples = texts.samples(star.tokenizer, PROSE, settings)
    lines: list[str] = []
    found = measure(star, variants, samples, settings, lines.append)
    halves = {half.variant.name: half for half in found}
    assert [line.partition(":")[0] for line in lines] == ["lower", "upper"]
    return halves


def test_the_bundled_model_needs_its_upper_half(star: StarLLM) -> None:
    halves = halves_of(star, CalibrationSettings(length=2048, samples=3))
    assert halves["lower"].mean - halves["upper"].mean > 0.1


@pytest.mark.slow
def test_a_published_model_needs_its_lower_half() -> None:
    smollm2 = StarLLM.from_pretrained(packaged_file(), dtype="float32")
    halves = halves_of(smollm2, CalibrationSettings(length=1024, samples=4))
    assert halves["lower"].gain(halves["upper"]).is_seen


def test_a_calibration_is_written_drawn_and_used(tmp_path: Path) -> None:
    """The command on a model of two layers, and a context encoded with its file."""
    tiny, out = tmp_path / "tiny", tmp_path / "calibration.json"
    text_model().save_pretrained(tiny)
    StarLLM.from_pretrained(BUNDLED, device="cpu").tokenizer.save_pretrained(tiny)
    options = ["--length", "128", "--blocks", "4", "--samples", "3", "--out", out]
    done = ok("calibrate", "-m", tiny, "--device", "cpu", *options)
    assert "3 contexts of 128 tokens in 4 blocks" in done.out
    assert "balanced  --lookback " in done.out
    written = json.loads(out.read_text())
    balanced, high = (StarConfig.of(quality=name, block_size=32) for name in ("balanced", "high"))
    measured = written["measured"]
    assert {half["lookback"] for half in measured["halves"]} == {balanced.lookback}
    assert measured["far"]["lookback"] == high.lookback
    assert measured["anchor_size"] == high.plan(128).anchor_size
    assert written["model"]["layers"] == len(layer_runs(99, 1)[:2])
    assert json.loads(ok("calibrate", "-m", tiny, *options, "--json").out).keys() == written.keys()


def test_options_go_before_the_file(star: StarLLM, tmp_path: Path) -> None:
    path, book, out = (tmp_path / name for name in ("c.json", "book.txt", "book.star"))
    book.write_text("The hill is tall and the road is long.\n" * 40)
    calibration(star).write(path)
    given = [*MODEL, "--block-size", "64", "--calibration", path, "-o", out]
    for options, lookback in (([], 2), (["--lookback", "1"], 1)):
        out.unlink(missing_ok=True)
        ok("encode", book, *given, *options)
        header = read_header(out)
        assert (header["lookback"], header["lookback_layers"]) == (lookback, "5-9")
    assert "cannot be read" in failed(
        "generate", book, *MODEL, "--calibration", tmp_path / "no.json", "--query", QUESTION
    )


def test_the_command_refuses_before_it_loads(tmp_path: Path) -> None:
    assert "blocks 2 are too few" in failed("calibrate", *MODEL, "--blocks", "2")
    assert "is a folder; give a file with --out" in failed("calibrate", *MODEL, "--out", tmp_path)
    assert "is not writable" in failed("calibrate", *MODEL, "--out", tmp_path / "no" / "c.json")


def test_the_picture_shows_every_measurement() -> None:
    chosen = result([1.0, 1.2, 1.4, 1.6], near=1.5)
    settings = {"balanced": chosen.balanced, "high": chosen.high}
    facts = ModelFacts(model_type="llama", layers=12, config="", dtype="", weights="")
    measured = {"samples": 4, "length": 2048, "blocks": 8}
    text = report.as_text(Calibration(model=facts, settings=settings, measured=measured), chosen)
    bars = [line.count("#") for line in text.splitlines() if "(" in line and ": " not in line]
    assert bars[7:11] == sorted(bars[7:11], reverse=True)
    assert text.endswith(
        "balanced  --lookback 2 --lookback-layers 0-5\nhigh      --lookback 6 --lookback-layers 0-5"
    )
