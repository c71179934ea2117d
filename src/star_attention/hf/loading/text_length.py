"""Texts that are far too long for a model, found before torch is imported."""

from __future__ import annotations

from star_attention.hf.loading.files import ModelFiles

_CHARACTERS_PER_TOKEN = 6
"""More than the tokens of usual texts have: shorter texts are counted when they are encoded."""


def least_tokens(model: ModelFiles, text: str, limit: int) -> int:
    """Return a number of tokens that a text has at least; 0 if it may well be within a limit.

    Counts by the tokenizer's file alone, without the tokens that templates add. Not all of a long
    text is read.

    Args:
        model: the model.
        text: the text.
        limit: positions of the model.
    """
    if len(text) <= _CHARACTERS_PER_TOKEN * limit or model.tokenizer_folder is None:
        return 0
    file = model.tokenizer_folder / "tokenizer.json"
    if not file.is_file():
        return 0

    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:
        # The reader's errors have no type of their own. What is wrong is found when it is loaded.
        return 0
    tokenizer.no_truncation()
    part = text[: 2 * _CHARACTERS_PER_TOKEN * limit]
    return len(tokenizer.encode(part, add_special_tokens=False).ids)
