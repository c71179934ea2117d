"""Small tokenizers with the special tokens of well-known families, and models that say a text."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from star_attention import StarLLM

CORPUS = "the cat sat on the mat and what is the secret number for otter user assistant hello world"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CHANNEL_TOKENS = ("<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>")


def byte_level(
    special: tuple[str, ...] = CHATML_TOKENS,
    *,
    plain: tuple[str, ...] = (),
    chat: str | None = None,
    eos: str | None = None,
) -> Any:
    """A byte-level BPE of a few hundred tokens.

    Args:
        special: its special tokens; the first one is the end of sequence unless `eos` says other.
        plain: added tokens that are not special, as `<think>` in several families.
        chat: its chat template.
        eos: the end of sequence.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([CORPUS] * 3, trainer)
    backend.add_tokens(list(plain))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos or special[0])
    tokenizer.chat_template = chat
    return tokenizer


def byte_fallback() -> Any:
    """A tokenizer like Llama 2's: pieces with a mark for spaces, bytes for all other characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += sorted({*CORPUS.replace(" ", ""), "▁", *"\n.,"})
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            fuse_unk=True,
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def talker(tokenizer: Any, **settings: Any) -> StarLLM:
    """An engine around a small random model of its own, with a tokenizer's vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    return StarLLM(model, tokenizer, block_size=16, **settings)


class _Say(LogitsProcessor):
    """Make every row say the same ids, then the last one for ever."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.step = ids, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e4)
        forced[:, self.ids[min(self.step, len(self.ids) - 1)]] = 0.0
        self.step += 1
        return forced


def say(tokenizer: Any, text: str | list[int]) -> dict[str, Any]:
    """Arguments of `generate` that make every answer say a text, as long as it lasts."""
    ids = tokenizer(text, add_special_tokens=False).input_ids if isinstance(text, str) else text
    return dict(logits_processor=LogitsProcessorList([_Say(ids)]), max_new_tokens=len(ids))
