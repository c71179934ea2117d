"""Training batches: rows of documents in the formats of the evaluations.

A document is what a model sees in an evaluation, `<bos>{context}{query}{answer prefix}`, followed
by the answer and `<eos>`, and by more questions on the same context with their answers.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_attention.evals.suites import babilong
from training.babilong_documents import story_document
from training.documents import Document, Maker
from training.infinitebench_documents import pair_document, search_document
from training.ruler_documents import (
    chain_document,
    common_word_document,
    frequent_word_document,
    needle_document,
    secret_document,
)
from training.text import Encoder, load_tokenizer

BOS = ("document", "row")
"""Values of `Maker.bos`."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of documents.

    Attributes:
        share: Relative share of all documents, in percent if all kinds fit.
        least: Tokens below which it is not made.
        make: Returns a document of about this many tokens.
    """

    share: float
    least: int
    make: Callable[[Maker, int], Document]


KINDS = {
    "needles": Kind(share=33, least=0, make=needle_document),
    "secrets": Kind(share=6, least=0, make=secret_document),
    "chains": Kind(share=11, least=0, make=chain_document),
    "common": Kind(share=8, least=1000, make=common_word_document),
    "frequent": Kind(share=6, least=256, make=frequent_word_document),
    "stories": Kind(share=30, least=400, make=story_document),
    "searches": Kind(share=3, least=150, make=search_document),
    "pairs": Kind(share=3, least=400, make=pair_document),
}

TASKS = (
    "needles",
    "multivalue",
    "multiquery",
    "secrets",
    "vt",
    "cwe",
    "fwe",
    *babilong.SUITE.tasks,
    "passkey",
    "number_string",
    "math_find",
    "kv_retrieval",
)
"""Tasks of answers, in the order of their values in a mask."""

ANSWER = 2
"""A row's mask is 0 for filler and `<bos>`, 1 for text, `ANSWER + i` for answers of `TASKS[i]`."""

_TRIES = 8
"""Documents to try for a place in a row before it stays empty.

Some kinds now and then come out longer than their place, and a document that is cut off would lose
its questions.
"""


def make_document(maker: Maker, room: int) -> Document:
    """Make a document of a random kind, of about `room` tokens."""
    kinds = [kind for kind in KINDS.values() if room >= kind.least]
    (kind,) = maker.rng.choices(kinds, [kind.share for kind in kinds])
    return kind.make(maker, room)


def encode_document(document: Document, encode: Encoder) -> tuple[list[int], list[int]]:
    """Return the ids and the mask of a document; the `<eos>` after an answer belongs to it."""
    before, hint, after = (
        document.context.partition(document.hint) if document.hint else (document.context, "", "")
    )
    ids, mask = [encode.bos], [0]

    def append(text: str, value: int, *, end: bool = False) -> None:
        new = [*encode(text), *([encode.eos] if end else [])]
        ids.extend(new)
        mask.extend([value] * len(new))

    first = TASKS.index(document.questions[0].task) + ANSWER
    for text, value in ((before, 1), (hint, first), (after, 1)):
        append(text, value)
    for question in document.questions:
        append(question.text, 1)
        append(question.answer, TASKS.index(question.task) + ANSWER, end=True)
    return ids, mask


def row(length: int, maker: Maker) -> tuple[list[int], list[int]]:
    """Return ids and mask of a row: whole documents, and filler up to `length` tokens.

    Half of the rows are a single document.
    """
    ids: list[int] = []
    mask: list[int] = []
    least = min(192, length)
    while length - len(ids) >= least:
        left = length - len(ids)
        room = (
            left if left < 2 * least or maker.rng.random() < 0.5 else maker.rng.randint(least, left)
        )
        # One token of the room is `<bos>`.
        tries = (
            encode_document(make_document(maker, room - 1), maker.encode) for _ in range(_TRIES)
        )
        new_ids, new_mask = next((pair for pair in tries if len(pair[0]) <= left), ([], []))
        if not new_ids:
            break
        if ids and maker.bos == "row":
            new_ids, new_mask = new_ids[1:], new_mask[1:]
        ids += new_ids
        mask += new_mask
    filler = length - len(ids)
    return ids + [0] * filler, mask + [0] * filler


def batch(rows: int, length: int, maker: Maker) -> tuple[Tensor, Tensor]:
    """Return ids in int16 and mask in uint8, each `[rows, length]`."""
    pairs = [row(length, maker) for _ in range(rows)]
    return (
        torch.tensor([ids for ids, _ in pairs], dtype=torch.int16),
        torch.tensor([mask for _, mask in pairs], dtype=torch.uint8),
    )


def held_out(rows: int, length: int, seed: int, tokenizer: Path, bos: str) -> tuple[Tensor, Tensor]:
    """Return a batch of rows with words that training does not see."""
    maker = Maker(
        rng=random.Random(f"held out {seed} {length}"),
        encode=Encoder(load_tokenizer(tokenizer)),
        part="eval",
        bos=bos,
    )
    return batch(rows, length, maker)


Shape = tuple[int, int, int]
"""Step, rows, length."""


class Feed:
    """Batches of all steps in order, made by worker processes.

    The batches do not depend on the number of workers. Use as a context manager, which starts and
    ends the workers.

    Args:
        shapes: Shapes of the steps.
        seed: Seed of the training; each step derives its own from it.
        tokenizer: Folder of the tokenizer.
        workers: Number of processes.
        bos: One of `BOS`.
    """

    def __init__(
        self, shapes: list[Shape], seed: int, tokenizer: Path, *, workers: int, bos: str
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._queues = [context.Queue(maxsize=4) for _ in range(workers)]
        self._steps = len(shapes)
        self._processes = [
            context.Process(
                target=_work,
                args=(queue, shapes[number::workers], seed, tokenizer, bos),
                daemon=True,
            )
            for number, queue in enumerate(self._queues)
        ]

    def __enter__(self) -> Feed:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self._steps):
            ids, mask = self._queues[step % len(self._queues)].get(timeout=600)
            yield torch.from_numpy(ids), torch.from_numpy(mask)


def _work(queue: Any, shapes: list[Shape], seed: int, tokenizer: Path, bos: str) -> None:
    torch.set_num_threads(1)
    encode = Encoder(load_tokenizer(tokenizer))
    for step, rows, length in shapes:
        maker = Maker(rng=random.Random(f"train {seed} {step}"), encode=encode, bos=bos)
        ids, mask = batch(rows, length, maker)
        queue.put((ids.numpy(), mask.numpy()))
