"""A session that rank 0 leads. Usage: led.py FOLDER, where each rank writes rank-N.json."""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from star_attention import StarLLM

MODEL = Path(__file__).parents[2] / "models" / "needle-17m"
STORY = "".join(f"The tea of day {day} is hot and the cup is blue.\n" for day in range(600))
OPTIONS: dict[str, Any] = dict(max_new_tokens=12, ignore_eos=True)
ANSWERS = 200


def lead(star: StarLLM) -> list[Any]:
    """Make calls of every kind, with streams that are left half-way; return the tokens."""
    context = star.encode(STORY)
    tokens = [star.generate(context, "What is the cup like?", **OPTIONS).token_ids]
    tokens += [star.generate(context, "A dog", do_sample=True, seed=5, **OPTIONS).token_ids]
    replies = star.generate(context, ["A dog", "What is hot here?", "Rain"], **OPTIONS)
    tokens += [reply.token_ids for reply in replies]
    stream = star.stream(context, "A dog", **OPTIONS)
    next(stream)
    # The others wait for the rest of the stream.
    time.sleep(2)
    next(star.stream(context, "Rain", **OPTIONS))
    gc.collect()
    closed = star.stream(context, "Rain", **OPTIONS)
    next(closed)
    closed.close()
    tokens += [star.generate(context, "A dog", num_beams=2, **OPTIONS).token_ids]
    longer = star.extend(context, "The cup is green.\n")
    del context
    tokens += [star.generate(longer, "A dog", **OPTIONS).token_ids]
    for _ in stream:
        pass
    return [*tokens, stream.result.token_ids]


def answer_often(star: StarLLM, answers: int) -> list[Any]:
    """Answer many times on contexts that come and go."""
    for number in range(answers):
        if number % 20 == 0:
            context = star.encode(STORY)
        if number % 10 == 0:
            next(star.stream(context, "A dog", **OPTIONS))
        star.generate(context, "A dog", max_new_tokens=2, ignore_eos=True)
    return []


def main() -> None:
    star = StarLLM.from_pretrained(MODEL, dtype="float32", block_size="1k")
    result: dict[str, Any] = dict(allocated=[])
    for work, *arguments in ((lead,), (answer_often, 40), (answer_often, ANSWERS)):
        if star.rank > 0:
            star.follow()
        else:
            result[f"tokens of {work.__name__}"] = work(star, *arguments)
            star.close()
        gc.collect()
        torch.cuda.synchronize()
        result["allocated"].append(torch.cuda.memory_allocated())
    graphs = star.runtime.handle.graphs
    result["graphs"] = 0 if graphs is None else sum(graphs.captured.values())
    Path(sys.argv[1], f"rank-{star.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
