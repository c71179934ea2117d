"""Phase 2: a query and its answer over an encoded context (paper, section 2.2).

transformers' own `generate` always does the preparation (settings, logits processors, stopping
criteria). Greedy search and sampling then run in `_decode`, our own loop, passed as
`custom_generate`: it yields after each token, so that a stream can be suspended without a thread,
and draws from generators of its own, so that a seed means the same whatever else runs. Beam search
and assisted decoding run in transformers' loops, over the same cache.

Axes: B queries (padded on the left to one length Q), R rows = B x answers each, L context tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from star_attention.distributed.comm import Comm
from star_attention.distributed.messages import CALL, END, PIECE
from star_attention.hf.cache.decode import AnswerCache
from star_attention.hf.cache.mirrored import Mirror, MirroredCache
from star_attention.hf.execution.graphs import Graphs
from star_attention.hf.execution.handle import ModelHandle, cache_argument
from star_attention.hf.execution.sampling import AsyncCopy, Sampler
from star_attention.storage.kv import ContextKV

OWN_LOOP_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""Modes that run in our own loop; transformers runs all others."""

_CACHE_ARGUMENT = cache_argument(GenerationMixin.prepare_inputs_for_generation)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One decoded token per row.

    Attributes:
        tokens: the token of each row.
        ended: True for rows that end with it.
        logits_RV: unprocessed logits, fp32 `[R, V]`.
    """

    tokens: list[int]
    ended: list[bool]
    logits_RV: Tensor


@dataclass(kw_only=True)
class Request:
    """Queries on one context, ready to run.

    Attributes:
        handle: the model.
        context_ids_L: token ids of the whole context, on CPU.
        shard: this rank's keys and values of the context.
        rope_length: tokens that length-dependent rotary frequencies are computed for, or None.
        queries: token ids of each query.
        tokens_per_forward: most query tokens of one forward, over all queries.
        comm: the ranks.
        generation_kwargs: arguments of `GenerationConfig`; they override the model's defaults.
        seed: seed of sampling for each query, or None for torch's global generator.
        logits_processor, stopping_criteria: transformers' lists.
        stop_after: makes a stopping criterion for prompts of a given length.
    """

    handle: ModelHandle
    context_ids_L: Tensor
    shard: ContextKV
    rope_length: int | None
    queries: list[list[int]]
    tokens_per_forward: int
    comm: Comm
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    stop_after: Callable[[int], StoppingCriteria] | None = None

    @property
    def query_tokens(self) -> int:
        """Length to which the queries are padded."""
        return max(len(query) for query in self.queries)

    @property
    def prompt_tokens(self) -> int:
        """Tokens before an answer in the input of transformers' own loops (see `stock`)."""
        return self.query_tokens + (len(self.context_ids_L) if self.rope_length is None else 0)

    @property
    def padding(self) -> list[int]:
        """Left padding of each query, in tokens."""
        return [self.query_tokens - len(query) for query in self.queries]

    def cache(self, query_tokens: int | None = None) -> AnswerCache:
        """Return a new cache, on all ranks.

        Args:
            query_tokens: length that queries are padded to; the longest query by default.
        """
        padding = [(query_tokens or self.query_tokens) - len(query) for query in self.queries]
        cache_type = MirroredCache if self.comm.size > 1 else AnswerCache
        return cache_type(
            self.shard, self.handle.windows, len(self.context_ids_L), padding, self.comm
        )

    def padded(self, padding: list[int]) -> Tensor:
        """Return the queries padded on the left, `[B, Q]`.

        Attention never sees the filler, but penalties do, so it is a token that every row holds.
        """
        fill = int(self.context_ids_L[0])
        rows = [[fill] * gap + query for gap, query in zip(padding, self.queries, strict=True)]
        return torch.tensor(rows, device=self.handle.device)

    @cached_property
    def graphs(self) -> Graphs | None:
        """CUDA graphs that serve this request's forwards, or None."""
        graphs = self.handle.graphs
        return graphs if graphs is not None and graphs.serve(self.shard, self.comm) else None

    def forward(self, ids_RQ: Tensor, positions_RQ: Tensor, cache: AnswerCache) -> Tensor:
        """Return logits of each row's last token, fp32 `[R, V]`; by a CUDA graph if one fits."""
        logits_RV = None if self.graphs is None else self.graphs.run(cache, ids_RQ, positions_RQ)
        if logits_RV is not None:
            return logits_RV
        return self.handle.logits(ids_RQ, positions_RQ, cache, self.rope_length)[:, -1].float()

    def text(self) -> Tensor:
        """Return filler, context and query of each row, `[B, L + Q]`.

        That is what logits processors read: context and query in one piece.
        """
        ids_BQ = self.padded(self.padding)
        context_L = self.context_ids_L.to(ids_BQ.device)
        rows = [
            torch.cat([ids_Q[:gap], context_L, ids_Q[gap:]])
            for gap, ids_Q in zip(self.padding, ids_BQ, strict=True)
        ]
        return torch.stack(rows)


