"""Settings of a training, and the stages, loss weights and learning rates they result in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from training.data import ANSWER, BOS, TASKS

OPTIMIZERS = ("muon", "adamw")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that determines the model. A checkpoint resumes only with its own settings.

    Attributes:
        hidden, layers, heads, kv_heads, intermediate: Sizes of the model.
        theta: Base of RoPE.
        positions: Positions of the model.
        stages: Lengths of rows, and the tokens that each is trained for.
        tokens: Tokens of a step.
        optimizer: Optimizer of the layers' matrices, one of `OPTIMIZERS`.
        lr: Learning rate of embeddings and norms.
        matrix_lr: Learning rate of the layers' matrices.
        weight_decay: Weight decay of the layers' matrices.
        warmup: Steps over which learning rates rise.
        decay_from: Share of all steps after which learning rates fall linearly to 0.
        weights: Loss weight of a token of an answer, by task (1 for tasks not listed); answers of
            one word would hardly count next to those of a hundred digits.
        rest_weight: Weight of the loss on text that is not an answer.
        z_weight: Weight of the squared log-sum-exp of the logits.
        clip: Largest norm of the gradients.
        bos: "document" if each document begins with `<bos>`, "row" if only the first of a row.
        bos_scale: Initial length of the embedding of `<bos>`, relative to others.
        common: Initial length of the component that all other embeddings share, relative to the
            component that they do not.
        sink: Score of `<bos>` in the first layer at the start, 0 for none.
        seed: Seed of weights and data.
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
                f"sink {self.sink} needs a common component of the embeddings; give --common 1"
            )
        for name, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("bos", self.bos, BOS),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose {' or '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Steps with rows of one length."""

    length: int
    steps: int


def stages_of(settings: Settings) -> list[Stage]:
    """Return the stages of a training.

    Raises:
        ValueError: A length does not divide the tokens of a step.
    """
    units = {"k": 10**3, "m": 10**6}
    stages = []
    for part in settings.stages.split(","):
        length, _, tokens = part.partition(":")
        if settings.tokens % int(length):
            raise ValueError(
                f"a step of {settings.tokens:,} tokens cannot be divided into rows of {length};"
                " give a length that divides it"
            )
        unit = units.get(tokens[-1], 1)
        steps = max(1, round(float(tokens.rstrip("km")) * unit / settings.tokens))
        stages.append(Stage(length=int(length), steps=steps))
    return stages


def row_lengths(stages: list[Stage]) -> Iterator[int]:
    """Yield the row length of each step."""
    for stage in stages:
        yield from [stage.length] * stage.steps


def weights_of(settings: Settings) -> list[float]:
    """Return the weight of a token in the loss on answers, by its value in the mask.

    Raises:
        ValueError: A name is not that of a task.
    """
    weights = {
        task: float(weight)
        for task, weight in (part.split(":") for part in settings.weights.split(","))
    }
    if unknown := weights.keys() - set(TASKS):
        raise ValueError(
            f"tasks {', '.join(sorted(unknown))} in weights are unknown;"
            f" choose from {', '.join(TASKS)}"
        )
    return [0.0] * ANSWER + [weights.get(task, 1.0) for task in TASKS]


def lr_factor(step: int, steps: int, settings: Settings) -> float:
    """Return the factor of the learning rates at a step: up from 0, level, and down to 0."""
    up = min(1.0, (step + 1) / settings.warmup)
    down = min(1.0, (1 - step / steps) / (1 - settings.decay_from))
    return up * max(down, 0.0)
