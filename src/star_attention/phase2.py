"""Phase 2: a query and its answer over an encoded context (paper, section 2.2), with transformers' own `generate`.

`generate` does the preparation in every case (settings, logits processors, stopping criteria). Greedy search and sampling
then run in `_steps`, a loop of ours behind `custom_generate`: it yields after each token, so that a stream can be suspended
without a thread, and draws from a generator of its own, so that a seed means the same whatever runs beside it. Beam search and
assisted decoding run in transformers' loops, over the same cache.

Axes: B queries (padded on the left to one length Q), R rows = B x answers each, L context tokens, V vocabulary.
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
from star_attention.distributed.messages import CALL, END
from star_attention.hf.cache.base import AnswerCache
from star_attention.hf.execution.graphs import Graphs
from star_attention.hf.execution.handle import ModelHandle, cache_word
from star_attention.storage.kv import ContextKV

OWN_LOOP_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
"""What our own loop does; every other mode is transformers'."""

_CACHE_WORD = cache_word(GenerationMixin.prepare_inputs_for_generation)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One token a row: `tokens[r]`, whether the row ends with it, and its unprocessed logits `[R, V]` in fp32."""

    tokens: list[int]
    ended: list[bool]
    logits_RV: Tensor


@dataclass(kw_only=True)
class Request:
    """Queries on one context, ready to run; `words` are settings of `GenerationConfig`, over the model's own."""

    handle: ModelHandle
    context_ids_L: Tensor
    shard: ContextKV
    rope_length: int | None
    queries: list[list[int]]
    tokens_per_forward: int
    comm: Comm
    words: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    logits_processor: LogitsProcessorList | None = None
    stopping_criteria: StoppingCriteriaList | None = None
    stop_after: Callable[[int], StoppingCriteria] | None = (
        None  # makes one more, for prompts of a length
    )

    @property
    def query_tokens(self) -> int:
        """Length to which the queries are padded."""
        return max(len(query) for query in self.queries)

    @property
    def prompt_tokens(self) -> int:
        """Tokens in front of an answer in what transformers' own loops are given (see `stock`)."""
        return self.query_tokens + (len(self.context_ids_L) if self.rope_length is None else 0)

    @property
    def padding(self) -> list[int]:
        return [self.query_tokens - len(query) for query in self.queries]

    def cache(self, query_tokens: int | None = None) -> AnswerCache:
        """A new one, on all ranks, for queries padded to `query_tokens` (else: to the longest)."""
        padding = [(query_tokens or self.query_tokens) - len(query) for query in self.queries]
        if self.comm.size > 1:
            self.comm.broadcast_object(("cache", padding))
        return AnswerCache(
            self.shard, self.handle.windows, len(self.context_ids_L), padding, self.comm
        )

    def padded(self, padding: list[int]) -> Tensor:
        """Queries padded on the left, `[B, Q]`.

        Attention never sees the filler, but penalties do: it is a token that every row holds anyway.
        """
        fill = int(self.context_ids_L[0])
        rows = [[fill] * gap + query for gap, query in zip(padding, self.queries, strict=True)]
        return torch.tensor(rows, device=self.handle.device)

    @cached_property
    def graphs(self) -> Graphs | None:
        """CUDA graphs for this request's forwards, None where there are none that serve it."""
        graphs = self.handle.graphs
        return graphs if graphs is not None and graphs.serve(self.shard, self.comm) else None

    def forward(self, ids_RQ: Tensor, positions_RQ: Tensor, cache: AnswerCache) -> Tensor:
        """Logits of each row's last token, fp32 `[R, V]`: by a CUDA graph where there is one for so many tokens."""
        logits_RV = None if self.graphs is None else self.graphs.run(cache, ids_RQ, positions_RQ)
        if logits_RV is not None:
            return logits_RV
        return self.handle.logits(ids_RQ, positions_RQ, cache, self.rope_length)[:, -1].float()

    def text(self) -> Tensor:
        """Filler, context and query of each row, `[B, L + Q]`, as logits processors are to see them: the text unbroken."""
        ids_BQ = self.padded(self.padding)
        context_L = self.context_ids_L.to(ids_BQ.device)
        rows = [
            torch.cat([ids_Q[:gap], context_L, ids_Q[gap:]])
            for gap, ids_Q in zip(self.padding, ids_BQ, strict=True)
        ]
        return torch.stack(rows)

    def generator(self) -> torch.Generator | None:
        """The source of random numbers: torch's global one without a seed, as with the stock `generate`."""
        return (
            None
            if self.seed is None
            else torch.Generator(self.handle.device).manual_seed(self.seed)
        )