def logits(request: Request) -> Tensor:
    """Return the logits of every token of a single query, fp32 `[Q, V]`."""
    cache = request.cache()
    parts = [
        request.handle.logits(
            ids_BS, positions_BS, cache, request.rope_length, logits_to_keep=0
        ).float()
        for ids_BS, positions_BS in _forwards(request, cache)
    ]
    return torch.cat(parts, 1)[0]


def steps(request: Request) -> Iterator[Step]:
    """Answer by greedy search or sampling, one token per row and step, until all rows ended."""
    ids_BS = request.text()
    rows = len(request.queries)
    cache = request.cache(
        None if request.graphs is None else request.graphs.bucket(rows, request.query_tokens)
    )

    def custom_generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Iterator[Step]:
        return _decode(
            request,
            cache,
            input_ids,
            logits_processor,
            stopping_criteria,
            bool(generation_config.do_sample),
        )

    loop: Iterator[Step] = request.handle.model.generate(
        ids_BS,
        # Only transformers' preparation reads this mask; `_decode` handles padding itself.
        attention_mask=torch.ones_like(ids_BS),
        logits_processor=request.logits_processor,
        stopping_criteria=request.stopping_criteria,
        custom_generate=custom_generate,
        **{_CACHE_ARGUMENT: cache},
        **request.generation_kwargs,
    )
    return loop


def stock(request: Request) -> list[list[int]]:
    """Answer by transformers' own decoding loop (beams, assisted).

    Queries of different lengths run one after another: padding would lie inside the text that
    penalties look at. So do queries that are sampled with a seed, which is for each of them.

    Returns:
        The new tokens of each row.
    """
    options, defaults = request.generation_kwargs, request.handle.model.generation_config
    # transformers drafts for one row only, and draws from one generator.
    is_drafted = options.get("prompt_lookup_num_tokens") is not None
    is_seeded = request.seed is not None and options.get("do_sample", defaults.do_sample)
    is_alone = is_drafted or is_seeded
    groups: dict[Any, list[int]] = {}
    for index, query in enumerate(request.queries):
        groups.setdefault(index if is_alone else len(query), []).append(index)
    rows: dict[int, list[list[int]]] = {}
    for indices in groups.values():
        new_rows = _stock(replace(request, queries=[request.queries[index] for index in indices]))
        answers = len(new_rows) // len(indices)
        for i, index in enumerate(indices):
            rows[index] = new_rows[i * answers : (i + 1) * answers]
    return [row for index in range(len(request.queries)) for row in rows[index]]


