"""The costs of a plan as text: a picture of the blocks, and tables."""

from __future__ import annotations

from star_attention.cli.formatting import format_bytes, format_quantity, table
from star_attention.cli.plan_costs import PREDICTED_ON, PlanCosts
from star_attention.planning.sizes import counted, format_size
from star_attention.planning.windows import LAST

DENSE_NOTE = "one block is dense attention; --block-size cuts the context into blocks"

_FLOP = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")


def costs_as_text(costs: PlanCosts) -> str:
    """Return the picture of the plan, and tables of memory, operations and traffic."""
    plan = str(costs.request.plan)
    if costs.request.plan.is_dense:
        plan += "\n" + DENSE_NOTE
    parts = [plan, _model(costs), _memory(costs), _operations(costs)]
    if costs.devices > 1:
        parts.append(_traffic(costs))
    parts.append(_times(costs))
    return "\n\n".join(parts)


def _model(costs: PlanCosts) -> str:
    shape = costs.shape
    widest = max(shape.attention, key=lambda call: call.heads)
    windowed = sum(call.window is not None for call in shape.attention)
    window = f", {windowed} with a sliding window" if windowed else ""
    quantized = ""
    if shape.weights is not None:
        quantized = f" ({shape.quantizable_parameters:,} of them in {shape.weights})"
    if windowed and costs.request.config.kv_windows == LAST:
        window += " (the last one is kept)"
    return (
        f"model {costs.request.model} ({shape.name}): {shape.parameters:,} parameters of"
        f" {shape.bytes_per_element} bytes{quantized}, {counted(shape.layers, 'layer')}{window}\n"
        f"attention: {counted(widest.heads, 'query head')}, {counted(widest.kv_heads, 'KV head')},"
        f" key size {widest.k_head_size}, value size {widest.v_head_size};"
        f" {costs.kv_bytes_per_token:,} bytes of keys and values per token"
    )


def _memory(costs: PlanCosts) -> str:
    memory, plan = costs.memory, costs.request.plan
    largest = format_size(min(costs.tokens_per_forward, plan.context_tokens))
    rows = [
        ("weights", memory.weights, ""),
        ("keys and values", memory.kv, "of its blocks" if plan.ranks > 1 else ""),
        ("  once more", memory.copy, "while a second look's answer lasts"),
        ("anchor", memory.anchor, "of the first block, as computed"),
        ("queries and answers", memory.tail, ""),
        ("working memory", memory.working, f"estimate, up to {largest} tokens per forward"),
        ("total", memory.total, ""),
        ("host memory", memory.host, "keys and values"),
    ]
    optional = ("anchor", "host memory", "  once more")
    shown = table(
        [
            (name, format_bytes(size), remark)
            for name, size, remark in rows
            if size or name not in optional
        ]
    )
    return f"{_memory_heading(costs)}{shown}\n{_saved(costs)}"


def _saved(costs: PlanCosts) -> str:
    """Say what the saved context takes, and what it would take in a smaller precision."""
    kv_dtype = costs.request.config.kv_dtype
    size, smallest = costs.saved_bytes(kv_dtype), costs.saved_bytes("fp8")
    offer = f"; {format_bytes(smallest)} with --kv-dtype fp8" if smallest < size else ""
    return f"saved context: {format_bytes(size)}{offer}"


def _memory_heading(costs: PlanCosts) -> str:
    totals = [memory.total for memory in costs.memory_by_rank]
    heading = "memory of the fullest device" if costs.devices > 1 else "memory"
    if len(set(totals)) > 1:
        fullest = totals.index(costs.memory.total)
        others = [total for rank, total in enumerate(totals) if rank != fullest]
        least, most = format_bytes(min(others)), format_bytes(max(others))
        rest = least if least == most else f"{least} to {most}"
        heading += f" (rank {fullest}; total of the others: {rest})"
    return heading + "\n"


