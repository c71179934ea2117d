"""The numbers of one plan, and how they are shown."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any

from star_attention.cli.progress import amount, in_bytes, table
from star_attention.config import StarConfig
from star_attention.hf.loading import load, rope
from star_attention.hf.loading.tensor_parallel import check as check_tensor_parallel
from star_attention.hf.shape import model_shape
from star_attention.planning import cost, traffic
from star_attention.planning.cost import Flops
from star_attention.planning.plan import ANCHOR_SOURCES, BlockPlan, counted, format_size

_FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")


class Report:
    """Memory and operations of `plan` for the model whose config lies at `model`."""

    def __init__(
        self,
        model: str,
        plan: BlockPlan,
        *,
        dtype: str,
        tokens_per_forward: int | None,
        queries: int,
        query_tokens: int,
        answer_tokens: int,
        anchor_source: str = ANCHOR_SOURCES[0],
        tensor_parallel: int = 1,
        kv_dtype: str | None = None,
        kv_device: str | None = None,
    ) -> None:
        config = load.load_config(model)
        check_tensor_parallel(config, tensor_parallel)
        self.tensor_parallel = tensor_parallel
        self.model, self.plan = model, plan
        self.shape = shape = model_shape(config, dtype)
        self.queries, self.query_tokens, self.answer_tokens = queries, query_tokens, answer_tokens
        settings = StarConfig(tokens_per_forward=tokens_per_forward)
        self.tokens_per_forward = tokens_per_forward = settings.forward_size(
            load.pick_device("auto")
        )

        def phase1(plan: BlockPlan, rank: int | None = None) -> Flops:
            return cost.phase1(shape, plan, tokens_per_forward=tokens_per_forward, rank=rank)

        forwards: dict[str, Any] = dict(
            tokens_per_forward=tokens_per_forward, tensor_parallel=tensor_parallel
        )
        tail_tokens = queries * (query_tokens + answer_tokens)
        ranks = range(plan.ranks)
        kept: dict[str, Any] = dict(kv_dtype=kv_dtype, kv_device=kv_device)
        memories = [
            cost.memory(shape, plan, **forwards, **kept, tail_tokens=tail_tokens, rank=rank)
            for rank in ranks
        ]
        self.kept_bytes = shape.stored_bytes_per_token(kv_dtype)
        self.kv_dtype, self.kv_device = kv_dtype, kv_device
        self.memory = max(memories, key=lambda memory: memory.total)
        self.memory_by_rank = [memory.total for memory in memories]
        self.star = phase1(plan)
        self.star_busiest = max(phase1(plan, rank).total for rank in ranks) // tensor_parallel
        self.dense = phase1(BlockPlan.dense(plan.context_tokens))
        self.official = cost.phase1_official(shape, plan)
        self.answers = cost.phase2(
            shape,
            plan.context_tokens,
            query_tokens=query_tokens,
            answer_tokens=answer_tokens,
            queries=queries,
        )
        answers: dict[str, Any] = dict(
            query_tokens=query_tokens, answer_tokens=answer_tokens, queries=queries
        )
        self.wire1 = traffic.phase1_cp(shape, plan, **forwards, anchor_source=anchor_source)
        self.ring = traffic.ring_cp(shape, plan.context_tokens, plan.ranks, tensor_parallel)
        self.wire2 = traffic.phase2_cp(shape, plan.ranks, **forwards, **answers)
        self.within1 = traffic.phase1_tp(shape, plan, **forwards, anchor_source=anchor_source)
        self.within2 = traffic.phase2_tp(shape, plan.ranks, **forwards, **answers)
        self._warn(config)

    def _warn(self, config: Any) -> None:
        warn_of_positions(config, self.plan.context_tokens + self.query_tokens + self.answer_tokens)
        if getattr(config, "quantization_config", None) is not None:
            warnings.warn(
                "the checkpoint is quantized: its weights take less than the plain ones counted here",
                stacklevel=2,
            )
        idle = self.plan.ranks - self.plan.num_blocks
        if idle > 0:
            warnings.warn(
                f"{idle} of {self.plan.ranks} ranks {'is' if idle == 1 else 'are'} idle: the context has"
                f" {counted(self.plan.num_blocks, 'block')}; lower --block-size or --ranks",
                stacklevel=2,
            )

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints: tokens, bytes and operations."""
        plan, shape = self.plan, self.shape
        return {
            "model": self.model,
            "model_type": shape.name,
            "context_tokens": plan.context_tokens,
            "block_size": plan.block_size,
            "anchor_size": plan.anchor_size,
            "blocks": plan.num_blocks,
            "ranks": plan.ranks,
            "tensor_parallel": self.tensor_parallel,
            "tokens_per_forward": self.tokens_per_forward,
            "queries": self.queries,
            "query_tokens": self.query_tokens,
            "answer_tokens": self.answer_tokens,
            "parameters": shape.parameters,
            "kv_bytes_per_token": self.kept_bytes,
            "kv_dtype": self.kv_dtype,
            "kv_device": self.kv_device,
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "memory_by_rank": self.memory_by_rank,
            "flops": {
                "phase1_star": _flops(self.star),
                "phase1_star_busiest_rank": self.star_busiest,
                "phase1_dense": _flops(self.dense),
                "phase1_official": _flops(self.official),
                "phase2": _flops(self.answers),
            },
            "wire_bytes_phase1": self.wire1.bytes,
            "wire_calls_phase1": self.wire1.calls,
            "wire_bytes_ring": self.ring.bytes,
            "wire_bytes_phase2": self.wire2.bytes,
            "wire_calls_phase2": self.wire2.calls,
            "wire_within_bytes_phase1": self.within1.bytes,
            "wire_within_bytes_phase2": self.within2.bytes,
            "dense_over_star": self.dense.total / self.star.total,
        }

    def as_text(self) -> str:
        """Picture and tables for people."""
        parts = [str(self.plan), self._model(), self._memory(), self._operations()]
        return "\n\n".join([*parts, self._wire()] if self._devices > 1 else parts)

    def _model(self) -> str:
        shape = self.shape
        widest = max(shape.attention, key=lambda call: call.heads)
        windowed = sum(call.window is not None for call in shape.attention)
        lines = [
            f"model {self.model} ({shape.name}): {shape.parameters:,} parameters of {shape.bytes_per_element} bytes,"
            f" {counted(shape.layers, 'layer')}{f', {windowed} with a sliding window' if windowed else ''}",
            f"attention {counted(widest.heads, 'query head')}, {counted(widest.kv_heads, 'key head')},"
            f" key size {widest.k_head_size}, value size {widest.v_head_size};"
            f" {self.kept_bytes:,} bytes of keys and values a token",
        ]
        return "\n".join(lines)

    def _memory(self) -> str:
        memory, plan = self.memory, self.plan
        largest = min(self.tokens_per_forward, plan.context_tokens)
        rows = [
            ("weights", in_bytes(memory.weights), ""),
            ("keys and values", in_bytes(memory.kv), "of its blocks" if plan.ranks > 1 else ""),
            ("anchor", in_bytes(memory.anchor), "of the first block, as computed")
            if memory.anchor
            else None,
            ("queries and answers", in_bytes(memory.tail), ""),
            (
                "working memory",
                in_bytes(memory.working),
                f"estimate, up to {format_size(largest)} tokens in a forward",
            ),
            ("total", in_bytes(memory.total), ""),
            ("in the host's memory", in_bytes(memory.host), "keys and values")
            if memory.host
            else None,
        ]
        head = "memory on the fullest device" if self._devices > 1 else "memory"
        if len(set(self.memory_by_rank)) > 1:
            fullest = self.memory_by_rank.index(memory.total)
            others = [total for rank, total in enumerate(self.memory_by_rank) if rank != fullest]
            least, most = in_bytes(min(others)), in_bytes(max(others))
            head += f" (rank {fullest}; the others' totals: {least if least == most else f'{least} to {most}'})"
        return head + "\n" + table([row for row in rows if row is not None])

    def _operations(self) -> str:
        columns = {"star": self.star, "dense": self.dense, "official": self.official}
        rows = [("phase 1", *columns)]
        for part in ("linear", "attention", "expansion", "total"):
            if part != "expansion" or self.shape.expansion_parameters:
                rows.append(
                    (f"  {part}", *(_flop(getattr(flops, part)) for flops in columns.values()))
                )
        rows.append(
            (
                "  against star",
                *(f"x {flops.total / self.star.total:.2f}" for flops in columns.values()),
            )
        )
        if self._devices > 1:
            rows.append(("  busiest device", _flop(self.star_busiest), "", ""))
        answers = f"{self.queries} x ({self.query_tokens:,} + {self.answer_tokens:,}) tok"
        rows.append(("phase 2", *(_flop(self.answers.total) for _ in columns)))
        return f"operations (phase 2: {answers}, the same for each)\n" + table(rows)

    def _wire(self) -> str:
        rows: list[tuple[str, ...]] = [
            (
                "phase 1",
                in_bytes(self.wire1.bytes),
                counted(self.wire1.calls, "collective"),
                "the anchor to every rank",
            ),
            (
                "  ring attention",
                in_bytes(self.ring.bytes),
                counted(self.ring.calls, "collective"),
                "for comparison",
            ),
            (
                "phase 2",
                in_bytes(self.wire2.bytes),
                counted(self.wire2.calls, "collective"),
                "states of all answers",
            ),
            ("  an answer token", in_bytes(self._token_bytes()), "", ""),
        ]
        if self.tensor_parallel > 1:
            sums = "sums within hosts"
            rows += [
                (
                    "phase 1, within hosts",
                    in_bytes(self.within1.bytes),
                    counted(self.within1.calls, "collective"),
                    sums,
                ),
                (
                    "phase 2, within hosts",
                    in_bytes(self.within2.bytes),
                    counted(self.within2.calls, "collective"),
                    sums,
                ),
            ]
        return "on the wire, all ranks together\n" + table(rows)

    @property
    def _devices(self) -> int:
        return self.plan.ranks * self.tensor_parallel

    def _token_bytes(self) -> int:
        return traffic.phase2_cp(
            self.shape,
            self.plan.ranks,
            query_tokens=1,
            answer_tokens=1,
            tokens_per_forward=self.tokens_per_forward,
            tensor_parallel=self.tensor_parallel,
        ).bytes


def warn_of_positions(config: Any, needed: int) -> None:
    """Where the longest context, with a query and its answer, is more than the model has positions for."""
    limit = rope.max_positions(config.get_text_config(decoder=True))
    if limit is not None and needed > limit:
        warnings.warn(
            f"context, query and answer need {needed:,} positions, the model has {limit:,}: encoding would be refused",
            stacklevel=3,
        )


def _flops(flops: Flops) -> dict[str, int]:
    return asdict(flops) | {"total": flops.total}


def _flop(count: int) -> str:
    return amount(count, _FLOP, 1000)
