"""A changed model is refused while the device reads the query, whatever of it has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.errors import ContextMismatchError
from tests.gpu import ranks

pytestmark = pytest.mark.gpu
MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
LENGTH: dict[str, Any] = dict(ignore_eos=True, max_new_tokens=8)


def ids(tokens: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 4096, (tokens,), generator=generator).tolist()


@torch.no_grad()
def in_place(weight: Any) -> None:
    weight[0, 0] += 1


def through_data(weight: Any) -> None:
    """Seen by nothing but the elements that are read on the device."""
    weight.data[0, 0] += 1


def move(weight: Any) -> None:
    weight.data = weight.data * 2


@pytest.mark.parametrize("change", [in_place, through_data, move])
@pytest.mark.parametrize("compile", [True, False])
def test_changes_are_refused(change: Callable[[Any], None], compile: bool) -> None:
    star = StarLLM.from_pretrained(
        MODEL, dtype="float32", device="cuda", compile=compile, block_size=1024
    )
    context = star.encode(ids(4000))
    before = star.generate(context, ids(9), **LENGTH)
    weight = star.model.get_output_embeddings().weight
    kept = weight.detach().clone()
    change(weight)
    for ask in (
        lambda: star.generate(context, ids(9), **LENGTH),
        lambda: star.generate(context, [ids(9), ids(7)], **LENGTH),
        lambda: next(star.stream(context, ids(9), **LENGTH)),
    ):
        with pytest.raises(ContextMismatchError, match="differs in weights"):
            ask()
    with torch.no_grad():
        weight.copy_(kept)
    assert star.generate(context, ids(9), **LENGTH).token_ids == before.token_ids


def refuse(comm: Any, device: str, settings: dict[str, Any]) -> dict[str, Any]:
    star = StarLLM.from_pretrained(
        MODEL, dtype="float32", device=device, comm=comm, compile=True, block_size=1024, **settings
    )
    context = star.encode(ids(4000))
    before = star.generate(context, ids(9), **LENGTH).token_ids
    weight = star.model.get_output_embeddings().weight
    kept, groups = weight.detach().clone(), star.runtime.comm.transport_version
    in_place(weight)
    pieces: list[str] = []
    messages = []
    for ask in (
        lambda: star.generate(context, ids(9), **LENGTH),
        lambda: star.generate(context, ids(9), max_new_tokens=1),
        lambda: pieces.extend(star.stream(context, ids(9), **LENGTH)),
    ):
        with pytest.raises(ContextMismatchError) as caught:
            ask()
        messages.append(str(caught.value))
    with torch.no_grad():
        weight.copy_(kept)
    after = star.generate(context, ids(9), **LENGTH).token_ids
    assert star.runtime.comm.transport_version == groups, "ranks met again, as after a fault"
    return dict(messages=messages, pieces=pieces, before=before, after=after)


@pytest.mark.parametrize("settings", [{}, dict(slice_weights=True)], ids=str)
def test_changes_are_refused_on_two_ranks(settings: dict[str, Any]) -> None:
    first, second = ranks.run(refuse, 2, settings=settings)
    assert first == second
    assert first["pieces"] == []
    assert first["before"] == first["after"]
    assert all("differs in weights" in message for message in first["messages"])
