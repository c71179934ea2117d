"""Prepared queries on several ranks: rank 0's arguments count, and no other rank checks its own."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from star_attention import StarLLM
from star_attention.distributed import SoloComm
from star_attention.errors import InvalidInputError
from tests.dist.pool import Pool
from tests.engines import bundled_tokenizer, text_model

TEXT = "The hill is tall. " * 20


def prepare_and_answer(comm: Any) -> tuple[list[int], str, list[int]]:
    """Answer prepared queries on a model whose own default is refused."""
    model = copy.deepcopy(text_model())
    model.generation_config.dola_layers = "high"
    star = StarLLM(model, bundled_tokenizer(), comm=comm, block_size=32)
    text, query = (TEXT, ["A dog", "Stars"]) if star.rank == 0 else (None, None)
    options: dict[str, Any] = dict(max_new_tokens=4, dola_layers=None)
    prepared = star.prepare(text, query, **(options if star.rank == 0 else {}))  # type: ignore[arg-type]
    replies = star.generate(star.encode(prepared), prepared)
    with pytest.raises(InvalidInputError) as refused:
        star.prepare(text, query)  # type: ignore[arg-type]
    after = star.generate(star.encode(text), "Rain", **options)  # type: ignore[arg-type]
    return (
        [token for reply in replies for token in reply.token_ids],
        str(refused.value),
        (after.token_ids),
    )


def test_only_rank_0_prepares(pool: Pool) -> None:
    """Forbids that another rank refuses what rank 0 does not ask for."""
    expected = prepare_and_answer(SoloComm())
    assert "dola" in expected[1]
    for answers in pool.run(prepare_and_answer, 2):
        assert answers == expected