def _operations(costs: PlanCosts) -> str:
    request = costs.request
    columns = {"star": costs.star, "dense": costs.dense, "official": costs.official}
    if request.plan.lookback:
        columns = {"star": costs.star, "without look-back": costs.paper, **columns}
    rows: list[tuple[str, ...]] = [("phase 1", *columns)]
    for part in ("linear", "attention", "expansion", "total"):
        if part != "expansion" or costs.shape.expansion_parameters:
            counts = (getattr(flops, part) for flops in columns.values())
            rows.append((f"  {part}", *(_flop(count) for count in counts)))
    ratios = (flops.total / costs.star.total for flops in columns.values())
    rows.append(("  relative to star", *(f"x {ratio:.2f}" for ratio in ratios)))
    if costs.devices > 1:
        rows.append(("  busiest device", _flop(costs.star_busiest), *[""] * (len(columns) - 1)))
    rows.append(("phase 2", *(_flop(costs.answers.total) for _ in columns)))
    if request.second_look:
        # The other methods have none, and without look-back it would see more.
        rest = [""] * (len(columns) - 1)
        rows.append(("  second look", _flop(costs.second_look.total), *rest))
    answers = f"{request.queries} x ({request.query_tokens:,} + {request.answer_tokens:,}) tok"
    heading = f"operations (phase 2: {answers}, the same for each)\n"
    return heading + table(rows) + _helped(costs)


def _helped(costs: PlanCosts) -> str:
    """Say what rank 0 computes for other ranks."""
    layers = [f"{given.layers} for rank {given.rank}" for given in costs.helps]
    if not layers:
        return ""
    return (
        f"\nrank 0 also computes first layers (of {costs.shape.layers}) of other ranks' last"
        f" blocks: {', '.join(layers)}"
    )


def _flop(count: int) -> str:
    return format_quantity(count, _FLOP, 1000)


def _traffic(costs: PlanCosts) -> str:
    traffics = [
        ("phase 1", costs.phase1_traffic, _phase1_remark(costs)),
        ("  ring attention", costs.ring_traffic, "for comparison"),
        ("phase 2", costs.phase2_traffic, "states of all answers"),
    ]
    rows: list[tuple[str, ...]] = [
        (name, format_bytes(traffic.bytes), counted(traffic.calls, "collective"), remark)
        for name, traffic, remark in traffics
    ]
    rows.append(("  per answer token", format_bytes(costs.token_traffic.bytes), "", ""))
    if costs.request.tensor_parallel > 1:
        for name, traffic in (
            ("phase 1, tensor parallel", costs.phase1_tp_traffic),
            ("phase 2, tensor parallel", costs.phase2_tp_traffic),
        ):
            calls = counted(traffic.calls, "collective")
            rows.append((name, format_bytes(traffic.bytes), calls, "sums of partial results"))
    return "traffic between devices, all together\n" + table(rows)


def _phase1_remark(costs: PlanCosts) -> str:
    if costs.request.plan.lookback:
        return "the anchor to every rank, and blocks to those that look back to them"
    remark = "the anchor to every rank"
    return f"{remark}, layers to {len(costs.helps)}" if costs.helps else remark


def _times(costs: PlanCosts) -> str:
    star, ring = costs.predicted, costs.predicted_ring
    devices = counted(costs.devices, "device")
    heading = f"predicted times on {devices} of {PREDICTED_ON} (others: star-attention estimate)"
    dense = "ring attention" if costs.request.plan.ranks > 1 else "dense attention"
    rows: list[tuple[str, ...]] = [
        ("phase 1", _time(star.encode_s), f"{dense}: {_time(ring.encode_s)}"),
        ("per answer token", _time(star.token_s), _in_slices(star.sliced_token_s)),
    ]
    return f"{heading}\n{table(rows)}"


def _in_slices(token_s: float | None) -> str:
    return "" if token_s is None else f"with weights in slices: {_time(token_s)}"


def _time(seconds: float) -> str:
    return f"{seconds:,.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:,.3g} ms"
