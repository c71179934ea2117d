"""Keys and values: the layers of a context, written once, and the tail that a query adds.

Axes: B rows, G KV heads, L context tokens, S new tokens, D head size; keys and values differ in D,
    as with MLA.
"""

from __future__ import annotations

import pytest
import torch

from star_attention.hf.text.tokens import as_tensor_ids
from star_attention.planning.segments import Segments
from star_attention.storage.kv import ContextKV, LayerKV, Pair
from star_attention.storage.tail import Tail

G, L, DK, DV = 3, 37, 8, 5
ALL = Segments.prefix(L)


def pair(tokens: int = L, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(G, tokens, DK, generator=generator), torch.randn(
        G, tokens, DV, generator=generator
    )


def written(tokens: int = L, seed: int = 0, **settings: bool) -> LayerKV:
    layer = LayerKV(Segments.prefix(tokens), **settings)
    layer.write(0, *pair(tokens, seed))
    return layer


def batch(rows: int, tokens: int, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    k_BGSD = torch.randn(rows, G, tokens, DK, generator=generator)
    return k_BGSD, torch.randn(rows, G, tokens, DV, generator=generator)


def test_a_layer_returns_what_was_written_in_pieces() -> None:
    k_GLD, v_GLD = pair()
    layer = LayerKV(ALL)
    for start, stop in [(0, 10), (10, 11), (11, 30), (30, L)]:
        layer.write(start, k_GLD[:, start:stop], v_GLD[:, start:stop])
    assert torch.equal(layer.pair()[0], k_GLD[None])
    assert torch.equal(layer.pair()[1], v_GLD[None])
    k_1GSD, v_1GSD = layer.slice(9, 31)
    assert torch.equal(k_1GSD[0], k_GLD[:, 9:31])
    assert torch.equal(v_1GSD[0], v_GLD[:, 9:31])


def test_a_layer_is_allocated_once_and_its_slices_are_views() -> None:
    """Forbids a copy of the keys per block or per token."""
    layer = written()
    before = layer.pair()[0].data_ptr()
    layer.write(5, *pair(4, seed=1))
    assert layer.pair()[0].data_ptr() == before
    assert layer.slice(0, L)[0].data_ptr() == before


def test_a_layer_copies_what_is_written() -> None:
    k_GLD, v_GLD = pair()
    layer = LayerKV(ALL)
    layer.write(0, k_GLD, v_GLD)
    k_GLD.zero_()
    assert layer.pair()[0].abs().min() > 0


def test_a_write_beyond_the_end_is_refused() -> None:
    with pytest.raises(RuntimeError):
        written().write(L - 1, *pair(2))


def test_an_empty_layer_holds_no_keys() -> None:
    layer = LayerKV(ALL)
    assert layer.is_empty
    assert layer.nbytes == 0
    with pytest.raises(AssertionError, match="holds no keys"):
        layer.pair()
    assert not written().is_empty


def test_bytes_count_the_layers_that_are_written() -> None:
    assert written().nbytes == G * L * (DK + DV) * 4
    half = LayerKV(ALL)
    half.write(0, *(t.bfloat16() for t in pair()))
    assert ContextKV([written(), LayerKV(ALL), half], ALL).nbytes == G * L * (DK + DV) * (4 + 2)


def test_a_source_is_read_once_and_only_when_needed() -> None:
    reads = []

    def source() -> Pair:
        reads.append(1)
        k_GLD, v_GLD = pair()
        return k_GLD[None], v_GLD[None]

    layer = LayerKV(ALL, source=source)
    assert not layer.is_empty
    assert reads == []
    assert torch.equal(layer.slice(3, 7)[0], pair()[0][None, :, 3:7])
    layer.pair()
    assert reads == [1]


def test_a_source_that_fails_is_read_again() -> None:
    """Forbids a damaged layer that looks empty or usable after its first error."""

    def source() -> Pair:
        raise ValueError("damaged")

    layer = LayerKV(ALL, source=source)
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            layer.pair()
    assert not layer.is_empty


def test_a_grown_context_starts_with_a_copy_of_the_old_one() -> None:
    old = ContextKV(
        [written(seed=1, expands=True), LayerKV(ALL, expands=False), written(seed=2)], ALL
    )
    new = old.copied(ALL.grow_to(L + 6), ALL)
    assert (new.tokens, [layer.tokens for layer in new.layers]) == (L + 6, [L + 6] * 3)
    assert [layer.expands for layer in new.layers] == [True, False, None]
    assert new.layers[1].is_empty
    for index in (0, 2):
        for actual, expected in zip(
            new.layers[index].slice(0, L), old.layers[index].slice(0, L), strict=True
        ):
            assert torch.equal(actual, expected)
        assert new.layers[index].pair()[0].shape == (1, G, L + 6, DK)
        assert new.layers[index].pair()[1].shape == (1, G, L + 6, DV)
    new.layers[0].pair()[0].zero_()
    assert old.layers[0].pair()[0].abs().min() > 0


def test_a_tail_returns_what_was_appended_in_order() -> None:
    parts = [batch(4, tokens, seed) for seed, tokens in enumerate([7, 1, 1, 90, 1, 300])]
    tail = Tail()
    assert tail.length == 0
    for k_BGSD, v_BGSD in parts:
        tail.append(k_BGSD, v_BGSD)
    assert tail.length == 400
    assert torch.equal(tail.pair()[0], torch.cat([k for k, _ in parts], 2))
    assert torch.equal(tail.pair()[1], torch.cat([v for _, v in parts], 2))


def test_a_tail_moves_rarely() -> None:
    """Forbids a copy of the whole tail for every token."""
    tail, addresses = Tail(), set()
    for step in range(1000):
        tail.append(*batch(1, 1, step))
        addresses.add(tail.pair()[0].data_ptr())
    assert len(addresses) < 10


def test_an_empty_tail_has_no_keys() -> None:
    with pytest.raises(AssertionError, match="tail is empty"):
        Tail().pair()


def test_a_cropped_tail_continues_where_it_was_cut() -> None:
    first, second, third = batch(2, 9, 0), batch(2, 4, 1), batch(2, 3, 2)
    tail = Tail()
    tail.append(*first)
    tail.append(*second)
    tail.crop(5)
    assert tail.length == 8
    assert torch.equal(tail.pair()[0], first[0][:, :, :8])
    tail.append(*third)
    assert torch.equal(tail.pair()[1], torch.cat([first[1][:, :, :8], third[1]], 2))


@pytest.mark.parametrize("tokens", [10, -1])
def test_only_the_tail_can_be_cropped(tokens: int) -> None:
    tail = Tail()
    tail.append(*batch(2, 9, 0))
    with pytest.raises(AssertionError, match="only the tail"):
        tail.crop(tokens)


def test_rows_of_a_tail_are_kept_repeated_and_reordered() -> None:
    k_BGSD, v_BGSD = batch(4, 6, 0)
    tail = Tail()
    # Nothing to reorder yet.
    tail.select(torch.tensor([1, 0]))
    tail.append(k_BGSD, v_BGSD)
    rows = torch.tensor([2, 2, 0, 3, 1])
    tail.select(rows)
    assert tail.length == 6
    assert torch.equal(tail.pair()[0], k_BGSD[rows])
    assert torch.equal(tail.pair()[1], v_BGSD[rows])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_ids_become_one_row_of_int64(dtype: torch.dtype) -> None:
    ids = as_tensor_ids(torch.arange(12, dtype=dtype).reshape(2, 6).t())
    assert (ids.dtype, ids.dim(), ids.is_contiguous()) == (torch.int64, 1, True)
    assert sorted(ids.tolist()) == list(range(12))
