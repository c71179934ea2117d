"""The special tokens of a tokenizer that comes out of a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from star_attention.hf.text import special

_PREFIX = "tokenizer.ggml."
_NAMES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
"""Attributes of a tokenizer, with the file's fields."""


def with_special_tokens(tokenizer: Any, file: Path) -> Any:
    """Give a tokenizer the special tokens that its file names.

    Earlier releases of transformers (5.17) take the BOS for the EOS, so that answers would not end,
    and leave out the BOS that a file asks for. Later ones pass on what the file says of the BOS.

    Args:
        tokenizer: what transformers made of the file.
        file: the GGUF file.
    """
    if "add_bos_token" in tokenizer.init_kwargs:
        return tokenizer
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    values = {
        name.removeprefix(_PREFIX): field.contents()
        for name, field in fields.items()
        if name.startswith(_PREFIX) and len(field.types) == 1
    }
    for attribute, name in _NAMES.items():
        if name in values:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(values[name])))
    has_setting = hasattr(type(tokenizer), "add_bos_token") and tokenizer.bos_token_id is not None
    if values.get("add_bos_token") is True and has_setting and not special.prefix_ids(tokenizer):
        tokenizer.add_bos_token = True
    return tokenizer
