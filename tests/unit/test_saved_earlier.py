"""Contexts that earlier versions saved (`tests/golden/saved`) load, and answer as they did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from star_attention import StarLLM

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "saved" / "answers.json").read_text())[
    "cases"
]


@pytest.mark.parametrize("name", CASES)
def test_a_context_of_an_earlier_version_loads_and_answers_as_before(name: str) -> None:
    """Forbids a change of the file format, or of the identity in it, that locks out saved files."""
    case = CASES[name]
    folder = GOLDEN / "checkpoints" / "A"
    star = StarLLM.from_pretrained(folder, dtype="float32", device="cpu", **case["settings"])
    context = star.load_context(GOLDEN / "saved" / f"{name}.star")
    answer = star.generate(context, case["query_ids"], max_new_tokens=12, ignore_eos=True)
    assert answer.token_ids == case["token_ids"]
