"""Sizes, settings and environments that cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.errors import (
    InvalidInputError,
    SizeError,
    UnknownOptionError,
)
from tests.engines import BUNDLED, engine, ids
from tests.refusals import refused

NOT_A_SIZE = "is not a number of tokens; write 4096, '4k', '128k' or '1m'"
BAD_SETTINGS = [
    (dict(block_size="4x"), SizeError, ["block_size '4x'", NOT_A_SIZE]),
    (dict(block_size=""), SizeError, ["block_size ''", NOT_A_SIZE]),
    (dict(block_size="1.0001k"), SizeError, ["block_size '1.0001k'", NOT_A_SIZE]),
    (dict(block_size=4096.0), SizeError, ["block_size 4096.0", NOT_A_SIZE]),
    (dict(block_size=True), SizeError, ["block_size True", NOT_A_SIZE]),
    (dict(block_size=0), SizeError, ["block_size 0 is below 1", "give a positive number"]),
    (dict(block_size="-4k"), SizeError, ["block_size -4096 is below 1", "give a positive number"]),
    (dict(anchor_size="x"), SizeError, ["anchor_size 'x'", NOT_A_SIZE]),
    (dict(anchor_size=-1), SizeError, ["anchor_size -1 is negative", "give 0 (no anchor)"]),
    (
        dict(block_size=10, anchor_size=11),
        SizeError,
        ["anchor_size 11 is above block_size 10", "at most 10"],
    ),
    (dict(tokens_per_forward="q"), SizeError, ["tokens_per_forward 'q'", NOT_A_SIZE]),
    (
        dict(tokens_per_forward=0),
        SizeError,
        ["tokens_per_forward 0 is below 1", "give a positive number"],
    ),
    (dict(reserve_tokens=0), SizeError, ["reserve_tokens 0 is below 1", "at least one token"]),
    (dict(reserve_tokens=None), SizeError, ["reserve_tokens None", NOT_A_SIZE]),
    (
        dict(method="stare"),
        InvalidInputError,
        ["method 'stare' is unknown; choose one of star, dense"],
    ),
    (dict(method=["star"]), InvalidInputError, ["method ['star'] is unknown"]),
    (
        dict(comm="nccl"),
        InvalidInputError,
        ["comm 'nccl' is unknown; use None, 'solo' for one process, or a TorchComm"],
    ),
]


@pytest.mark.parametrize(
    ("settings", "kind", "fragments"), BAD_SETTINGS, ids=lambda v: str(v) if type(v) is dict else ""
)
def test_bad_settings(
    settings: dict[str, Any], kind: type[Exception], fragments: list[str], tmp_path: Path
) -> None:
    refused(kind, *fragments, call=lambda: engine("llama", **settings))
    # Before anything is loaded: there is no such folder.
    refused(kind, *fragments, call=lambda: StarLLM.from_pretrained(tmp_path / "none", **settings))


def test_an_anchor_above_the_default_block() -> None:
    """The block size is known only with the context."""
    star = engine("llama", anchor_size=2000)
    refused(
        SizeError, "anchor_size 2000 is above block_size 1024", call=lambda: star.encode(ids(30))
    )


def test_unknown_settings_are_type_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="blocksize"):
        engine("llama", blocksize=5)
    with pytest.raises(TypeError, match="blocksize"):
        StarLLM.from_pretrained(tmp_path, blocksize=5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch_dtype", "does not take 'torch_dtype'; use dtype="),
        (
            "device_map",
            "does not take 'device_map'; use device=, or to spread the layers model_kwargs=",
        ),
        ("tokenizer", "it is loaded with the model; to use another, set the engine's tokenizer"),
        ("blocksize", "does not take 'blocksize'; did you mean 'block_size'?"),
        ("use_safetensors", "give arguments of transformers as model_kwargs="),
        ("unknown", "give arguments of transformers as model_kwargs="),
    ],
)
def test_keywords_that_from_pretrained_does_not_take(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError) as caught:
        StarLLM.from_pretrained(tmp_path, **{name: 1})
    assert isinstance(caught.value, UnknownOptionError)
    assert message in str(caught.value)


def test_repr_names_model_and_sizes() -> None:
    assert repr(engine("llama")) == "StarLLM(llama, star, cpu, float32)"
    sized = engine("llama", block_size="4k", anchor_size=12, method="dense")
    assert repr(sized) == "StarLLM(llama, dense, block_size=4096, anchor_size=12, cpu, float32)"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "the environment lacks RANK, MASTER_ADDR, MASTER_PORT"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            "the environment lacks MASTER_PORT",
        ),
        (
            {"WORLD_SIZE": "many", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "WORLD_SIZE 'many' is not a number",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "RANK 2 is not below WORLD_SIZE 2",
        ),
    ],
)
def test_an_incomplete_environment_of_several_processes(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refused(InvalidInputError, message, call=lambda: engine("llama"))
    refused(
        InvalidInputError, message, "comm='solo'", call=lambda: StarLLM.from_pretrained(BUNDLED)
    )
    assert engine("llama", comm="solo").config.method == "star"


@pytest.mark.parametrize("world", ["1", ""])
def test_one_process_needs_no_environment(world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert engine("llama").config.method == "star"
