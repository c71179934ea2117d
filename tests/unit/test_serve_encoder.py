"""A server's store over a real engine: hits, files, restarts and new versions answer alike."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from star_attention import EncodedContext, StarLLM
from star_attention.errors import CorruptContextError
from star_attention.generation.batching.batch import Batch
from star_attention.serve.contexts.encoder import BatchEncoder, engine_identity
from star_attention.serve.contexts.folder import StoreFolder
from star_attention.serve.contexts.lease import Lease
from star_attention.serve.contexts.store import ContextStore
from star_attention.serve.contexts.table import StoreSettings
from tests.engines import assert_same_kv, engine, ids, text_model
from tests.stores import wanted

QUERY = ids(6, seed=9)


class Server:
    """The engine's thread, without a thread: an engine, its batch and a store."""

    def __init__(self, star: StarLLM, folder: Path | None = None, tokens: int = 10_000) -> None:
        identity = engine_identity(star)
        self.star, self.batch = star, star.batch()
        self.store = ContextStore(
            BatchEncoder(star, lambda: self.batch),
            StoreSettings(device_bytes=star.context_bytes(tokens)),
            folder=None if folder is None else StoreFolder(folder, identity),
            identity=identity,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.batch.close()
        self.store.close()

    def context(self, lease: Lease) -> EncodedContext:
        while not lease.ready.done():
            self.store.step()
            self.batch.step()
        context: EncodedContext = lease.ready.result()
        return context

    def ask(self, tokens: list[int]) -> tuple[str, list[int]]:
        """Return what was found, and the answer."""
        with self.store.acquire(wanted(*tokens)) as lease:
            row = self.batch.add(self.context(lease), QUERY, max_new_tokens=8)
            return str(lease.outcome), row.result().token_ids

    def count(self, name: str) -> int:
        counts, _, _ = self.store.counts()
        value: Any = getattr(counts, name)
        return value if isinstance(value, int) else value["done"]


def star(**settings: Any) -> StarLLM:
    return engine("llama", block_size=16, anchor_size=8, tokens_per_forward=16, **settings)


def expected(star: StarLLM, tokens: list[int]) -> list[int]:
    answer: list[int] = star.generate(star.encode(tokens), QUERY, max_new_tokens=8).token_ids
    return answer


def test_hits_and_misses_answer_like_generate(tmp_path: Path) -> None:
    own = star()
    first, second = ids(70), ids(45, seed=2)
    with Server(own, tmp_path / "store", tokens=80) as server:
        for tokens in (first, second):
            assert server.ask(tokens) == ("miss", expected(own, tokens))
        # 115 tokens take turns in the room of 80.
        for _ in range(2):
            for tokens in (first, second):
                _, answer = server.ask(tokens)
                assert answer == expected(own, tokens)
    with Server(own, tmp_path / "store") as server:
        assert server.ask(first) == ("hit", expected(own, first))
        assert server.ask(second) == ("hit", expected(own, second))
        assert (server.count("encodes"), server.count("reloads")) == (0, 2)


def test_files_of_keys_are_for_this_user_alone(tmp_path: Path) -> None:
    with Server(star(), tmp_path / "store") as server:
        server.store.create(wanted(*ids(40)))
        while server.store.step():
            server.batch.step()
    (path,) = (tmp_path / "store").rglob("*.star")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", [0.5, 0.9, "cut"])
def test_damage_costs_an_encode_and_no_answer(tmp_path: Path, place: float | str) -> None:
    """Forbids damage that shows in the middle of an answer, where files are read layer by layer."""
    own, tokens = star(), ids(60)
    with Server(own, tmp_path / "store") as server:
        server.ask(tokens)
        server.ask(tokens)
    (path,) = (tmp_path / "store").rglob("*.star")
    data = bytearray(path.read_bytes())
    if isinstance(place, float):
        data[int(place * len(data))] ^= 1
    else:
        del data[-40:]
    path.write_bytes(data)
    with Server(own, tmp_path / "store") as server:
        assert server.ask(tokens) == ("hit", expected(own, tokens))
        assert server.count("encodes") == 1
        assert server.ask(tokens) == ("hit", expected(own, tokens))
    assert len(list((tmp_path / "store" / "aside").glob("*.star"))) == 1
    with Server(own, tmp_path / "store") as server:
        assert server.ask(tokens) == ("hit", expected(own, tokens))
        assert server.count("encodes") == 0


def test_keys_of_other_tokens_are_not_taken(tmp_path: Path) -> None:
    own = star()
    own.encode(ids(40)).save(tmp_path / "other.star")
    encoder = BatchEncoder(own, own.batch)
    with pytest.raises(CorruptContextError, match="40 other tokens than the 40 of its record"):
        encoder.load(tmp_path / "other.star", wanted(*ids(40, seed=2)).content.ids)


def test_a_new_version_copies_what_is_the_same() -> None:
    own, tokens = star(), ids(100)
    changed = [*tokens[:40], *ids(3, seed=5), *tokens[43:]]
    with Server(own) as server:
        server.ask(tokens)
        with server.store.acquire(wanted(*changed)) as lease:
            context = server.context(lease)
        assert (lease.outcome, lease.reason) == ("miss", "input_changed")
        assert_same_kv(context, own.encode(changed), tolerance=1e-5)
        assert context.reused_tokens == 84
        assert server.count("reused_tokens") == 84
        assert server.ask(changed) == ("hit", expected(own, changed))


@pytest.mark.parametrize(
    "settings",
    [{"block_size": None, "anchor_size": None}, {"method": "streaming_llm"}],
    ids=["sizes by length", "a method without reuse"],
)
def test_nothing_is_copied_where_the_result_would_depend_on_it(settings: dict[str, Any]) -> None:
    own, tokens = star(**{}).with_config(**settings), ids(96)
    with Server(own) as server:
        server.ask(tokens)
        with server.store.acquire(wanted(*tokens, *ids(64, seed=4))) as lease:
            context = server.context(lease)
        assert context.reused_tokens == 0
        assert context.plan == own.encode([*tokens, *ids(64, seed=4)]).plan


def test_rows_go_on_while_a_context_is_encoded() -> None:
    own, tokens = star(), ids(200)
    with Server(own) as server:
        short = server.store.acquire(wanted(*ids(30, seed=3)))
        context = server.context(short)
        row = server.batch.add(context, QUERY, max_new_tokens=100, ignore_eos=True)
        lease = server.store.acquire(wanted(*tokens))
        seen = []
        while not lease.ready.done():
            server.store.step()
            server.batch.step()
            seen.append((lease.view().done, len(row.token_ids)))
        assert len(row.token_ids) > 5
        assert {done for done, _ in seen} >= {16, 64, 128, 200}
        lease.release()


def test_rows_go_on_while_a_context_is_read(tmp_path: Path) -> None:
    """Forbids reading a large file in one piece, while everybody else waits."""
    own, tokens = star(), ids(60)
    with Server(own, tmp_path / "store") as server:
        server.ask(tokens)
        server.ask(tokens)
    with Server(own, tmp_path / "store") as server:
        short = server.store.acquire(wanted(*ids(30, seed=3)))
        row = server.batch.add(server.context(short), QUERY, max_new_tokens=50, ignore_eos=True)
        before = len(row.token_ids)
        lease = server.store.acquire(wanted(*tokens))
        server.context(lease)
        # The model has layers, and each is read by itself.
        assert len(row.token_ids) - before >= len(server.context(lease).kv.layers)
        assert server.count("reloads") == 1
        lease.release()


def test_an_encode_that_is_deleted_stops() -> None:
    own = star()
    with Server(own) as server:
        view, _ = server.store.create(wanted(*ids(200)))
        for _ in range(4):
            server.store.step()
            server.batch.step()
        server.store.delete("ann", view.id)
        server.store.step()
        assert not server.store.step()
        assert server.count("encodes") == 0
        assert server.store.counts()[1]["device"] == (0, 0)


def test_an_identity_is_of_model_tokenizer_and_settings() -> None:
    base = engine_identity(star())
    assert engine_identity(star()) == base
    for settings in ({"kv_device": "cpu"}, {"balance_ranks": False}):
        assert engine_identity(star(**settings)) == base
    for settings in ({"lookback": 1}, {"kv_dtype": "fp8"}, {"reserve_tokens": 7}):
        assert engine_identity(star(**settings)) != base
    assert engine_identity(engine("mistral", block_size=16, anchor_size=8)) != base
    assert engine_identity(StarLLM(text_model(), block_size=16, anchor_size=8)) != base


def test_the_batch_may_be_a_new_one() -> None:
    """The engine's thread makes a new batch after an error that is of no single row."""
    own, tokens = star(), ids(50)
    with Server(own) as server:
        old: Batch = server.batch
        server.batch = own.batch()
        old.close()
        assert server.ask(tokens) == ("miss", expected(own, tokens))
