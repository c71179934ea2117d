"""Compares the first token of an answer, and encoding, between checkouts of this repository.

    python scripts/first_token.py ../base .
    python scripts/first_token.py ../base . --shapes llama-3.1-8b --tokens 131072 --block 16384

Each checkout runs in a process of its own; they take turns with every measurement, so that what
else the machine does meets both. After a few rounds both start again, since a process keeps its
luck with memory. Both sides use the model, the text and the queries of the second checkout; or
random weights in the shapes of a known model, with queries of 64 random tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

QUESTION = "What is the special magic number for the {} city?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs=2, help="folders: the base, and what is compared")
    parser.add_argument("--model", help="model folder; by default that of the second checkout")
    parser.add_argument("--shapes", help="shapes of random weights, instead of a model")
    parser.add_argument("--block", type=int, help="block size; by default the engine's")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the context")
    parser.add_argument("--processes", type=int, default=3, help="processes of each checkout")
    parser.add_argument("--pairs", type=int, default=60, help="first tokens of each process")
    parser.add_argument("--encodings", type=int, default=6, help="encodings of each process")
    parser.add_argument("--settings", default="{}", help="further keywords of generate, as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no warnings of the checkouts")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments)
        return
    measured = _measure(arguments)
    for what, (base, new) in measured.items():
        if not base:
            continue
        ratios = [b / a for a, b in zip(base, new, strict=True)]
        print(
            f"{what}: {1e3 * median(base):.3f} and {1e3 * median(new):.3f} ms (medians),"
            f" {1e3 * min(base):.3f} and {1e3 * min(new):.3f} ms (minima); ratio of medians"
            f" {median(new) / median(base):.4f}, of minima {min(new) / min(base):.4f},"
            f" median of pairs {median(ratios):.4f}"
        )
    print(json.dumps(measured))


def _measure(arguments: argparse.Namespace) -> dict[str, tuple[list[float], list[float]]]:
    works = {"encode": arguments.encodings, "first": arguments.pairs}
    seconds: dict[str, tuple[list[float], list[float]]] = {work: ([], []) for work in works}
    for process in range(arguments.processes):
        workers = [_started(folder, arguments) for folder in arguments.checkouts]
        answers = [json.loads(worker.stdout.readline()) for worker in workers]
        if answers[0] != answers[1]:
            raise SystemExit(f"the answers differ: {answers}")
        for work, repeats in works.items():
            for number in range(repeats):
                order = (0, 1) if (number + process) % 2 else (1, 0)
                for which in order:
                    seconds[work][which].append(_asked(workers[which], work))
        for worker in workers:
            worker.stdin.close()
            worker.wait()
    return seconds


def _started(folder: str, arguments: argparse.Namespace) -> Any:
    source = (Path(folder) / "src").resolve()
    names = ("shapes", "block", "tokens", "settings")
    values = {name: getattr(arguments, name) for name in names} | {"model": _model(arguments)}
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return subprocess.Popen(
        [sys.executable, __file__, *arguments.checkouts, "--worker", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if arguments.quiet else None,
        text=True,
        env=os.environ | {"PYTHONPATH": str(source)},
    )


def _model(arguments: argparse.Namespace) -> str:
    return arguments.model or str(Path(arguments.checkouts[1], "models", "needle-17m").resolve())


def _asked(worker: Any, work: str) -> float:
    worker.stdin.write(work + "\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def _work(arguments: argparse.Namespace) -> None:
    """Answer each line of the standard input with the seconds of what it names."""
    star, ids, query = _prepared(arguments)
    context, settings = star.encode(ids), json.loads(arguments.settings)

    def first(number: int, tokens: int = 1) -> Any:
        return star.generate(context, query(number), max_new_tokens=tokens, **settings)

    for number in range(5):
        first(number)
    print(json.dumps(first(5, 8).token_ids), flush=True)
    for number, line in enumerate(sys.stdin):
        started = time.perf_counter()
        if line.strip() == "encode":
            star.encode(ids)
        else:
            first(number)
        print(time.perf_counter() - started, flush=True)


def _prepared(arguments: argparse.Namespace) -> tuple[Any, Any, Callable[[int], Any]]:
    """Return an engine, the ids of a context, and what makes different queries of one length."""
    from star_attention import StarLLM

    if arguments.shapes:
        from star_attention.bench.models import load_model, random_ids

        model = load_model(None, arguments.shapes, dtype="auto", device="auto")
        star = StarLLM(model, block_size=arguments.block)
        ids = random_ids(model, arguments.tokens)
        return star, ids, lambda number: random_ids(model, 64, 1 + number)
    star = StarLLM.from_pretrained(arguments.model, block_size=arguments.block)
    words = " ".join(f"The grass of field {number} is green." for number in range(arguments.tokens))
    ids = star.tokenizer(words)["input_ids"][: arguments.tokens]
    return star, ids, lambda number: QUESTION.format(f"{number}th")


if __name__ == "__main__":
    main()
