"""Memory, operations and traffic of a plan, from the model's config alone."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from star_attention.cli.model_facts import ModelFacts, ModelRequest, read_model
from star_attention.config import StarConfig
from star_attention.hf.loading.devices import default_device
from star_attention.hf.loading.positions import doubt, max_positions
from star_attention.planning import cost, estimate, traffic
from star_attention.planning.cost import Flops, Memory
from star_attention.planning.estimate import Estimate
from star_attention.planning.hardware import HARDWARE
from star_attention.planning.helping import Help, helps_of_shape
from star_attention.planning.model_shape import ModelShape
from star_attention.planning.plan import BlockPlan, without_lookback
from star_attention.planning.second_look import check_keeps
from star_attention.planning.short import chosen_plan
from star_attention.planning.sizes import counted
from star_attention.planning.stored import saved_bytes
from star_attention.planning.traffic import Traffic

PREDICTED_ON = "h200-nvlink"
"""The hardware of a plan's times, a key of `HARDWARE`; `star-attention estimate` takes others."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """The arguments of `plan`.

    Attributes:
        model: folder, GGUF file or hub id.
        location: where in it the model is: arguments of `model_config.load_config`.
        dtype: dtype of the weights.
        plan: blocks and ranks of the context.
        config: settings of the engine.
        tensor_parallel: devices per context-parallel rank.
        queries: number of queries.
        query_tokens, answer_tokens: length of a query and of an answer.
        rope_scaling: rotary scaling in place of the config's (`--rope-scaling`).
        weights: precision of linear layers (`--weights`).
        second_look: share of the context that is computed again for each query.
    """

    model: str
    location: dict[str, Any] = field(default_factory=dict)
    dtype: str
    plan: BlockPlan
    config: StarConfig
    tensor_parallel: int
    queries: int
    query_tokens: int
    answer_tokens: int
    rope_scaling: str | None = None
    weights: str | None = None
    second_look: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PlanCosts:
    """The costs of a plan.

    helps: what rank 0 computes for others in phase 1.
    memory_by_rank: the fullest device of each context-parallel rank. paper: operations of phase 1
    without look-back, with a whole block as anchor. star_busiest: those of the busiest device.
    *_traffic: between context-parallel ranks; *_tp_traffic: within them; ring_traffic: what ring
    attention would send in phase 1; token_traffic: one answer token.
    predicted: times on `PREDICTED_ON`; predicted_ring: those of ring attention on the same devices.
    """

    request: PlanRequest
    shape: ModelShape
    tokens_per_forward: int
    helps: list[Help]
    memory_by_rank: list[Memory]
    star: Flops
    paper: Flops
    star_busiest: int
    dense: Flops
    official: Flops
    answers: Flops
    second_look: Flops
    phase1_traffic: Traffic
    phase1_tp_traffic: Traffic
    ring_traffic: Traffic
    phase2_traffic: Traffic
    phase2_tp_traffic: Traffic
    token_traffic: Traffic
    predicted: Estimate
    predicted_ring: Estimate

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes stored per token of the context."""
        return self.shape.stored_bytes_per_token(self.request.config.kv_dtype)

    def saved_bytes(self, kv_dtype: str | None) -> int:
        """Return the bytes of the saved context, all ranks' files together."""
        request = self.request
        tokens, kv_windows = request.plan.context_tokens, request.config.kv_windows
        return saved_bytes(self.shape, tokens, kv_dtype, kv_windows)

    @property
    def memory(self) -> Memory:
        """Memory of the fullest device."""
        return max(self.memory_by_rank, key=lambda memory: memory.total)

    @property
    def devices(self) -> int:
        """Devices that work together."""
        return self.request.plan.ranks * self.request.tensor_parallel

    def as_dict(self) -> dict[str, Any]:
        """Return the fields of `--json`: tokens, bytes and operations."""
        request, plan = self.request, self.request.plan
        return {
            "model": request.model,
            "model_type": self.shape.name,
            "context_tokens": plan.context_tokens,
            "block_size": plan.block_size,
            "anchor_size": plan.anchor_size,
            "lookback": plan.lookback,
            "lookback_layers": plan.lookback_layers,
            "blocks": plan.num_blocks,
            "ranks": plan.ranks,
            "tensor_parallel": request.tensor_parallel,
            "tokens_per_forward": self.tokens_per_forward,
            "queries": request.queries,
            "query_tokens": request.query_tokens,
            "answer_tokens": request.answer_tokens,
            "second_look": request.second_look,
            "parameters": self.shape.parameters,
            "weights": request.weights,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "saved_bytes": self.saved_bytes(self.request.config.kv_dtype),
            **request.config.kv_settings,
            "helped": [asdict(each) for each in self.helps],
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "memory_by_rank": [memory.total for memory in self.memory_by_rank],
            "flops": {
                "phase1_star": _as_dict(self.star),
                "phase1_paper": _as_dict(self.paper),
                "phase1_star_busiest_rank": self.star_busiest,
                "phase1_dense": _as_dict(self.dense),
                "phase1_official": _as_dict(self.official),
                "phase2": _as_dict(self.answers),
                "second_look": _as_dict(self.second_look),
            },
            "wire_bytes_phase1": self.phase1_traffic.bytes,
            "wire_calls_phase1": self.phase1_traffic.calls,
            "wire_bytes_ring": self.ring_traffic.bytes,
            "wire_bytes_phase2": self.phase2_traffic.bytes,
            "wire_calls_phase2": self.phase2_traffic.calls,
            "wire_within_bytes_phase1": self.phase1_tp_traffic.bytes,
            "wire_within_bytes_phase2": self.phase2_tp_traffic.bytes,
            "dense_over_star": self.dense.total / self.star.total,
            "predicted": {
                "hardware": PREDICTED_ON,
                "phase1_s": self.predicted.encode_s,
                "phase1_ring_s": self.predicted_ring.encode_s,
                "token_s": self.predicted.token_s,
                "sliced_token_s": self.predicted.sliced_token_s,
            },
        }


