"""The keywords of `StarLLM.from_pretrained`: which files to load, and what others mean."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from star_attention.config import StarSettings
from star_attention.errors import unknown_option

_INSTEAD = {
    "torch_dtype": "use dtype=",
    "tokenizer": "it is loaded with the model; to use another, set the engine's tokenizer",
    "device_map": "use device=, or to spread the layers model_kwargs={'device_map': 'auto'}",
}


class PretrainedSettings(StarSettings, total=False):
    """The keywords of `StarLLM.from_pretrained` that say which files a model is made of, and how
    its weights are held.

    weights: "fp8" holds the linear layers of all decoder layers but the first and the last in fp8
        (e4m3), with a scale for each output row: about half of the bytes, and faster products on
        GPUs of compute capability 8.9 and above. None leaves them as they are in the files.
    adapter: folder or hub id of a PEFT adapter to load around the model.
    gguf_file: name of a GGUF file in the folder or repository.
    subfolder: folder inside `path` that holds the model.
    revision: branch, tag or commit of a hub id.
    trust_remote_code: run the code that comes with the model.
    calibration: file of `star-attention calibrate` for this model: its settings of look-back,
        unless lookback or lookback_layers are keywords, too.
    """

    weights: str | None
    adapter: str | os.PathLike[str] | None
    gguf_file: str | None
    subfolder: str | None
    revision: str | None
    trust_remote_code: bool
    calibration: str | os.PathLike[str] | None


def check_keywords(names: Iterable[str], *, known: Iterable[str]) -> None:
    """Check the keywords of `StarLLM.from_pretrained`.

    Args:
        names: the keywords of a call.
        known: those that it takes besides the fields of `StarConfig` and the model's files.

    Raises:
        UnknownOptionError: for the first keyword that is none of them.
    """
    known = [*known, *StarSettings.__annotations__, *PretrainedSettings.__annotations__]
    for name in names:
        if name not in known:
            raise unknown_option(
                "from_pretrained()",
                name,
                known=known,
                instead=_INSTEAD,
                otherwise=f"give arguments of transformers as model_kwargs={{{name!r}: ...}}",
            )


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keywords of `from_pretrained` about files, without None, and all others."""
    names = PretrainedSettings.__annotations__.keys() - StarSettings.__annotations__.keys()
    files = {name: settings[name] for name in names if settings.get(name) is not None}
    return files, {name: value for name, value in settings.items() if name not in names}
