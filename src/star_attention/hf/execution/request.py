"""A request of phase 2: queries on one context, and the forwards that answer them.

Axes: B queries (padded on the left to one length Q), R rows = B x answers each, S tokens of a
forward, L context tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from star_attention.distributed.comm import Comm
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.latent import Latents, usable
from star_attention.hf.cache.mirrored import MirroredCache
from star_attention.hf.execution import slices
from star_attention.hf.execution.graphs import Graphs
from star_attention.hf.execution.handle import ModelHandle
from star_attention.hf.execution.timing import Lap
from star_attention.planning.plan import BlockPlan
from star_attention.storage.kept import KeptTail
from star_attention.storage.kv import ContextKV
from star_attention.storage.transfers import send, sent

_MOST_ROOM = 1024
"""Most tokens of an answer for which the copy of a kept tail has room: growing copies it again."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What rank 0 tells the other ranks of a request, once at its start.

    Attributes:
        queries: token ids of each query.
        kept_tokens: tokens at the beginning of a single query whose keys and values were kept of
            an earlier answer.
        padded_tokens: length to which they are padded.
        answers_per_query: answers to each query.
        max_new_tokens: most tokens of an answer.
        tokens_per_forward: most query tokens of one forward, over all queries.
        is_ahead: True to issue the forward of a step's tokens before Python looks at them, where
            the device works by itself.
        sliced: parts of the model whose weights are multiplied in slices.
        second_look: share of the context's tokens that are computed again for the query.
        keeps: True for answers whose keys and values are kept: with `is_ahead` the forward of the
            last token is run, too, so that the next turn need not.
    """

    queries: list[list[int]]
    kept_tokens: int
    padded_tokens: int
    answers_per_query: int
    max_new_tokens: int
    tokens_per_forward: int
    is_ahead: bool
    sliced: tuple[str, ...]
    second_look: float
    keeps: bool = False


@dataclass(kw_only=True)
class Request:
    """Queries on one context, ready to run.

    Attributes:
        handle: the model.
        context_ids_L: token ids of the whole context, on CPU.
        plan: blocks and anchor of the context.
        shard: this rank's keys and values of the context.
        rope_length: tokens that length-dependent rotary frequencies are computed for, or None.
        queries: token ids of each query.
        tokens_per_forward: most query tokens of one forward, over all queries.
        comm: the ranks.
        sliced: parts of the model whose weights are multiplied in slices (`hf.execution.slices`).
        generation_kwargs: arguments of `GenerationConfig`; they override the model's defaults.
        seed: seed of sampling for each query, or None for torch's global generator.
        logits_processor, stopping_criteria: transformers' lists.
        stop_after: makes a stopping criterion for prompts of a given length.
        second_look: share of the context's tokens that are computed again for the query before it
            is answered (`hf.execution.second_look`).
        looked: time that this took, once it is done.
        kept: keys and values that an earlier answer of a conversation left; None for none.
        kept_tokens: tokens at the beginning of the only query that these are of.
        has_looked: True if the call has made a `look_at` already.
        looks_late: True to look at graphs before the first forward, which a stream runs later.
    """

    handle: ModelHandle
    context_ids_L: Tensor
    plan: BlockPlan
    shard: ContextKV
    rope_length: int | None
    queries: list[list[int]]
    tokens_per_forward: int
    comm: Comm
    sliced: tuple[str, ...] = ()
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    stop_after: Callable[[int], StoppingCriteria] | None = None
    second_look: float = 0.0
    looked: Lap | None = None
    kept: KeptTail | None = None
    kept_tokens: int = 0
    has_looked: bool = False
    looks_late: bool = False

    @property
    def query_tokens(self) -> int:
        """Length of the longest query."""
        return max(len(query) for query in self.queries)

    @property
    def prompt_tokens(self) -> int:
        """Tokens before an answer in the input of transformers' own loops."""
        return self.query_tokens + (len(self.context_ids_L) if self.rope_length is None else 0)

    def padding(self, tokens: int | None = None) -> list[int]:
        """Return the left padding of each query to a number of tokens, or to the longest query."""
        return [(tokens or self.query_tokens) - len(query) for query in self.queries]

    def program(self, answers_per_query: int, *, least_tokens: int = 1) -> Program:
        """Return what the other ranks need to know, as rank 0 decides.

        Args:
            answers_per_query: answers to each query.
            least_tokens: read so many tokens of a query at least, if a graph can: the graph of
                fewer may be used for nothing else, and capturing it takes seconds.
        """
        graphs, kept_tokens = self.graphs, self.kept_tokens
        new_tokens, bucket = self.query_tokens - kept_tokens, None
        if graphs is not None:
            bucket = graphs.bucket(len(self.queries), max(new_tokens, least_tokens))
            bucket = bucket or graphs.bucket(len(self.queries), new_tokens)
        if bucket is not None and kept_tokens:
            # Padding has no place between two tokens: a few of those kept are computed again.
            kept_tokens = max(0, self.query_tokens - bucket)
        return Program(
            queries=self.queries,
            kept_tokens=kept_tokens,
            padded_tokens=max(bucket or 0, self.query_tokens),
            answers_per_query=answers_per_query,
            max_new_tokens=int(self.generation_kwargs["max_new_tokens"]),
            tokens_per_forward=self.tokens_per_forward,
            is_ahead=graphs is not None or self.comm.is_asynchronous,
            sliced=self.sliced,
            second_look=self.second_look,
        )

    def cache(self, query_tokens: int, kept_tokens: int = 0, answer_tokens: int = 0) -> AnswerCache:
        """Return a new cache for queries padded to a number of tokens.

        It begins with the kept keys and values of `kept_tokens` tokens, and has room for the query
        and, up to a limit, for an answer of `answer_tokens`.
        """
        cache = self.cache_for(self.padding(query_tokens))
        if kept_tokens:
            assert self.kept is not None, "there are kept tokens"
            room = query_tokens - kept_tokens + min(answer_tokens, _MOST_ROOM)
            self.kept.copy_to(cache.tails, kept_tokens, room)
        return cache

    def cache_for(self, padding: list[int]) -> AnswerCache:
        """Return a new cache for queries with this left padding, in tokens."""
        return AnswerCache(*self._cache_arguments(padding))

    def mirrored_cache(self) -> AnswerCache:
        """Return rank 0's new cache for loops that run there alone."""
        cache_type = MirroredCache if self.comm.size > 1 else AnswerCache
        return cache_type(*self._cache_arguments(self.padding()))

    def _cache_arguments(self, padding: list[int]) -> Any:
        sliced = slices.of(self.handle, self.sliced, self.comm, looked=self.has_looked)
        return (
            self.shard,
            self.handle.windows,
            len(self.context_ids_L),
            padding,
            self.comm,
            sliced,
            latents_of(self.handle, self.shard),
        )

    def padded(self, padding: list[int]) -> Tensor:
        """Return the queries padded on the left, `[B, Q]` in host memory.

        Attention never sees the filler, but penalties do, so it is a token that every row holds.
        """
        fill = int(self.context_ids_L[0]) if any(padding) else 0
        rows = [[fill] * gap + query for gap, query in zip(padding, self.queries, strict=True)]
        return torch.tensor(rows, dtype=torch.int64, device="cpu")

    def forwards(self, cache: AnswerCache) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and positions of the queries, padded as the cache expects them."""
        return self.query_forwards(cache.row_padding(len(self.queries)), cache.tail_tokens)

    def query_forwards(self, padding: list[int], first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and positions of the padded queries, `[B, S]` each, a pair for each forward.

        They begin with the queries' token `first`.
        """
        ids_BQ = self.padded(padding)
        at_Q = torch.arange(ids_BQ.shape[1], device="cpu") + len(self.context_ids_L)
        # Padding has no position of its own; nothing sees it, so 0 will do.
        positions_BQ = (at_Q - torch.tensor(padding, device="cpu")[:, None]).clamp_(min=0)
        # By one copy: the first token waits for each.
        ids_BQ, positions_BQ = sent(torch.stack([ids_BQ, positions_BQ]), self.handle.device)
        columns = max(1, self.tokens_per_forward // ids_BQ.shape[0])
        for start in range(first, ids_BQ.shape[1], columns):
            part = slice(start, start + columns)
            yield ids_BQ[:, part], positions_BQ[:, part]

    @cached_property
    def graphs(self) -> Graphs | None:
        """CUDA graphs that serve this request's forwards, or None."""
        graphs = self.handle.graphs
        if graphs is None:
            return None
        if not self.has_looked:
            graphs.look()
        return graphs if graphs.serve(self.shard, self.comm) else None

    @property
    def is_ready(self) -> bool:
        """False if graphs are to be captured of the model as it is now: it may have changed."""
        return self.graphs is None or bool(self.graphs.captured)

    def forward(self, ids_RQ: Tensor, positions_RQ: Tensor, cache: AnswerCache) -> Tensor | None:
        """Run a forward of new tokens, by a CUDA graph if one fits.

        Returns:
            Logits of each row's last token, fp32 `[R, V]`; None on ranks that need not compute any.
        """
        leads = self.comm.rank == 0
        if self.graphs is not None:
            logits = leads or has_sliced_head(cache)
            logits_RV = self.graphs.run(cache, ids_RQ, positions_RQ, logits=logits)
            if logits_RV is not None:
                return logits_RV if leads else None
        if leads:
            return self.handle.logits(ids_RQ, positions_RQ, cache, self.rope_length)[:, -1].float()
        follow_forward(self.handle, ids_RQ, positions_RQ, cache, self.rope_length)
        return None

    def forward_next(self, tokens_R: Tensor, cache: AnswerCache) -> Tensor | None:
        """Run a forward of each row's newest token; returns what `forward` does."""
        tokens_R1 = tokens_R[:, None]
        padding = cache.row_padding(len(tokens_R))
        positions_R1 = cache.seen_tokens - send(padding, tokens_R.device)[:, None]
        return self.forward(tokens_R1, positions_R1, cache)

    def text(self) -> Tensor:
        """Return filler, context and query of each row, `[B, L + Q]`.

        That is what logits processors read: context and query in one piece.
        """
        padding = self.padding()
        ids_BQ = sent(self.padded(padding), self.handle.device)
        context_L = sent(self.context_ids_L, ids_BQ.device)
        rows = [
            torch.cat([ids_Q[:gap], context_L, ids_Q[gap:]])
            for gap, ids_Q in zip(padding, ids_BQ, strict=True)
        ]
        return torch.stack(rows)


def look_at(handle: ModelHandle, comm: Comm, *, later: bool = False) -> None:
    """Drop graphs and slices of a model that has changed since.

    A call does so once, for all of its requests: a look takes as long as a layer or two.

    Args:
        handle: the model.
        comm: the ranks.
        later: leave graphs to the first step (`Request.looks_late`).
    """
    if handle.graphs is not None and not later:
        handle.graphs.look()
    slices.look(handle, comm)


def latents_of(handle: ModelHandle, shard: ContextKV) -> Latents | None:
    """Return of each layer the attention that need not expand what a shard stores.

    None for a model of which no layer expands anything: it need not be probed.
    """
    if not any(layer.expands for layer in shard.layers):
        return None
    return usable(handle.probe_result.latents)


def has_sliced_head(cache: AnswerCache) -> bool:
    """True if all ranks compute logits, each a slice of them."""
    return cache.slices is not None and bool(cache.slices.has_head)


def follow_forward(
    handle: ModelHandle,
    ids_BS: Tensor,
    positions_BS: Tensor,
    cache: AnswerCache,
    rope_length: int | None,
    logits_to_keep: int = 1,
) -> None:
    """Run a forward as another rank than 0, which takes part in logits only if they are sliced."""
    inputs = ids_BS, positions_BS, cache, rope_length
    if has_sliced_head(cache):
        handle.logits(*inputs, logits_to_keep=logits_to_keep)
    else:
        cache.begin(ids_BS, positions_BS, logits_to_keep)
        handle.encode(*inputs, logits_to_keep=logits_to_keep)
