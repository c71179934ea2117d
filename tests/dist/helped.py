"""Tasks of ranks of which rank 0 computes layers for others; ranks import them without tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from star_attention import EncodedContext, StarLLM, phase1
from star_attention.distributed import TorchComm
from star_attention.planning import helping
from tests.dist.checks import answer, answer_with
from tests.dist.test_batch_ranks import led
from tests.dist.tp_models import star_of
from tests.engines import CONTEXT, ids, tiny


@contextmanager
def attention_counts() -> Iterator[None]:
    """Let attention take nearly all of the time, as it does where blocks are long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helping, "LINEAR_PAIRS", 1)
        yield


def answer_helped(comm: TorchComm, name: str, **settings: Any) -> dict[str, Any]:
    with attention_counts():
        return answer(comm, name, **settings)


def count_work(comm: TorchComm, **settings: Any) -> tuple[list[int], Any]:
    """Return the tokens through each layer's MLP on this rank, and the bytes of phase 1."""
    model = tiny("llama")
    star = StarLLM(model, comm=comm, **settings)
    star.encode(ids(4))  # the probe of what layers store is not counted
    tokens = [0] * model.config.num_hidden_layers

    def count(index: int, arguments: Any) -> None:
        tokens[index] += arguments[0].shape[1]

    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, index=index: count(index, args))
        for index, layer in enumerate(model.get_decoder().layers)
    ]
    try:
        with attention_counts():
            return tokens, star.encode(ids(CONTEXT)).wire
    finally:
        for hook in hooks:
            hook.remove()


def answer_sharded(comm: TorchComm, path: Path, **settings: Any) -> dict[str, Any]:
    with attention_counts():
        star = star_of(comm, path, 2, **settings)
        return answer_with(star) | dict(wire=star.encode(ids(CONTEXT)).wire)


def encode_in_a_batch(star: StarLLM) -> list[Any]:
    """Return what two contexts sent, of which a batch has encoded the first, and both shards."""
    with star.batch() as batch:
        # Rows would send something, too.
        context = batch.encode(ids(CONTEXT)).result()
        row = batch.add(context, ids(5), max_new_tokens=8, ignore_eos=True)
        canceled = batch.encode(ids(CONTEXT, seed=2))
        while not canceled.progress:
            batch.step()
        canceled.cancel()
        row.result()
    contexts = [context, star.encode(ids(CONTEXT))]
    return [[context.wire for context in contexts], shards(contexts)]


def led_helped(comm: TorchComm, session: Callable[..., Any], **arguments: Any) -> Any:
    with attention_counts():
        return led(comm, session, **arguments)


def shards(contexts: list[EncodedContext]) -> list[Any]:
    return [
        [[layer.slice(*run) for run in layer.segments] for layer in context.kv.layers]
        for context in contexts
    ]


def encode_helped(
    comm: Any, settings: dict[str, Any], book: Path | None = None, compiled: bool = False
) -> list[Any]:
    """Return this rank's keys and values of two contexts of one batch, and of an extended one."""
    settings = dict(block_size=16, tokens_per_forward=32) | settings
    star = StarLLM(tiny("llama"), comm=comm, **settings)
    with attention_counts(), pytest.MonkeyPatch.context() as patch:
        if compiled:
            patch.setattr(phase1, "_WORTH_COMPILING", 1)
        contexts = star.encode([ids(CONTEXT), ids(CONTEXT, seed=2)])
        if book is not None:
            contexts[1].save(book)
        return shards([*contexts, star.extend(contexts[0], ids(20, seed=3))])
