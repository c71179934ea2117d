"""Text to token ids and back, and the check of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from star_attention.errors import TokenError
from star_attention.hf.text import special
from star_attention.hf.text.checks import bytes_remedy
from star_attention.hf.text.messages import is_messages

_NOT_IDS = (bytes, bytearray, dict, set, frozenset)
"""Types that can be iterated, but are no row of token ids."""


def is_several(content: Any) -> bool:
    """Return True for a list of contexts or queries, False for token ids or chat messages."""
    if isinstance(content, Tensor):
        return content.dim() == 2 and content.shape[0] > 1
    if not isinstance(content, (list, tuple)) or is_messages(content):
        return False
    return any(
        item.dim() > 0 if isinstance(item, Tensor) else isinstance(item, Sized) for item in content
    )


def context_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize a context after what the tokenizer writes before every text, and without an EOS.

    A text that begins with a BOS of its own has one.

    Args:
        tokenizer: a transformers tokenizer.
        text: the context.
    """
    return special.with_prefix(special.prefix_ids(tokenizer), special.plain_ids(tokenizer, text))


def query_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize text that follows a context, without adding special tokens."""
    return special.plain_ids(tokenizer, text)


def decode(tokenizer: Any, ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """Return the text of token ids, by default without special tokens."""
    text: str = tokenizer.decode(
        ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text


def decoder(tokenizer: Any, *, skip_special_tokens: bool = True) -> Callable[[list[int]], str]:
    """Return `decode` for many short calls: around most tokenizers transformers takes longer."""
    names, usual = ("decode", "_decode"), PreTrainedTokenizerFast
    is_usual = isinstance(tokenizer, usual) and all(
        name not in vars(tokenizer) and getattr(type(tokenizer), name) is getattr(usual, name)
        for name in names
    )
    if not is_usual:
        return partial(decode, tokenizer, skip_special_tokens=skip_special_tokens)
    return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=skip_special_tokens)


_ROLES = ("system", "developer", "user", "human", "assistant", "ai", "tool")
_MESSAGE = '{"role": ..., "content": ...}'


def _described(items: list[Any]) -> str:
    """Describe a list that is no row of token ids, with what to do about it."""
    item = items[0]
    count = "1 item" if len(items) == 1 else f"{len(items):,} items, the first"
    text = f"{count} of type {type(item).__name__}"
    if len(items) == 2 and str(item) in _ROLES:
        return f"{text}; write a message as {_MESSAGE}"
    if isinstance(item, dict) or hasattr(item, "role"):
        return f"{text}; give a list of messages, each {_MESSAGE}"
    if isinstance(item, str):
        return f"{text}; join the texts into one"
    if isinstance(item, (int, list, tuple)):
        return f"{text}; token ids are one row of integers"
    return text


def checked_ids(ids: Any, name: str, vocab_size: int) -> Tensor:
    """Return token ids as an int64 tensor `[tokens]` on CPU.

    Raises:
        TokenError: no tokens, ids outside the vocabulary, or another type; `name` says of what.
    """
    is_file = hasattr(ids, "read")
    if is_file or isinstance(ids, _NOT_IDS) or not isinstance(ids, (Tensor, Iterable)):
        remedy = "; put a single message into a list" if isinstance(ids, dict) else ""
        remedy = "; give its messages" if remedy and "messages" in ids else remedy
        remedy = "; give its text, file.read()" if is_file else remedy
        if isinstance(ids, (bytes, bytearray)):
            remedy = f"; {bytes_remedy(ids)}"
        raise TokenError(
            f"the {name} must be text, token ids or chat messages, got {type(ids).__name__}{remedy}"
        )
    if not isinstance(ids, Tensor) and hasattr(ids, "input_ids"):
        raise TokenError(f"the {name} is a tokenizer's output; give its input_ids")
    items = [] if isinstance(ids, Tensor) else list(ids)
    try:
        tensor = ids if isinstance(ids, Tensor) else torch.tensor(items, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TokenError(
            f"the {name} must be text, token ids or chat messages, got {_described(items)}"
        ) from None
    if tensor.dim() == 2 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.dim() != 1:
        raise TokenError(
            f"the {name} has ids of shape {tuple(tensor.shape)}; give one row of token ids"
        )
    if tensor.numel() == 0:
        raise TokenError(f"the {name} is empty (0 tokens); give at least 1 token")
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.is_complex():
        raise TokenError(f"the {name} has {tensor.dtype} values; token ids are integers")
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= vocab_size:
        raise TokenError(
            f"the {name} has token id {low if low < 0 else high}, outside the model's vocabulary"
            f" 0..{vocab_size - 1}; is the tokenizer the model's own?"
        )
    return as_tensor_ids(tensor)


def as_tensor_ids(ids: Tensor) -> Tensor:
    """Return token ids as a contiguous 1-D int64 CPU tensor."""
    return ids.detach().to(device="cpu", dtype=torch.int64).reshape(-1).contiguous()
