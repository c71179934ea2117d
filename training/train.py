"""Train the bundled model from scratch on the tasks of the evaluations, in pieces: each call goes on where the last one stopped.

    python -m training.train --out runs/needle --minutes 9        # again and again, until it says that it is done

A step has the same number of tokens at every length, and lengths grow stage by stage: retrieval is learned on short texts, within
about forty million tokens, and carried over to long ones. Training depends on the settings and the seed, not on the clock; only
where a piece ends does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from training import data
from training.data import ANSWER

OPTIMIZERS = ("muon", "adamw")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a model is made of. A checkpoint goes on only with the settings that it was begun with.

    stages: lengths of rows, each with the tokens that it is trained for. tokens: of a step. optimizer: muon or adamw, of the
    layers' matrices, whose rate is matrix_lr. warmup: steps. decay_from: share of all steps after which learning rates fall
    linearly, to nothing at the end. weights: of a token of an answer, by task; answers of one word would hardly count beside
    those of a hundred digits. rest_weight: of the loss on text that is no answer. bos: whether each document begins with
    `<bos>`, or the first of a row alone. bos_scale: how many times as long as another token's its embedding is at first.
    common: length of what all other embeddings have in common at first, relative to what they do not. sink: the score of `<bos>`
    that the first layer begins with, 0 for none.
    """

    hidden: int = 384
    layers: int = 10
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 1024
    theta: float = 500000.0
    positions: int = 65536
    stages: str = "512:110m,1024:110m,2048:110m,4096:150m,8192:150m,16384:130m,32768:80m"
    tokens: int = 131072
    optimizer: str = "muon"
    lr: float = 1.2e-3
    matrix_lr: float = 2.2e-3
    weight_decay: float = 0.1
    warmup: int = 100
    decay_from: float = 0.6
    weights: str = (
        "vt:1.5,multivalue:1.5,multiquery:1.5,cwe:2,fwe:3,qa1:5,qa2:6,qa3:6,qa4:5,qa5:5,math_find:5"
    )
    rest_weight: float = 0.5
    z_weight: float = 1e-4
    clip: float = 1.0
    bos: str = "document"
    bos_scale: float = 16.0
    common: float = 1.0
    sink: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sink and not self.common:
            raise ValueError(
                f"sink {self.sink} needs a common component of embeddings to be found by; give --common 1"
            )
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("bos", self.bos, data.BOS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose {' or '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    length: int
    steps: int


def stages_of(settings: Settings) -> list[Stage]:
    """Raises `ValueError` for a length that does not divide a step's tokens."""
    units = {"k": 10**3, "m": 10**6}
    stages = []
    for part in settings.stages.split(","):
        length, _, tokens = part.partition(":")
        if settings.tokens % int(length):
            raise ValueError(
                f"a step of {settings.tokens:,} tokens holds no whole rows of {length}"
            )
        unit = units.get(tokens[-1], 1)
        steps = max(1, round(float(tokens.rstrip("km")) * unit / settings.tokens))
        stages.append(Stage(length=int(length), steps=steps))
    return stages


def weights_of(settings: Settings) -> list[float]:
    """Of a token in the loss on answers, by what the mask says of it.

    Raises `ValueError` for a name that is no task.
    """
    given = {
        task: float(weight)
        for task, weight in (part.split(":") for part in settings.weights.split(","))
    }
    if unknown := given.keys() - set(data.TASKS):
        raise ValueError(
            f"no task is named {', '.join(sorted(unknown))}; there are {', '.join(data.TASKS)}"
        )
    return [0.0] * ANSWER + [given.get(task, 1.0) for task in data.TASKS]


def built(settings: Settings, tokenizer: Any) -> LlamaForCausalLM:
    """The model with fresh weights, in fp32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=settings.positions,
        rope_parameters={"rope_type": "default", "rope_theta": settings.theta},
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        if name.endswith(
            ("o_proj.weight", "down_proj.weight")
        ):  # what is added to the residual stream, layer by layer
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * settings.layers))
    _plant_sink(model, tokenizer.bos_token_id, settings)
    return model


@torch.no_grad()
def _plant_sink(model: LlamaForCausalLM, bos: int, settings: Settings) -> None:
    """Let every query find `<bos>` from the first step on, as queries of large models do.

    Queries know each other by what all embeddings but that of `<bos>` have in common, keys of `<bos>` by its own embedding; both
    are written to the dimension of each head that RoPE turns least, so that the score is the same at every distance.
    """
    embed_VD, size = model.get_input_embeddings().weight, settings.hidden // settings.heads
    common_D, bos_D = (
        F.normalize(torch.randn(settings.hidden), dim=0),
        F.normalize(embed_VD[bos], dim=0),
    )
    length = settings.common * 0.02 * math.sqrt(settings.hidden)
    own_D = settings.bos_scale * embed_VD[bos]
    embed_VD += length * common_D
    embed_VD[bos] = own_D
    if not settings.sink:
        return
    # What a first layer sees of either direction: all of sqrt(hidden) of `<bos>`, this share of it of any other token.
    share = settings.common / math.hypot(1, settings.common)
    factor = math.sqrt(settings.sink * math.sqrt(size) / (share * settings.hidden))
    for layer in model.model.layers:
        slowest = slice(size // 2 - 1, None, size)
        layer.self_attn.q_proj.weight[slowest] += factor * common_D
        layer.self_attn.k_proj.weight[slowest] += factor * bos_D


class Optimizers:
    """Muon for the matrices of the layers (or AdamW with weight decay), AdamW without for embeddings and norms."""

    def __init__(self, model: LlamaForCausalLM, settings: Settings, *, fused: bool) -> None:
        matrices = [
            p
            for n, p in model.named_parameters()
            if p.ndim == 2 and "embed" not in n and "lm_head" not in n
        ]
        inside = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in inside]
        adam: dict[str, Any] = dict(betas=(0.9, 0.95), eps=1e-8, fused=fused)
        decay = settings.weight_decay
        first: torch.optim.Optimizer
        if settings.optimizer == "muon":
            words: dict[str, Any] = dict(momentum=0.95, adjust_lr_fn="match_rms_adamw")
            first = torch.optim.Muon(matrices, lr=settings.matrix_lr, weight_decay=decay, **words)
        else:
            first = torch.optim.AdamW(matrices, lr=settings.matrix_lr, weight_decay=decay, **adam)
        self._rates = (settings.matrix_lr, settings.lr)
        self._both = (first, torch.optim.AdamW(others, lr=settings.lr, weight_decay=0.0, **adam))

    def step(self, factor: float) -> None:
        for optimizer, rate in zip(self._both, self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()

    def state_dict(self) -> list[Any]:
        return [optimizer.state_dict() for optimizer in self._both]

    def load_state_dict(self, states: list[Any]) -> None:
        for optimizer, state in zip(self._both, states, strict=True):
            optimizer.load_state_dict(state)


_CHUNK = 32768
"""Tokens whose logits are there at once: all of a step's would take gigabytes."""


def _nll(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token its loss, its log-sum-exp, and whether the target is the likeliest."""
    logits_NV = (hidden_ND @ weight_VD.T).float()
    lse_N = torch.logsumexp(logits_NV, -1)
    return (
        lse_N - logits_NV.gather(-1, targets_N[:, None])[:, 0],
        lse_N,
        logits_NV.argmax(-1) == targets_N,
    )


@dataclass(frozen=True, kw_only=True)
class Losses:
    total: Tensor
    answers: Tensor
    rest: Tensor
    right_BT: Tensor


class Trainer:
    def __init__(
        self, settings: Settings, tokenizer: Any, *, device: torch.device, compile: bool
    ) -> None:
        self.settings, self.device = settings, device
        self.model = built(settings, tokenizer).to(device).train()
        self.optimizers = Optimizers(self.model, settings, fused=device.type == "cuda")
        self.step = 0
        self._weights = torch.tensor(weights_of(settings), device=device)
        self._nll = torch.compile(_nll, dynamic=False) if compile else _nll
        if compile:
            for layer in self.model.model.layers:
                layer.compile()  # (of the second length on for any length)

    def losses(self, ids_BT: Tensor, mask_BT: Tensor) -> Losses:
        """Every token but the first of a row is predicted; filler counts nowhere."""
        settings = self.settings
        targets_BT, kind_BT = F.pad(ids_BT[:, 1:], (0, 1)), F.pad(mask_BT[:, 1:], (0, 1))
        with torch.autocast(self.device.type, torch.bfloat16):
            hidden_BTD = self.model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
            weight_VD = self.model.get_output_embeddings().weight
            parts = [
                self._nll(hidden, weight_VD, targets)
                for hidden, targets in zip(
                    hidden_BTD.flatten(0, 1).split(_CHUNK),
                    targets_BT.flatten().split(_CHUNK),
                    strict=True,
                )
            ]
        nll_N, lse_N, right_N = (torch.cat(part) for part in zip(*parts, strict=True))
        kind_N = kind_BT.flatten()
        answer_N, rest_N = self._weights[kind_N], (kind_N == 1).float()
        answers = (nll_N * answer_N).sum() / answer_N.sum().clamp(min=1)
        rest = (nll_N * rest_N).sum() / rest_N.sum().clamp(min=1)
        drift = (lse_N.square() * (kind_N > 0)).mean()
        total = answers + settings.rest_weight * rest + settings.z_weight * drift
        return Losses(total=total, answers=answers, rest=rest, right_BT=right_N.view_as(ids_BT))

    def train(self, ids_BT: Tensor, mask_BT: Tensor, factor: float) -> Losses:
        losses = self.losses(ids_BT, mask_BT)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        if bool(torch.isfinite(norm)):  # (and the host waits here, so that it does not run ahead)
            self.optimizers.step(factor)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    @torch.no_grad()
    def accuracy(self, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, tuple[float, int]]:
        """Of each task the share of answers that greedy decoding would write, token by token, and their number."""
        with torch.compiler.set_stance("force_eager"):
            right_BT = self.losses(ids_BT, mask_BT).right_BT.cpu()
        found: dict[str, list[bool]] = defaultdict(list)
        for right_T, mask_T in zip(right_BT, F.pad(mask_BT[:, 1:], (0, 1)).cpu(), strict=True):
            edges = torch.nonzero(
                torch.diff(mask_T.int(), prepend=torch.zeros(1), append=torch.zeros(1))
            )[:, 0].tolist()
            for start, stop in pairwise(edges):
                if mask_T[start] >= ANSWER:
                    found[data.TASKS[int(mask_T[start]) - ANSWER]].append(
                        bool(right_T[start:stop].all())
                    )
        return {task: (sum(all_) / len(all_), len(all_)) for task, all_ in sorted(found.items())}

    # ------------------------------------------------------------------ checkpoints

    def save(self, path: Path) -> None:
        state = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        """Raises `ValueError` for a checkpoint of other settings."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        ours = dataclasses.asdict(self.settings)
        for name, value in state["settings"].items():
            if ours.get(name) != value:
                raise ValueError(
                    f"{path} was begun with {name} {value!r}, not {ours.get(name)!r}; name another --out"
                )
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.step = int(state["step"])


def factor_of(step: int, steps: int, settings: Settings) -> float:
    """Of the learning rates at a step: up from nothing, level, and down to nothing."""
    up = min(1.0, (step + 1) / settings.warmup)
    down = min(1.0, (1 - step / steps) / (1 - settings.decay_from))
    return up * max(down, 0.0)


def lengths_of(stages: list[Stage]) -> Iterator[int]:
    """The row length of every step."""
    for stage in stages:
        yield from [stage.length] * stage.steps


def export(model: LlamaForCausalLM, tokenizer_folder: Path, out: Path) -> None:
    """The model as transformers loads it, in bf16, with the tokenizer's files."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(
        {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    )
    half.generation_config.do_sample = False
    half.save_pretrained(out, max_shard_size="15MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, out / name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the checkpoint, the log and the model so far",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this piece")
    parser.add_argument("--steps", type=int, help="most steps of this piece")
    parser.add_argument(
        "--tokenizer", type=Path, default=data.TOKENIZER, help="folder of the tokenizer"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, (os.cpu_count() or 2) - 2),
        help="processes that make data",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--init", type=Path, help="begin with the weights of this model instead of fresh ones"
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--every", type=float, default=30.0, help="seconds between lines of the log"
    )
    for field in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default
        )
    given = vars(parser.parse_args(arguments))
    settings = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})
    run(settings, given)


def run(settings: Settings, given: dict[str, Any]) -> None:
    started = time.monotonic()
    out, device = given["out"], torch.device(given["device"])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = data.load_tokenizer(given["tokenizer"])
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(
        settings,
        tokenizer,
        device=device,
        compile=device.type == "cuda" and not given["no_compile"],
    )
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        if given["init"] is not None:
            raise ValueError(
                f"{checkpoint} is there, and goes on without --init; name another --out, or leave --init out"
            )
        trainer.load(checkpoint)
    elif given["init"] is not None:
        trainer.model.load_state_dict(
            LlamaForCausalLM.from_pretrained(given["init"], dtype="float32").state_dict()
        )
    lengths = list(lengths_of(stages_of(settings)))
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    print(
        f"{parameters / 1e6:.1f}M parameters, {len(lengths):,} steps, from step {trainer.step:,}",
        flush=True,
    )

    def batch(rows: tuple[Any, Any]) -> tuple[Tensor, Tensor]:
        return tuple(
            torch.as_tensor(part).to(device, torch.int64, non_blocking=True) for part in rows
        )  # type: ignore[return-value]

    # (Each step has a seed of its own, so that a piece that goes on sees what it would have seen.)
    stop = (
        len(lengths) if given["steps"] is None else min(len(lengths), trainer.step + given["steps"])
    )
    shapes = [
        (step, settings.tokens // lengths[step], lengths[step])
        for step in range(trainer.step, stop)
    ]
    with data.Feed(
        shapes, settings.seed, given["tokenizer"], workers=given["workers"], bos=settings.bos
    ) as feed:
        held_out: dict[int, tuple[Tensor, Tensor]] = {}
        said, tokens, losses = time.monotonic(), 0, None
        for (step, rows, length), made in zip(shapes, feed, strict=False):
            if time.monotonic() - started > given["minutes"] * 60:
                break
            losses = trainer.train(*batch(made), factor_of(step, len(lengths), settings))
            tokens += rows * length
            if time.monotonic() - said < given["every"] and step + 1 < stop:
                continue
            if length not in held_out:
                held_out = {
                    length: batch(
                        data.held_out(rows, length, settings.seed, given["tokenizer"], settings.bos)
                    )
                }
            spent = time.monotonic() - said
            line = {
                "step": step + 1,
                "length": length,
                "tokens_per_s": round(tokens / spent),
                "answers": round(float(losses.answers.detach()), 4),
                "rest": round(float(losses.rest.detach()), 4),
                "right": {
                    task: [round(a, 3), n]
                    for task, (a, n) in trainer.accuracy(*held_out[length]).items()
                },
            }
            print(json.dumps(line), flush=True)
            with (out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            said, tokens = time.monotonic(), 0
    trainer.save(checkpoint)
    export(trainer.model, given["tokenizer"], out / "model")
    if trainer.step == len(lengths):
        print(f"done: {out / 'model'}", flush=True)
    else:
        print(f"step {trainer.step:,} of {len(lengths):,}; call again to go on", flush=True)


if __name__ == "__main__":
    main()
