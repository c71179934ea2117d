"""Time encodings of one text on a CPU in turn: stock transformers, dense and star of this library.

    python scripts/real_model.py build/smollm2 --dtype float32
    OMP_NUM_THREADS=1 python scripts/prefill_in_turn.py build/smollm2 --tokens 7168 --block 2048

`star-attention bench prefill` measures one method after another, which needs a machine of its own.
Here each repeat runs every method, and the CPU time is printed beside the time that passed: on a
machine that others use, only the ratios of CPU time repeat.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from star_attention import StarLLM


def contenders(model: Any, tokens: int, block_size: int) -> dict[str, Callable[[], Any]]:
    """Return what to time: each encodes the same random token ids."""
    ids = torch.randint(10, model.config.vocab_size, (tokens,))
    dense, star = StarLLM(model, method="dense"), StarLLM(model, block_size=block_size)

    @torch.inference_mode()
    def stock() -> Any:
        return model(input_ids=ids[None], use_cache=True, logits_to_keep=1)

    return {"stock": stock, "dense": lambda: dense.encode(ids), "star": lambda: star.encode(ids)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--tokens", type=int, default=7168)
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="after one that warms up")
    parser.add_argument("--layers", type=int, help="take only so many layers of the model")
    options = parser.parse_args()
    fewer = {} if options.layers is None else {"num_hidden_layers": options.layers}
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **fewer)
    methods = contenders(model.eval(), options.tokens, options.block)
    passed: dict[str, list[float]] = {name: [] for name in methods}
    used: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(1 + options.repeats):
        for name, encode in methods.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            result = encode()
            if repeat:
                passed[name].append(time.perf_counter() - start)
                used[name].append(time.process_time() - start_cpu)
            del result
    for name in methods:
        ratios = [median(times["stock"]) / median(times[name]) for times in (passed, used)]
        print(
            f"{name}: {median(passed[name]):.2f} s, {median(used[name]):.2f} s of CPU;"
            f" {ratios[0]:.2f} and {ratios[1]:.2f} times as fast as stock"
        )


if __name__ == "__main__":
    main()
