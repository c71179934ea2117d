"""A model that has changed since is refused on all ranks, by the same error and without a token."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from star_attention import StarLLM
from star_attention.distributed import TorchComm
from star_attention.errors import ContextMismatchError
from star_attention.hf.loading.slice_groups import Groups
from tests.dist.pool import Pool
from tests.engines import CONTEXT, bundled_tokenizer, ids, text_model, tiny

OPTIONS: dict[str, Any] = dict(max_new_tokens=6, ignore_eos=True)
STORY = "The hill is tall. " * 20


def new_engine(comm: Any, is_ahead: bool) -> StarLLM:
    star = StarLLM(copy.deepcopy(text_model()), bundled_tokenizer(), comm=comm, block_size=32)
    star.runtime.comm.is_asynchronous = is_ahead
    return star


def stream(star: StarLLM, context: Any, pieces: list[str]) -> None:
    pieces.extend(star.stream(context, "A dog", **OPTIONS))


def refused(star: StarLLM, kind: str, context: Any) -> tuple[list[str], str]:
    """Ask a model that has changed; return the pieces that came, and the error."""
    pieces: list[str] = []
    calls: dict[str, Callable[[], Any]] = {
        "a query": lambda: star.generate(context, "A dog", **OPTIONS),
        "a single token": lambda: star.generate(context, "A dog", max_new_tokens=1),
        "several": lambda: star.generate(context, ["A dog", "Stars"], **OPTIONS),
        "a stream": lambda: stream(star, context, pieces),
    }
    with pytest.raises(ContextMismatchError) as caught:
        calls[kind]()
    return pieces, str(caught.value)


KINDS = ("a query", "a single token", "several", "a stream")


def ask_changed(star: StarLLM) -> list[Any]:
    """Change a weight on rank 0, ask in all ways, change it back and ask again."""
    context = star.encode(STORY)
    before = star.generate(context, "A dog", **OPTIONS).token_ids
    open_stream = star.stream(context, "Rain", **OPTIONS)
    first = next(open_stream)
    comm = star.runtime.comm
    groups = comm.transport_version
    weight = star.model.get_decoder().layers[1].mlp.up_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    seen = [refused(star, kind, context) for kind in KINDS]
    # A stream that has begun goes on.
    rest = list(open_stream)
    with torch.no_grad():
        weight.copy_(kept)
    assert comm.transport_version == groups, "ranks met again, as after a fault"
    after = star.generate(context, "A dog", **OPTIONS).token_ids
    assert after == before
    return [seen, len(first + "".join(rest)) > len(first), before]


def on_all_ranks(comm: TorchComm, is_ahead: bool) -> list[Any]:
    return ask_changed(new_engine(comm, is_ahead))


def on_rank_0_alone(comm: TorchComm, is_ahead: bool) -> list[Any] | None:
    star = new_engine(comm, is_ahead)
    if comm.rank:
        star.follow()
        return None
    result = ask_changed(star)
    star.close()
    return result


@pytest.mark.parametrize("is_ahead", [False, True])
def test_all_ranks_refuse_a_changed_model(pool: Pool, is_ahead: bool) -> None:
    """Forbids a token on ranks that do not look, and ranks that meet as after a fault."""
    first, second = pool.run(on_all_ranks, 2, is_ahead=is_ahead)
    assert second == first
    assert all(pieces == [] for pieces, _ in first[0])
    messages = [message for _, message in first[0]]
    assert len(set(messages)) == 1
    assert "the context does not fit: it differs in weights" in messages[0]
    led, nothing = pool.run(on_rank_0_alone, 2, is_ahead=is_ahead)
    assert (led, nothing) == (first, None)


def change_shape(comm: TorchComm) -> str:
    """Ask a model of which rank 0's layers have got other shapes; return the error."""
    star = new_engine(comm, is_ahead=False)
    context = star.encode(STORY)
    layer = star.model.get_decoder().layers[1].mlp.up_proj
    kept = layer.weight
    if comm.rank == 0:
        layer.weight = torch.nn.Parameter(torch.ones(3, 5))
    with pytest.raises(ContextMismatchError) as caught:
        star.generate(context, "A dog", **OPTIONS)
    layer.weight = kept
    assert star.generate(context, "A dog", **OPTIONS).token_ids
    return str(caught.value)


def test_a_forward_that_fails_by_a_change_is_refused_for_it_on_all_ranks(pool: Pool) -> None:
    for message in pool.run(change_shape, 2):
        assert "the context does not fit: it differs in weights" in message


def drop_refused(comm: TorchComm) -> bool:
    """Return True if keys and values are freed that a refused call was about."""
    star = new_engine(comm, is_ahead=False)
    context = star.encode(STORY)
    with torch.no_grad():
        star.model.get_decoder().layers[1].mlp.up_proj.weight.mul_(1.5)
    refused(star, "a query", context)
    stored = weakref.ref(context.kv)
    del context
    gc.collect()
    return stored() is None


def test_a_refused_call_keeps_nothing(pool: Pool) -> None:
    """Forbids to hold the error, and by its traceback the context, until the next one."""
    assert pool.run(drop_refused, 2) == [True, True]


def count_looks(comm: TorchComm) -> list[int]:
    """Return how often layers in slices are looked at in a call, and in one of frozen weights."""
    star = StarLLM(tiny("llama"), comm=comm, block_size=32, slice_weights=True)
    context = star.encode(ids(CONTEXT))
    star.generate(context, [5], max_new_tokens=2)
    kept = star.runtime.handle.kept_slices
    assert kept is not None
    looks: list[int] = []
    read_signs = Groups._read_signs

    def counted(groups: Groups) -> Any:
        looks.append(1)
        return read_signs(groups)

    counts = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Groups, "_read_signs", counted)
        for star.runtime.handle.is_frozen in (False, True):
            looks.clear()
            star.generate(context, [5], max_new_tokens=2)
            counts.append(len(looks))
    star.runtime.handle.is_frozen = False
    assert star.runtime.handle.kept_slices is kept
    return counts


def test_ranks_look_at_their_slices_once_in_a_call(pool: Pool) -> None:
    """Forbids a look for each request and cache: it takes as long as a layer."""
    assert pool.run(count_looks, 2) == [[1, 0]] * 2
