"""Settings of the demo."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """The model and the texts of the demo.

    Attributes:
        model: model folder or hub id.
        tokens: length of the longest texts.
        seed: of the first text of each length; further texts take the next seeds.
        facts: number of facts in each text, with one question each.
        samples: number of texts of each length.
        dtype, device: as for `StarLLM.from_pretrained`.
    """

    model: str | os.PathLike[str]
    tokens: int = 16384
    seed: int = 0
    facts: int = 30
    samples: int = 1
    dtype: str = "float32"
    device: str = "auto"