def _as_dict(flops: Flops) -> dict[str, int]:
    return asdict(flops) | {"total": flops.total}


def plan_costs(request: PlanRequest) -> PlanCosts:
    """Compute the costs of a plan, and warn about what would not run or not run well."""
    model = read_model(
        ModelRequest(
            model=request.model,
            location=request.location,
            dtype=request.dtype,
            weights=request.weights,
            rope_scaling=request.rope_scaling,
            tensor_parallel=request.tensor_parallel,
        )
    )
    shape, config, device = model.shape, request.config, default_device()
    plan = chosen_plan(request.plan, config, device, lambda: shape)
    windows = [call.window for call in shape.attention]
    check_keeps(request.second_look, windows, plan.context_tokens, config.kv_windows)
    request = replace(request, plan=plan)
    tokens_per_forward = config.forward_size(device, plan.ranks)
    forwards: dict[str, Any] = dict(
        tokens_per_forward=tokens_per_forward, tensor_parallel=request.tensor_parallel
    )
    answers: dict[str, Any] = dict(
        query_tokens=request.query_tokens,
        answer_tokens=request.answer_tokens,
        queries=request.queries,
    )
    choices: dict[str, Any] = dict(
        anchor_source=config.anchor_source, balance_ranks=config.balance_ranks
    )
    helps = helps_of_shape(shape, plan, tokens_per_forward=tokens_per_forward, **choices)
    busiest = max(
        cost.phase1(
            shape, plan, tokens_per_forward=tokens_per_forward, rank=rank, helps=helps
        ).total
        for rank in range(plan.ranks)
    )
    paper = without_lookback(plan)
    _warn(request, model)
    return PlanCosts(
        request=request,
        shape=shape,
        tokens_per_forward=tokens_per_forward,
        helps=helps,
        memory_by_rank=_memory_by_rank(request, shape, tokens_per_forward, helps),
        star=cost.phase1(shape, plan, tokens_per_forward=tokens_per_forward),
        paper=cost.phase1(shape, paper, tokens_per_forward=tokens_per_forward),
        star_busiest=busiest // request.tensor_parallel,
        dense=cost.phase1(
            shape, BlockPlan.dense(plan.context_tokens), tokens_per_forward=tokens_per_forward
        ),
        official=cost.phase1_official(shape, paper),
        answers=cost.phase2(shape, plan.context_tokens, **answers),
        second_look=cost.second_look(
            shape,
            plan,
            request.second_look,
            tokens_per_forward=tokens_per_forward,
            query_tokens=request.query_tokens,
            queries=request.queries,
        ),
        phase1_traffic=traffic.phase1_cp(shape, plan, **forwards, **choices),
        phase1_tp_traffic=traffic.phase1_tp(
            shape, plan, **forwards, anchor_source=config.anchor_source
        ),
        ring_traffic=traffic.ring_cp(
            shape, plan.context_tokens, plan.ranks, request.tensor_parallel
        ),
        phase2_traffic=traffic.phase2_cp(shape, plan.ranks, **forwards, **answers),
        phase2_tp_traffic=traffic.phase2_tp(shape, plan.ranks, **forwards, **answers),
        token_traffic=traffic.phase2_cp(
            shape, plan.ranks, query_tokens=1, answer_tokens=1, **forwards
        ),
        predicted=_predicted(request, shape, config.anchor_source),
        predicted_ring=_predicted(request, shape, None),
    )


