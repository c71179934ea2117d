"""Recorded outputs of the official implementation (`tests/golden/README.md`) are reproduced."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from star_attention import EncodedContext, StarLLM

GOLDEN = Path(__file__).parents[1] / "golden"
OFFICIAL = 1e-4
"""Both sides use transformers' rotary angles."""
IDEAL = 1e-3
"""The float64 oracle has more precise rotary angles."""


@functools.cache
def manifest(checkpoint: str) -> dict[str, dict[str, Any]]:
    cases = json.loads((GOLDEN / "cases" / f"{checkpoint}.json").read_text())["cases"]
    return {case["name"]: case for case in cases}


@functools.cache
def tensors(file: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "cases" / file)


@functools.cache
def star_with(checkpoint: str, **settings: Any) -> StarLLM:
    folder = GOLDEN / "checkpoints" / checkpoint
    return StarLLM.from_pretrained(folder, dtype="float32", device="cpu", **settings)


def engine(case: dict[str, Any], **settings: Any) -> StarLLM:
    # Ring attention is exact.
    if case["mode"] != "star":
        return star_with(case["checkpoint"], method="dense", **settings)
    anchor = case["anchor_block_size"]
    anchor_size = None if anchor == -1 else anchor
    return star_with(
        case["checkpoint"], block_size=case["block_size"], anchor_size=anchor_size, **settings
    )


CASES = [case for checkpoint in "AB" for case in manifest(checkpoint).values()]
each_case = pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])


def affected(case: dict[str, Any]) -> bool:
    """True for several ranks and query tokens, for which the official phase 2 hides keys.

    The float64 oracle gives the right values there.
    """
    return case["mode"] != "dense" and case["world_size"] > 1 and case["query_len"] > 1


def expected_logits(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The expected logits of query and steps, and the tolerance."""
    name, checkpoint = case["name"], case["checkpoint"]
    if affected(case):
        ideal = tensors(f"{checkpoint}.oracle.safetensors")
        return ideal[f"{name}/ideal_query_logits"], ideal[f"{name}/ideal_step_logits"], IDEAL
    official = tensors(f"{checkpoint}.safetensors")
    return official[f"{name}/query_logits"], official[f"{name}/step_logits"], OFFICIAL


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def assert_official_kv(context: EncodedContext, case: dict[str, Any]) -> None:
    official = tensors(f"{case['checkpoint']}.safetensors")
    for index, layer in enumerate(context.kv.layers):
        for tensor_1GLD, which in zip(layer.pair(), "kv", strict=True):
            close(tensor_1GLD[0], official[f"{case['name']}/phase1/{index}.{which}"], OFFICIAL)


@pytest.mark.parametrize("tokens_per_forward", [8192, 70])
@each_case
def test_case(case: dict[str, Any], tokens_per_forward: int) -> None:
    star = engine(case, tokens_per_forward=tokens_per_forward)

    context = star.encode(case["context_ids"])
    query_QV = star.logits(context, case["query_ids"])
    reply = star.generate(
        context, case["query_ids"], max_new_tokens=12, ignore_eos=True, return_logits=True
    )

    assert_official_kv(context, case)
    assert reply.token_ids == case["generated_ids"]
    expected_query_QV, expected_steps_TV, tolerance = expected_logits(case)
    close(query_QV, expected_query_QV, tolerance)
    close(reply.logits, expected_steps_TV, tolerance)


def test_the_cases_are_complete() -> None:
    """Both checkpoints, both kinds of logits, short and long queries, various anchors."""
    assert len(CASES) == 13
    assert sum(affected(case) for case in CASES) == 6
    assert {case["query_len"] for case in CASES} == {1, 7, 20}
    assert sum(case["anchor_block_size"] > 0 for case in CASES) == 4


@pytest.mark.parametrize(
    "case", [c for c in CASES if c["mode"] == "star"], ids=lambda case: case["name"]
)
def test_a_small_mistake_shows(case: dict[str, Any]) -> None:
    """An anchor one token short moves the logits by at least a hundred times the tolerance."""
    anchor_size = case["anchor_used"] - 1
    star = star_with(case["checkpoint"], block_size=case["block_size"], anchor_size=anchor_size)
    _, expected_steps_TV, tolerance = expected_logits(case)

    context = star.encode(case["context_ids"])
    sequence = case["query_ids"] + case["generated_ids"][:-1]
    steps_TV = star.logits(context, sequence)[case["query_len"] - 1 :]

    assert (steps_TV - expected_steps_TV).abs().max() > 100 * tolerance
