"""Times of linear layers in fp8, in the shapes of an 8B model: `python -m tests.gpu.time_fp8`.

For 1 to 256 rows: microseconds, and bytes of weights a second, of torch's product in bf16 and of
our kernels. For 16,384 rows: operations a second in bf16, in fp8, and with quantizing. `--tiles`
also tries other sizes of the kernels' tiles. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from star_attention.linear import fp8, triton_few, triton_row, triton_row_fp8

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 2, 8, 16, 32, 64, 128, 256)
MANY = 16384
COPIES_BYTES = 400 << 20
"""Bytes of copies of a weight that are multiplied in turn, so that no cache holds them."""

ROW_TILES = [
    triton_row_fp8.Tile(*each, ahead)
    for each in ((8, 512, 8), (16, 512, 8), (16, 1024, 16), (8, 256, 4), (16, 256, 4))
    for ahead in (1, 2)
]
FEW_TILES = [(64, 128, 2), (64, 128, 4), (64, 256, 2), (128, 128, 1), (128, 128, 2), (32, 256, 4)]
"""Rows and columns of a tile, and programs for each multiprocessor."""


def seconds(calls: list[Callable[[], Any]]) -> float:
    """Return the time of one of several calls, launched from a CUDA graph."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return median(times)


def weights_of(N: int, K: int) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return copies of a weight in bf16, and in fp8 with their scales."""
    plain = nn.init.normal_(torch.empty(N, K, device="cuda", dtype=torch.bfloat16), std=0.02)
    q, scale = fp8.quantize(plain)
    copies = max(2, COPIES_BYTES // q.nbytes)
    return (
        [plain.clone() for _ in range(max(2, copies // 2))],
        [(q.clone(), scale[:, 0].clone()) for _ in range(copies)],
    )


@contextmanager
def tiles_of_rows(tile: triton_row_fp8.Tile) -> Iterator[None]:
    before = triton_row_fp8.tile
    triton_row_fp8.tile = lambda rows, K, gated=False: tile
    try:
        yield
    finally:
        triton_row_fp8.tile = before


@contextmanager
def tiles_of_few(rows: int, columns: int, programs: int) -> Iterator[None]:
    names = ("_BLOCK_N", "_BLOCK_K", "_PROGRAMS")
    before = [getattr(triton_few, name) for name in names]
    for name, value in zip(names, (rows, columns, programs), strict=True):
        setattr(triton_few, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(triton_few, name, value)


def few_rows(name: str, tiles: bool) -> Iterator[dict[str, Any]]:
    N, K = SHAPES[name]
    plain, quantized = weights_of(N, K)
    for rows in ROWS:
        x = torch.randn(rows, 1, K, device="cuda", dtype=torch.bfloat16)

        def measured(x: Tensor = x) -> float:
            return seconds(
                [lambda q=q, s=s: triton_row.linear(x, q, None, scale=s) for q, s in quantized]
            )

        row: dict[str, Any] = dict(layer=name, rows=rows)
        row["bf16_s"] = seconds([lambda w=w, x=x: linear(x, w) for w in plain])
        if rows == 1:
            row["bf16_row_s"] = seconds(
                [lambda w=w, x=x: triton_row.linear(x, w, None) for w in plain]
            )
        row["fp8_s"] = measured()
        row["fp8_bytes_per_s"] = N * K / row["fp8_s"]
        if tiles:
            row["tiles"] = {}
            for tile in ROW_TILES if rows == 1 else FEW_TILES:
                with tiles_of_rows(tile) if rows == 1 else tiles_of_few(*tile):
                    try:
                        row["tiles"][str(tile)] = measured()
                    except Exception as error:
                        row["tiles"][str(tile)] = type(error).__name__
        yield row


def many_rows(name: str) -> dict[str, Any]:
    N, K = SHAPES[name]
    plain, quantized = weights_of(N, K)
    x = torch.randn(1, MANY, K, device="cuda", dtype=torch.bfloat16)
    q, scale = fp8.quantize(x)
    q, scale = q[0], scale[0].contiguous()
    compiled = torch.compile(fp8.linear, dynamic=False)
    flops = 2 * MANY * N * K
    times = dict(
        bf16=seconds([lambda w=w: linear(x, w) for w in plain[:4]]),
        fp8=seconds(
            [
                lambda w=w, s=s: torch._scaled_mm(
                    q,
                    w.t(),
                    scale_a=scale,
                    scale_b=s[None],
                    out_dtype=torch.bfloat16,
                    use_fast_accum=True,
                )
                for w, s in quantized[:4]
            ]
        ),
        with_quantizing=seconds(
            [lambda w=w, s=s: compiled(x, w, s, None, kernels=True) for w, s in quantized[:4]]
        ),
    )
    return dict(layer=name, rows=MANY) | {
        f"{key}_flops_per_s": flops / value for key, value in times.items()
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for name in SHAPES:
        for row in few_rows(name, options.tiles):
            best = ""
            if options.tiles:
                known = {tile: s for tile, s in row["tiles"].items() if isinstance(s, float)}
                best = "; ".join(f"{tile} {s * 1e6:.1f}" for tile, s in known.items())
            print(
                f"{name:9} {row['rows']:5} rows: bf16 {row['bf16_s'] * 1e6:7.1f} us, fp8"
                f" {row['fp8_s'] * 1e6:7.1f} us, {row['fp8_bytes_per_s'] / 1e12:.2f} TB/s  {best}",
                flush=True,
            )
            results.append(row)
        row = many_rows(name)
        rates = ", ".join(
            f"{key.removesuffix('_flops_per_s')} {value / 1e12:,.0f}"
            for key, value in row.items()
            if key.endswith("_flops_per_s")
        )
        print(f"{name:9} {MANY} rows, TFLOP/s: {rates}", flush=True)
        results.append(row)
    print(json.dumps(dict(device=torch.cuda.get_device_name(), rows=results)))


if __name__ == "__main__":
    main()