def logits(request: Request) -> Tensor:
    """Logits of every query token of a single query, `[Q, V]` in fp32, teacher-forced."""
    cache = request.cache()
    parts = [
        request.handle.logits(ids_BS, positions_BS, cache, request.rope_length, keep=0).float()
        for ids_BS, positions_BS in _forwards(request, cache)
    ]
    return torch.cat(parts, 1)[0]


def steps(request: Request) -> Iterator[Step]:
    """Answer by greedy search or sampling, a token a row at a time; ends when every row has ended."""
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
        return _steps(
            request,
            cache,
            input_ids,
            logits_processor,
            stopping_criteria,
            bool(generation_config.do_sample),
        )

    loop: Iterator[Step] = request.handle.model.generate(
        ids_BS,
        attention_mask=torch.ones_like(
            ids_BS
        ),  # for transformers' preparation; `_steps` pads by itself
        logits_processor=request.logits_processor,
        stopping_criteria=request.stopping_criteria,
        custom_generate=custom_generate,
        **{_CACHE_WORD: cache},
        **request.words,
    )
    return loop


def stock(request: Request) -> list[list[int]]:
    """Answer by transformers' own decoding loop (beams, assisted); the new tokens of each row, in its order.

    Queries of different lengths go one after another: padding would stand inside the text that penalties look at.
    """
    groups: dict[Any, list[int]] = {}
    for index, query in enumerate(request.queries):
        alone = (
            request.words.get("prompt_lookup_num_tokens") is not None
        )  # transformers drafts for one row only
        groups.setdefault(index if alone else len(query), []).append(index)
    rows: dict[int, list[list[int]]] = {}
    for indices in groups.values():
        found = _stock(replace(request, queries=[request.queries[index] for index in indices]))
        answers = len(found) // len(indices)
        for at, index in enumerate(indices):
            rows[index] = found[at * answers : (at + 1) * answers]
    return [row for index in range(len(request.queries)) for row in rows[index]]


def _stock(request: Request) -> list[list[int]]:
    cache = request.cache()
    ids_BS = request.text()  # (of one length: without filler)
    mask_BS = torch.ones_like(ids_BS)
    # Where rotary frequencies depend on the length, some models look at the ids' length to drop the cache; give the query alone.
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
                **{_CACHE_WORD: cache},
                **request.words,
                logits_processor=request.logits_processor,
                stopping_criteria=StoppingCriteriaList(criteria),
            )
    rows: list[list[int]] = sequences[:, request.prompt_tokens :].tolist()
    config = request.handle.model.generation_config
    pad = request.words.get("pad_token_id", config.pad_token_id)
    eos = request.words.get("eos_token_id", config.eos_token_id)
    ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    return [_without_fill(row, {-1, pad} - ends) for row in rows]


def _without_fill(row: list[int], fill: set[int | None]) -> list[int]:
    """A row as far as it was generated: transformers fills up those that a criterion ended before the others."""
    length = len(row)
    while length > 1 and row[length - 1] in fill:
        length -= 1
    return row[:length]