def _predicted(request: PlanRequest, shape: ModelShape, anchor_source: str | None) -> Estimate:
    """Predict times on a GPU; `anchor_source` None stands for ring attention."""
    config = request.config
    schemes = {"broadcast": "star", "local": "star-local", None: "ring"}
    return estimate.estimate(
        shape,
        HARDWARE[PREDICTED_ON],
        schemes[anchor_source],
        request.plan,
        tokens_per_forward=config.forward_size("cuda", request.plan.ranks),
        kv_dtype=config.kv_dtype,
        kv_windows=config.kv_windows,
        balance_ranks=config.balance_ranks,
        tensor_parallel=request.tensor_parallel,
    )


def _memory_by_rank(
    request: PlanRequest, shape: ModelShape, tokens_per_forward: int, helps: list[Help]
) -> list[Memory]:
    return [
        cost.memory_per_rank(
            shape,
            request.plan,
            tokens_per_forward=tokens_per_forward,
            tail_tokens=request.queries * (request.query_tokens + request.answer_tokens),
            rank=rank,
            tensor_parallel=request.tensor_parallel,
            looks_twice=request.second_look > 0,
            helps=helps,
            **request.config.kv_settings,
        )
        for rank in range(request.plan.ranks)
    ]


def _warn(request: PlanRequest, model: ModelFacts) -> None:
    plan = request.plan
    warn_beyond_positions(
        model.text_config,
        plan.context_tokens + request.query_tokens + request.answer_tokens,
        is_rescaled=request.rope_scaling is not None,
    )
    if model.is_quantized:
        warnings.warn(
            "the checkpoint is quantized: its weights take less memory than the plain weights"
            " counted here",
            stacklevel=2,
        )
    idle = plan.ranks - plan.num_blocks
    if idle > 0:
        warnings.warn(
            f"{idle} of {plan.ranks} ranks {'is' if idle == 1 else 'are'} idle: the context has"
            f" {counted(plan.num_blocks, 'block')}; lower --block-size or --ranks",
            stacklevel=2,
        )


def warn_beyond_positions(text: Any, needed: int, *, is_rescaled: bool) -> None:
    """Warn if context, query and answer need more positions than the model has, or may have.

    Args:
        text: The model's text config.
        needed: The tokens.
        is_rescaled: True where the user gave the rotary scaling, and knows what it is good for.
    """
    limit, unsure = max_positions(text), None if is_rescaled else doubt(text)
    if unsure is not None and unsure.length < needed <= (limit or needed):
        warnings.warn(
            unsure.warning(needed, "context, query and answer need"),
            stacklevel=3,
        )
    if limit is not None and needed > limit:
        warnings.warn(
            f"context, query and answer need {needed:,} positions, but the model has {limit:,}:"
            " it would refuse to encode this context",
            stacklevel=3,
        )
