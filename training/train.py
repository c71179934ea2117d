"""Train the bundled model from scratch on the evaluations' tasks, in one or several runs.

Each run resumes from the checkpoint of the last:

    python -m training.train --out runs/needle --minutes 9        # repeat until it prints "done"

A step has the same number of tokens at every length, and lengths grow stage by stage: retrieval is
learned on short texts, within about forty million tokens, and carried over to long ones. The result
depends on settings and seed, not on time, which only decides where a run ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from training.data import Feed, Shape, held_out
from training.model import export
from training.settings import Settings, lr_factor, row_lengths, stages_of
from training.text import TOKENIZER, load_tokenizer
from training.trainer import Losses, Trainer


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, by default those of the command line, and train for one run."""
    parsed = _parser().parse_args(arguments)
    values = vars(parsed)
    settings = Settings(
        **{field.name: values[field.name] for field in dataclasses.fields(Settings)}
    )
    run(settings, parsed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for checkpoint, log and current model"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="duration of this run")
    parser.add_argument("--steps", type=int, help="most steps of this run")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="folder of the tokenizer")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that make data",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--init", type=Path, help="model whose weights to start from, instead of fresh ones"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--every", type=float, default=30.0, help="seconds between lines of the log"
    )
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    return parser


def run(settings: Settings, arguments: argparse.Namespace) -> None:
    """Train for one run.

    Args:
        settings: Settings of the training.
        arguments: The other arguments of the command line.

    Raises:
        ValueError: The checkpoint has other settings, or there is one and `--init` was given.
    """
    deadline = time.monotonic() + arguments.minutes * 60
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    trainer = _trainer(settings, arguments)
    lengths = list(row_lengths(stages_of(settings)))
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, {len(lengths):,} steps, from step {trainer.step:,}",
        flush=True,
    )
    stop = len(lengths)
    if arguments.steps is not None:
        stop = min(stop, trainer.step + arguments.steps)
    shapes = [
        (step, settings.tokens // lengths[step], lengths[step])
        for step in range(trainer.step, stop)
    ]
    log = _Log(trainer, arguments, last_step=stop - 1)
    # Each step has its own seed, so that a resumed training sees the same data.
    with Feed(
        shapes, settings.seed, arguments.tokenizer, workers=arguments.workers, bos=settings.bos
    ) as feed:
        for shape, batch in zip(shapes, feed, strict=False):
            if time.monotonic() > deadline:
                break
            factor = lr_factor(shape[0], len(lengths), settings)
            losses = trainer.train(*_on_device(batch, trainer.device), factor)
            log.step(shape, losses)
    trainer.save(_checkpoint(out))
    export(trainer.model, arguments.tokenizer, out / "model")
    if trainer.step == len(lengths):
        print(f"done: {out / 'model'}", flush=True)
    else:
        print(
            f"step {trainer.step:,} of {len(lengths):,}; repeat the command to continue", flush=True
        )


def _checkpoint(out: Path) -> Path:
    return out / "checkpoint.pt"


def _trainer(settings: Settings, arguments: argparse.Namespace) -> Trainer:
    """Return a trainer with the weights of the checkpoint, of `--init`, or fresh ones."""
    device = torch.device(arguments.device)
    trainer = Trainer(
        settings,
        load_tokenizer(arguments.tokenizer),
        device=device,
        compile=device.type == "cuda" and not arguments.no_compile,
    )
    checkpoint = _checkpoint(arguments.out)
    if checkpoint.exists():
        if arguments.init is not None:
            raise ValueError(
                f"{checkpoint} exists and resumes without --init; give another folder with --out,"
                " or leave --init out"
            )
        trainer.load(checkpoint)
    elif arguments.init is not None:
        trainer.model.load_state_dict(
            LlamaForCausalLM.from_pretrained(arguments.init, dtype="float32").state_dict()
        )
    return trainer


def _on_device(batch: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    ids, mask = (part.to(device, torch.int64, non_blocking=True) for part in batch)
    return ids, mask


class _Log:
    """Prints progress, and writes it to `log.jsonl`, every `--every` seconds."""

    def __init__(self, trainer: Trainer, arguments: argparse.Namespace, *, last_step: int) -> None:
        self._trainer = trainer
        self._arguments = arguments
        self._last_step = last_step
        self._held_out: dict[int, tuple[Tensor, Tensor]] = {}
        self._start = time.monotonic()
        self._tokens = 0

    def step(self, shape: Shape, losses: Losses) -> None:
        """Count a step, and write a line if it is time or the step is the run's last."""
        step, rows, length = shape
        self._tokens += rows * length
        elapsed = time.monotonic() - self._start
        if elapsed < self._arguments.every and step < self._last_step:
            return
        accuracy = self._trainer.accuracy(*self._held_out_batch(rows, length))
        line = {
            "step": step + 1,
            "length": length,
            "tokens_per_s": round(self._tokens / elapsed),
            "answers": round(float(losses.answers.detach()), 4),
            "rest": round(float(losses.rest.detach()), 4),
            "right": {
                task: [round(share, 3), number] for task, (share, number) in accuracy.items()
            },
        }
        print(json.dumps(line), flush=True)
        with (self._arguments.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        self._start, self._tokens = time.monotonic(), 0

    def _held_out_batch(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """Return held-out rows of this length, of which one length at a time is kept."""
        if length not in self._held_out:
            settings = self._trainer.settings
            batch = held_out(rows, length, settings.seed, self._arguments.tokenizer, settings.bos)
            self._held_out = {length: _on_device(batch, self._trainer.device)}
        return self._held_out[length]


if __name__ == "__main__":
    main()
