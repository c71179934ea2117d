"""Small tokenizers that cut text as those of well-known families do, trained on the spot."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT = [
    "The cat sat on the mat.\n\nWhat is the secret number for otter? It is 4910508.\r\n",
    'One line. \nAnother line: "quoted."\n\n\n  - indented (in brackets).\n\t\ttabs.\n',
    "What did the user ask the assistant? Hello world, the system says.  Two  spaces.\n \n",
    "the cat.\nThe numbers are 12, 345 and 6.\r\n\r\nwhat is it:\n the end !\n.What?\n",
] * 3

# As in GPT-2: white space before a word belongs to it, line breaks merge with each other alone.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As in Llama 3 and Qwen: a punctuation mark takes line breaks after it and letters after it.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _wrapped(tokenizer: Tokenizer, **more: Any) -> Any:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
        pad_token="<pad>",
        **more,
    )
    wrapped.chat_template = CHATML
    return wrapped


def byte_level(pattern: str, *, bos: bool = False) -> Any:
    """A byte-level BPE whose pieces are matched by a pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(CONTROL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    if bos:
        _write_bos(tokenizer)
    return _wrapped(tokenizer)


def _write_bos(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )


def metaspace(scheme: str) -> Any:
    """A BPE with a dummy space before every text ("always", "first"), or before none ("never").

    Line breaks and unknown characters are bytes.
    """
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*CONTROL, *fallback], show_progress=False
    )
    words.train_from_iterator([re.sub(r"[\r\n\t]", "", t) for t in _TEXT], trainer)
    trained = json.loads(words.to_str())["model"]
    # Runs of spaces are tokens, too.
    vocab, merges = trained["vocab"], [tuple(pair) for pair in trained["merges"]]
    vocab["▁▁"] = len(vocab)
    own = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[*merges, ("▁", "▁")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    own.add_special_tokens(list(CONTROL))
    own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    own.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _write_bos(own)
    return _wrapped(own)


def unigram() -> Any:
    """A Unigram model with a dummy space, as T5 and XGLM have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=list(CONTROL), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return _wrapped(tokenizer)


_FAMILIES = {
    "gpt2": lambda: byte_level(_GPT2),
    "llama3": lambda: byte_level(_LLAMA3, bos=True),
    "llama2-legacy": lambda: metaspace("always"),
    "llama2": lambda: metaspace("first"),
    "gemma": lambda: metaspace("never"),
    "unigram": unigram,
}
FAMILIES = tuple(_FAMILIES)
"""What most tests of tokenizers take."""


def normalized(normalizer: Any) -> Any:
    """GPT-2's, after a normalizer."""
    tokenizer = byte_level(_GPT2)
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


# As in GPT-4o: a letter takes the mark before it, and "/" ends a run of marks.
_O200K = (
    r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+(?i:'s|'t|'re)?|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MORE = {
    "gpt4o": lambda: byte_level(_O200K),
    "deepseek": lambda: byte_level(r"[\r\n]|\s?\p{L}+|\s?[!-/:-~]+|\s+$|\p{N}+"),
    "qwen2": lambda: normalized(normalizers.NFC()),
    "lower case": lambda: normalized(normalizers.Lowercase()),
    "stripped": lambda: normalized(normalizers.Strip()),
    "stripped on the right": lambda: normalized(normalizers.Strip(left=False, right=True)),
}
MORE_FAMILIES = (*FAMILIES, *_MORE)
"""All, for tests that run no model."""


@functools.cache
def tokenizer_of(family: str) -> Any:
    """The tokenizer of a family, shared by all tests of a process: not to be changed."""
    return (_FAMILIES | _MORE)[family]()