def _stock(request: Request) -> list[list[int]]:
    cache = request.cache()
    # All queries have one length here, so there is no filler.
    ids_BS = request.text()
    mask_BS = torch.ones_like(ids_BS)
    # Where rotary frequencies depend on the length, some models drop the cache by the ids' length:
    # they get the query alone.
    ids_BS = ids_BS[:, -request.prompt_tokens :]
    criteria = list(request.stopping_criteria or [])
    if request.stop_after is not None:
        criteria.append(request.stop_after(request.prompt_tokens))
    devices = [ids_BS.device] if ids_BS.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=request.seed is not None):
        if request.seed is not None:
            torch.manual_seed(request.seed)
        whole = request.prompt_tokens if request.rope_length is None else None
        with request.handle.generating(cache, request.rope_length, whole) as model:
            sequences: Tensor = model.generate(
                ids_BS,
                attention_mask=mask_BS,
                **{_CACHE_ARGUMENT: cache},
                **request.generation_kwargs,
                logits_processor=request.logits_processor,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
    rows: list[list[int]] = sequences[:, request.prompt_tokens :].tolist()
    config = request.handle.model.generation_config
    pad = request.generation_kwargs.get("pad_token_id", config.pad_token_id)
    eos = request.generation_kwargs.get("eos_token_id", config.eos_token_id)
    ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return [_without_fill(row, {-1, pad} - ends) for row in rows]


def _without_fill(row: list[int], fill: set[int | None]) -> list[int]:
    """Cut a row where it ended: transformers pads rows that a criterion ends before the others."""
    length = len(row)
    while length > 1 and row[length - 1] in fill:
        length -= 1
    return row[:length]


def follow(
    handle: ModelHandle, shard: ContextKV, context_tokens: int, rope_length: int | None, comm: Comm
) -> Generator[Any, None, Any]:
    """Follow rank 0 through one call: run its forwards and its changes of the cache until the end.

    Sampling, beams and stopping criteria run on rank 0 alone, so that ranks cannot differ in them.

    Yields:
        The pieces that rank 0 streams.

    Returns:
        Rank 0's last message (the answers); None where it left the answer for another call.
    """

    def new_cache(padding: list[int]) -> AnswerCache:
        return AnswerCache(shard, handle.windows, context_tokens, padding, comm)

    def forward(
        cache: AnswerCache, ids_BS: Tensor, positions_BS: Tensor, logits_to_keep: int
    ) -> None:
        ids_BS, positions_BS = ids_BS.to(handle.device), positions_BS.to(handle.device)
        # Only rank 0 needs logits.
        handle.encode(ids_BS, positions_BS, cache, rope_length, logits_to_keep=logits_to_keep)

    mirror = Mirror(new_cache, forward)
    while True:
        kind, *arguments = comm.receive_object()
        if kind == END:
            return arguments[0]
        if kind == CALL:
            comm.push_back((kind, *arguments))
            return None
        if kind == PIECE:
            yield arguments[0]
        else:
            mirror.run(kind, *arguments)


def _forwards(request: Request, cache: AnswerCache) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ids and positions of the padded queries, `[B, S]` each, one pair for each forward."""
    padding = cache.row_padding(len(request.queries))
    ids_BQ = request.padded(padding)
    context_tokens = len(request.context_ids_L)
    # Padding has no position of its own; nothing sees it, so 0 will do.
    gap_B1 = torch.tensor(padding, device=ids_BQ.device)[:, None]
    positions_BQ = (
        context_tokens + torch.arange(ids_BQ.shape[1], device=ids_BQ.device)[None] - gap_B1
    ).clamp_(min=0)
    columns = max(1, request.tokens_per_forward // ids_BQ.shape[0])
    for start in range(0, ids_BQ.shape[1], columns):
        part = slice(start, start + columns)
        yield ids_BQ[:, part], positions_BQ[:, part]


@torch.no_grad()
def _decode(
    request: Request,
    cache: AnswerCache,
    ids_RS: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    do_sample: bool,
) -> Iterator[Step]:
    rows = ids_RS.shape[0]
    answers = rows // len(request.queries)
    for ids_BS, positions_BS in _forwards(request, cache):
        logits_RV = request.forward(ids_BS, positions_BS, cache).repeat_interleave(answers, 0)
    if answers > 1:
        cache.batch_repeat_interleave(answers)
    sampler = Sampler(request.seed if do_sample else None, len(request.queries), ids_RS.device)
    padding_R1 = torch.tensor(cache.row_padding(rows), device=ids_RS.device)[:, None]
    ended_R = torch.zeros(rows, dtype=torch.bool, device=ids_RS.device)
    most = int(request.generation_kwargs["max_new_tokens"])
    prompt_tokens = ids_RS.shape[1]
    ids_RT = torch.cat([ids_RS, ids_RS.new_empty(rows, most)], 1)
    for number in range(1, most + 1):
        scores_RV = logits_processor(ids_RS, logits_RV.clone()) if logits_processor else logits_RV
        tokens_R1 = sampler.draw(scores_RV) if do_sample else scores_RV.argmax(-1, keepdim=True)
        ids_RT[:, prompt_tokens + number - 1] = tokens_R1[:, 0]
        ids_RS = ids_RT[:, : prompt_tokens + number]
        # A row that has ended continues unseen next to the others, and criteria that look at the
        # last token alone would forget its end.
        ended_R = ended_R | stopping_criteria(ids_RS, scores_RV)
        copied = AsyncCopy(torch.cat([tokens_R1[:, 0], ended_R.long()]))
        next_RV = None
        if request.graphs is not None and number < most:
            # The device works on the next token while Python looks at this one. If this one was the
            # last, that forward was for nothing.
            next_RV = request.forward(tokens_R1, cache.seen_tokens - padding_R1, cache)
        values = copied.wait()
        tokens, ended = values[:rows], [bool(value) for value in values[rows:]]
        yield Step(tokens=tokens, ended=ended, logits_RV=logits_RV)
        if all(ended):
            return
        logits_RV = (
            request.forward(tokens_R1, cache.seen_tokens - padding_R1, cache)
            if next_RV is None
            else next_RV
        )