def follow(
    handle: ModelHandle, shard: ContextKV, context_tokens: int, rope_length: int | None, comm: Comm
) -> Generator[str, None, Any]:
    """The part of every rank but 0: the forwards and changes of the cache that rank 0 tells, until it says that the answer ends.

    Yields the pieces of text that rank 0 streams, and returns what it told last, None where it left the answer for another
    call. Sampling, beams and stopping criteria are
    rank 0's alone, so that nothing about them can differ between ranks.
    """
    cache = AnswerCache(shard, handle.windows, context_tokens, [0], comm)
    while True:
        what, *arguments = comm.receive_object()
        if what == END:
            return arguments[0]
        if what == CALL:
            comm.push_back((what, *arguments))
            return None
        if what == "piece":
            yield arguments[0]
        elif what == "cache":
            cache = AnswerCache(shard, handle.windows, context_tokens, arguments[0], comm)
        elif what == "forward":
            *rows, keep = arguments
            ids_BS, positions_BS = (torch.tensor(one, device=handle.device) for one in rows)
            cache.report()
            handle.encode(
                ids_BS, positions_BS, cache, rope_length, keep=keep
            )  # only rank 0 needs logits
        else:
            cache.follow(what, *arguments)


def _forwards(request: Request, cache: AnswerCache) -> Iterator[tuple[Tensor, Tensor]]:
    """The queries, as padded for `cache`, a bounded number of tokens a forward: ids and positions, `[B, S]` each."""
    padding = cache.row_padding(len(request.queries))
    ids_BQ = request.padded(padding)
    start = len(request.context_ids_L)
    # Padding has no position of its own; 0 is as good as any, nothing sees it.
    gap_B1 = torch.tensor(padding, device=ids_BQ.device)[:, None]
    positions_BQ = (
        start + torch.arange(ids_BQ.shape[1], device=ids_BQ.device)[None] - gap_B1
    ).clamp_(min=0)
    columns = max(1, request.tokens_per_forward // ids_BQ.shape[0])
    for at in range(0, ids_BQ.shape[1], columns):
        part = slice(at, at + columns)
        yield ids_BQ[:, part], positions_BQ[:, part]


@torch.no_grad()
def _steps(
    request: Request,
    cache: AnswerCache,
    ids_RS: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    do_sample: bool,
) -> Iterator[Step]:
    generator = request.generator()
    rows = ids_RS.shape[0]
    answers = rows // len(request.queries)
    for ids_BS, positions_BS in _forwards(request, cache):
        logits_RV = request.forward(ids_BS, positions_BS, cache).repeat_interleave(answers, 0)
    if answers > 1:
        cache.batch_repeat_interleave(answers)
    padding_R1 = torch.tensor(cache.row_padding(rows), device=ids_RS.device)[:, None]
    ended_R = torch.zeros(rows, dtype=torch.bool, device=ids_RS.device)
    most = int(request.words["max_new_tokens"])
    prompt_tokens = ids_RS.shape[1]
    ids_RT = torch.cat([ids_RS, ids_RS.new_empty(rows, most)], 1)
    for number in range(1, most + 1):
        scores_RV = logits_processor(ids_RS, logits_RV.clone()) if logits_processor else logits_RV
        if do_sample:
            tokens_R1 = torch.multinomial(torch.softmax(scores_RV, -1), 1, generator=generator)
        else:
            tokens_R1 = scores_RV.argmax(-1, keepdim=True)
        ids_RT[:, prompt_tokens + number - 1] = tokens_R1[:, 0]
        ids_RS = ids_RT[:, : prompt_tokens + number]
        # A row that has ended goes on unseen beside the others; a criterion that looks at the last token forgets it.
        ended_R = ended_R | stopping_criteria(ids_RS, scores_RV)
        told = _Told(torch.cat([tokens_R1[:, 0], ended_R.long()]))
        next_RV = None
        if request.graphs is not None and number < most:
            # The device goes on while Python looks at the token; should it have been the last one, a forward was in vain.
            next_RV = request.forward(tokens_R1, cache.seen_tokens - padding_R1, cache)
        numbers = told.numbers()
        tokens, ended = numbers[:rows], [bool(number) for number in numbers[rows:]]
        yield Step(tokens=tokens, ended=ended, logits_RV=logits_RV)
        if all(ended):
            return
        logits_RV = (
            request.forward(tokens_R1, cache.seen_tokens - padding_R1, cache)
            if next_RV is None
            else next_RV
        )


class _Told:
    """Numbers on their way from the device, which works on meanwhile."""

    def __init__(self, numbers: Tensor) -> None:
        self._arrived = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def numbers(self) -> list[int]:
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[int] = self._numbers.tolist()
        return numbers
