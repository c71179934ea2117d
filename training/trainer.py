"""Optimizers, losses and checkpoints. Tensor names end in their axes.

B rows, T tokens of a row, N tokens of a batch, V vocabulary, D hidden size
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from training.data import ANSWER, TASKS
from training.model import build_model
from training.settings import Settings, weights_of


class Optimizers:
    """The optimizer of the layers' matrices (Muon or AdamW), and AdamW for everything else.

    Only the matrices have weight decay.
    """

    def __init__(self, model: LlamaForCausalLM, settings: Settings, *, fused: bool) -> None:
        matrices = [
            weight
            for name, weight in model.named_parameters()
            if weight.ndim == 2 and "embed" not in name and "lm_head" not in name
        ]
        ids = {id(weight) for weight in matrices}
        others = [weight for weight in model.parameters() if id(weight) not in ids]
        adam: dict[str, Any] = dict(betas=(0.9, 0.95), eps=1e-8, fused=fused)
        decay = settings.weight_decay
        first: torch.optim.Optimizer
        if settings.optimizer == "muon":
            first = torch.optim.Muon(
                matrices,
                lr=settings.matrix_lr,
                weight_decay=decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
        else:
            first = torch.optim.AdamW(matrices, lr=settings.matrix_lr, weight_decay=decay, **adam)
        second = torch.optim.AdamW(others, lr=settings.lr, weight_decay=0.0, **adam)
        self._lrs = (settings.matrix_lr, settings.lr)
        self._optimizers = (first, second)

    def step(self, factor: float) -> None:
        """Update the weights with learning rates scaled by `factor`."""
        for optimizer, lr in zip(self._optimizers, self._lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()

    def state_dict(self) -> list[Any]:
        """Return the state of both optimizers."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[Any]) -> None:
        """Restore the state of both optimizers."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


_CHUNK = 32768
"""Tokens whose logits are in memory at once; those of a whole step would take gigabytes."""


def _nll(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each token its loss, its log-sum-exp, and True if the target is the likeliest."""
    logits_NV = (hidden_ND @ weight_VD.T).float()
    lse_N = torch.logsumexp(logits_NV, -1)
    return (
        lse_N - logits_NV.gather(-1, targets_N[:, None])[:, 0],
        lse_N,
        logits_NV.argmax(-1) == targets_N,
    )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a batch.

    Attributes:
        total: The loss that is minimized.
        answers: Mean loss of answers, weighted by task.
        rest: Mean loss of other text.
        right_BT: True where the next token is the likeliest.
    """

    total: Tensor
    answers: Tensor
    rest: Tensor
    right_BT: Tensor


class Trainer:
    """A model with its optimizers, at a step of its training.

    Args:
        settings: Settings of the training.
        tokenizer: Tokenizer of the model.
        device: Device of the model.
        compile: True to compile layers and loss.
    """

    def __init__(
        self, settings: Settings, tokenizer: Any, *, device: torch.device, compile: bool
    ) -> None:
        self.settings, self.device = settings, device
        self.model = build_model(settings, tokenizer).to(device).train()
        self.optimizers = Optimizers(self.model, settings, fused=device.type == "cuda")
        self.step = 0
        self._weights = torch.tensor(weights_of(settings), device=device)
        self._nll = torch.compile(_nll, dynamic=False) if compile else _nll
        if compile:
            # From the second length on, a layer is compiled for any length.
            for layer in self.model.model.layers:
                layer.compile()

    def losses(self, ids_BT: Tensor, mask_BT: Tensor) -> Losses:
        """Return the losses of predicting every token but a row's first; filler does not count."""
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
        """Take one step; gradients that are not finite leave the weights as they are."""
        losses = self.losses(ids_BT, mask_BT)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        # Reading the norm also keeps Python from running ahead of the device.
        if bool(torch.isfinite(norm)):
            self.optimizers.step(factor)
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return losses

    @torch.no_grad()
    def accuracy(self, ids_BT: Tensor, mask_BT: Tensor) -> dict[str, tuple[float, int]]:
        """Return for each task the share of right answers, and the number of answers.

        An answer is right if greedy decoding would write it token by token.
        """
        with torch.compiler.set_stance("force_eager"):
            right_BT = self.losses(ids_BT, mask_BT).right_BT.cpu()
        right: dict[str, list[bool]] = defaultdict(list)
        for right_T, mask_T in zip(right_BT, F.pad(mask_BT[:, 1:], (0, 1)).cpu(), strict=True):
            edges = torch.nonzero(
                torch.diff(mask_T.int(), prepend=torch.zeros(1), append=torch.zeros(1))
            )[:, 0].tolist()
            for start, stop in pairwise(edges):
                if mask_T[start] >= ANSWER:
                    task = TASKS[int(mask_T[start]) - ANSWER]
                    right[task].append(bool(right_T[start:stop].all()))
        return {
            task: (sum(answers) / len(answers), len(answers))
            for task, answers in sorted(right.items())
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        state = {
            "settings": dataclasses.asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        """Resume from a checkpoint.

        Raises:
            ValueError: The checkpoint has other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        own = dataclasses.asdict(self.settings)
        for name, value in state["settings"].items():
            if own.get(name) != value:
                raise ValueError(
                    f"{path} was trained with {name} {value!r}, not {own.get(name)!r}; give another"
                    " folder with --out"
                )
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.step = int(state["step"])
