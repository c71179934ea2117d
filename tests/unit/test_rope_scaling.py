"""Rotary scaling: given when a model is loaded, edited afterwards, or named as in old configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM, supported
from star_attention.errors import (
    ContextLengthError,
    ContextMismatchError,
    InvalidInputError,
    UnsupportedModelError,
)
from star_attention.hf.loading import rope_words
from star_attention.hf.loading.model_config import load_config
from tests.command_line import MODEL, NEEDLE, NOISE, failed, ok
from tests.engines import BUNDLED, ids
from tests.families import FAMILIES, build
from tests.refusals import refused

YARN = {"rope_type": "yarn", "factor": 4.0}


def folder_of(family: str, path: Path, **fields: Any) -> Path:
    """Save a tiny model, and replace fields of its config.json."""
    build(family).save_pretrained(path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return path


def load(path: Path, **model_kwargs: Any) -> StarLLM:
    return StarLLM.from_pretrained(
        path, dtype="float32", device="cpu", method="dense", model_kwargs=model_kwargs
    )


def logits(star: StarLLM, length: int = 40) -> torch.Tensor:
    return star.logits(star.encode(ids(length)), [5, 6])


@pytest.mark.parametrize(
    "model_kwargs",
    [
        {"rope_scaling": YARN},
        {"rope_scaling": "yarn:4"},
        {"rope_scaling": "yarn:4:512"},
        {"rope_scaling": json.dumps(YARN)},
        {"rope_parameters": YARN},
        {"rope_scaling": {"type": "yarn", "factor": 4}},
    ],
    ids=str,
)
def test_settings_at_run_time_equal_settings_in_the_file(
    model_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """Forbids losing the base frequency, which the settings do not repeat."""
    written = folder_of(
        "llama", tmp_path / "a", rope_parameters=YARN | {"rope_theta": 5e5}, rope_theta=5e5
    )
    given = folder_of(
        "llama",
        tmp_path / "b",
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        rope_theta=5e5,
    )
    star = load(given, **model_kwargs)
    assert star.model.config.rope_parameters["rope_theta"] == 5e5
    torch.testing.assert_close(logits(star), logits(load(written)), atol=0, rtol=0)
    assert (logits(star) - logits(load(given))).abs().max() > 1e-3
    assert star.runtime.handle.max_positions == 4 * 512
    refused(ContextLengthError, "2,049 tokens", "2,048 positions", call=lambda: logits(star, 2049))


def test_the_base_frequency_alone(tmp_path: Path) -> None:
    """Forbids ignoring it: transformers sets an attribute that no module reads."""
    path = folder_of("llama", tmp_path)
    star = load(path, rope_theta=1e6)
    assert star.model.config.rope_parameters["rope_theta"] == 1e6
    assert (logits(star) - logits(load(path))).abs().max() > 1e-3


def test_scaling_of_a_model_whose_layer_types_differ_is_that_of_full_attention(
    tmp_path: Path,
) -> None:
    path = folder_of("gemma3", tmp_path)
    before = load(path).model.config.rope_parameters
    star = load(path, rope_scaling="linear:2")
    after = star.model.config.rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["factor"] == 2
    assert after["full_attention"]["rope_theta"] == before["full_attention"]["rope_theta"]
    assert star.runtime.handle.max_positions == 2 * load(path).runtime.handle.max_positions
    by_type = load(path, rope_scaling={"full_attention": {"rope_type": "linear", "factor": 2.0}})
    torch.testing.assert_close(logits(star), logits(by_type), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("gpt2", "yarn:4", ["gpt2", "no rotary positions"]),
        ("llama", "yarn", ["'yarn'", "TYPE:FACTOR", "yarn:4"]),
        ("llama", "yarn:x", ["'yarn:x'", "expected numbers"]),
        ("llama", "ntk:4", ["'ntk:4'", "linear, dynamic, yarn"]),
        ("llama", "{", ["'{'", "not JSON"]),
        ("llama", 4, ["rope_scaling 4", "expected a dict"]),
        ("llama", {"factor": 4.0}, ["no rope_type"]),
        ("llama", {"rope_type": "foo", "factor": 4.0}, ["'foo' is unknown", "yarn"]),
        ("llama", {"rope_type": "yarn"}, ["lacks factor"]),
        ("llama", {"rope_type": "longrope"}, ["lacks short_factor"]),
        ("llama", {"rope_type": "yarn", "factor": 0.5}, ["factor 0.5", "at least 1"]),
        ("llama", {"rope_type": "yarn", "factor": "4"}, ["factor '4'", "a number"]),
        (
            "llama_llama3scaling",
            "yarn:4",
            ["llama3, factor 4.0", "original_max_position_embeddings"],
        ),
        ("llama", {"full_attention": YARN}, ["by layer type", "share theirs"]),
        ("gemma3", {"global": YARN}, ["names global layers", "full_attention, sliding_attention"]),
    ],
    ids=str,
)
def test_settings_that_cannot_work(
    family: str, settings: Any, words: list[str], tmp_path: Path
) -> None:
    path = folder_of(family, tmp_path)
    refused(InvalidInputError, *words, call=lambda: load(path, rope_scaling=settings))


def test_a_model_of_the_same_scaling_keeps_what_is_not_given(tmp_path: Path) -> None:
    own = YARN | {"rope_theta": 1e4, "original_max_position_embeddings": 128, "beta_fast": 16}
    star = load(folder_of("llama", tmp_path, rope_parameters=own), rope_scaling="yarn:8")
    assert star.model.config.rope_parameters == own | {"factor": 8.0}
    assert star.runtime.handle.max_positions == 8 * 128


@pytest.mark.parametrize("family", ["llama", "phi3_longrope"])
def test_the_old_name_of_longrope(family: str, tmp_path: Path) -> None:
    """Forbids an error that reads `'su'`."""
    shape = FAMILIES[family]()
    head_size = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    half = head_size // 2
    factors = {"short_factor": [1.0] * half, "long_factor": [2.0] * half}
    fields = dict(max_position_embeddings=512, original_max_position_embeddings=64, rope_theta=1e4)
    stars = []
    for name in ("su", "longrope"):
        path = folder_of(family, tmp_path / name, **fields)
        raw = json.loads((path / "config.json").read_text())
        del raw["rope_parameters"]
        raw["rope_scaling"] = {"type": name, **factors}
        (path / "config.json").write_text(json.dumps(raw))
        assert load_config(path).rope_parameters["rope_type"] == "longrope"
        stars.append(load(path))
    torch.testing.assert_close(logits(stars[0]), logits(stars[1]), atol=0, rtol=0)
    assert stars[0].runtime.handle.max_positions == 512


def test_an_unknown_type_in_the_file_is_named(tmp_path: Path) -> None:
    """Forbids an error of one word, and a traceback of `plan`."""
    path = folder_of("llama", tmp_path, rope_parameters={"rope_type": "foo", "rope_theta": 1e4})
    assert "rope type 'foo'" in str(supported(path))
    words = ["rope type 'foo' (rope_parameters or rope_scaling)", "it knows default, dynamic"]
    refused(UnsupportedModelError, *words, call=lambda: load(path))
    assert words[0] in failed("plan", "-m", path, "--context", "1k")


@pytest.mark.parametrize(
    "edited",
    [
        {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "default", "rope_theta": 2e6},
        {"rope_type": "yarn"},
    ],
    ids=str,
)
def test_settings_edited_after_loading_are_refused(edited: dict[str, Any]) -> None:
    """Forbids the old frequencies with the limit of the new settings."""
    model = build("llama")
    model.config.rope_parameters = {"rope_theta": 1e4} | edited
    refused(
        InvalidInputError,
        "are not those that the model was made with",
        "edits after loading change nothing",
        "--rope-scaling",
        call=lambda: StarLLM(model),
    )


@pytest.mark.parametrize("family", ["phi3_longrope", "gemma3"])
def test_settings_edited_in_place_are_refused(family: str) -> None:
    model = build(family)
    parameters = model.config.rope_parameters
    parameters.get("full_attention", parameters)["rope_theta"] = 123.0
    refused(InvalidInputError, "was made with", "123.0", call=lambda: StarLLM(model))


def test_take_leaves_other_arguments() -> None:
    settings, others = rope_words.take({"rope_scaling": None, "revision": "main"})
    assert (settings, others) == ({}, {"revision": "main"})


# ------------------------------------------------------------------------------- command line


@pytest.mark.filterwarnings("default")
def test_the_command_line_extends_a_context(tmp_path: Path) -> None:
    limit = json.loads((BUNDLED / "config.json").read_text())["max_position_embeddings"]
    plan = ["plan", "-m", BUNDLED, "--context", 2 * limit]
    refusal = f"but the model has {limit:,}: it would refuse to encode"
    assert refusal in ok(*plan).err
    assert refusal not in ok(*plan, "--rope-scaling", "yarn:4").err
    estimate = ["estimate", *plan[1:], "--hardware", "h200-nvlink"]
    assert refusal in ok(*estimate).err
    assert refusal not in ok(*estimate, "--rope-scaling", "yarn:4").err

    (tmp_path / "a.txt").write_text(NOISE + NEEDLE + NOISE)
    yarn, query = ["--rope-scaling", "yarn:4"], ["-q", "--query", "What?", "--max-new-tokens", 4]
    answer = ok("generate", *MODEL, *yarn, tmp_path / "a.txt", *query).out
    saved = tmp_path / "a.star"
    ok("encode", *MODEL, *yarn, tmp_path / "a.txt", "-o", saved, "-q")
    assert ok("ask", *MODEL, *yarn, saved, *query).out == answer
    message = failed("ask", *MODEL, saved, *query)
    assert "differs in config.rope_parameters" in message
    assert "--rope-scaling" in message
    assert "TYPE:FACTOR" in failed(
        "generate", *MODEL, tmp_path / "a.txt", *query, "--rope-scaling", "x"
    )


def test_a_saved_context_needs_the_same_scaling(tmp_path: Path) -> None:
    path = folder_of("llama", tmp_path / "model")
    load(path, rope_scaling=YARN).encode(ids(40)).save(tmp_path / "a.star")
    assert len(load(path, rope_scaling="yarn:4").load_context(tmp_path / "a.star")) == 40
    with pytest.raises(ContextMismatchError, match="--rope-scaling") as caught:
        load(path).load_context(tmp_path / "a.star")
    assert caught.value.field == "config.rope_parameters"


def test_a_length_that_may_be_too_long_is_said_once(tmp_path: Path) -> None:
    """A linear factor beside a length leaves open whether it is the final one."""
    path = folder_of("llama", tmp_path, rope_scaling={"type": "linear", "factor": 2.0})
    star = load(path)
    limit = star.model.config.max_position_embeddings
    star.encode(ids(limit))
    said = (
        rf"the context has {limit + 1:,} tokens, but the model may be good for {limit:,} only: its"
        rf" config states {limit:,} positions beside linear scaling by 2, but not whether before or"
        " after it; keep to the length on its card"
    )
    with pytest.warns(UserWarning, match=said):
        context = star.encode(ids(limit + 1))
    star.with_config(block_size=64).encode(ids(limit + 1))
    star.generate(context, [5], max_new_tokens=1)
    # Who gives the scaling knows what it is good for.
    for name in ("rope_scaling", "rope_parameters"):
        rescaled = load(path, **{name: {"rope_type": "linear", "factor": 2.0}})
        assert len(rescaled.encode(ids(limit + 1))) == limit + 1
