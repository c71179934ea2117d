"""Helpers for tests of whole models: tiny engines, random ids, and the stock `generate`."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from star_attention import EncodedContext, StarLLM
from tests.families import FIRST_TOKEN, LAST_TOKEN, build
from tests.model_oracle import eager_attention, pinned_rope

CONTEXT, QUERY = 101, 7
BUNDLED = Path(__file__).parents[1] / "models" / "needle-17m"

# Full attention, sliding windows on all layers or some, sinks, softcap, MLA, KV sharing, and two
# kinds of length-dependent rotary frequencies.
VARIED = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "deepseek_v3",
    "gemma3n",
    "phi3_longrope",
    "llama_dynamic_ntk",
]


@functools.cache
def tiny(name: str) -> PreTrainedModel:
    """The tiny model of a family, shared by all tests of a process: nothing may stay in it."""
    return _shared(name, build(name))


@functools.cache
def bundled_model() -> PreTrainedModel:
    """The bundled model in float32."""
    model = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    return _shared("the bundled model", model)


class _Shared:
    """A model that tests share, and what it was made of."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model
        self._look()

    def _look(self) -> None:
        self._modules = list(self.model.modules())
        kinds, forwards, children = self._now()
        self._made_of = [kinds, forwards, [dict(each) for each in children]]
        # No hooks: transformers installs some of its own, which stay.
        self._parts = {
            name: (type(module), "forward" in vars(module))
            for name, module in self.model.named_modules()
        }

    def _now(self) -> list[list[Any]]:
        variables = [vars(module) for module in self._modules]
        return [
            [type(module) for module in self._modules],
            ["forward" in each for each in variables],
            [each["_modules"] for each in variables],
        ]

    def changes(self) -> list[str]:
        """Return the names of modules that have changed since the last call."""
        # After every test, of up to seventy models: names are for what has changed.
        if self._now() == self._made_of:
            return []
        before = self._parts
        self._look()
        names = before.keys() | self._parts
        return sorted(name for name in names if before.get(name) != self._parts.get(name))


_SHARED: list[_Shared] = []


def _shared(name: str, model: PreTrainedModel) -> PreTrainedModel:
    _SHARED.append(_Shared(name, model))
    return model


def left_in_shared_models() -> list[str]:
    """Return the modules of shared models that a test has left changed; only once."""
    return [f"{shared.name}: {name}" for shared in _SHARED for name in shared.changes()]


def random_text_model(**sizes: Any) -> PreTrainedModel:
    """A small random Llama with the vocabulary and special tokens of the bundled tokenizer."""
    tokens = bundled_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokens),
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **(dict(num_hidden_layers=2) | sizes),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


@functools.cache
def text_model() -> PreTrainedModel:
    """A small random model with the vocabulary and special tokens of the bundled tokenizer."""
    model = random_text_model(
        hidden_size=48,
        intermediate_size=80,
        num_attention_heads=6,
        num_key_value_heads=3,
        initializer_range=0.15,
    )
    return _shared("the text model", model)


@functools.cache
def bundled_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


def engine(name: str, tokenizer: Any = None, **settings: Any) -> StarLLM:
    return StarLLM(tiny(name), tokenizer, **settings)


def ids(length: int, seed: int = 1) -> list[int]:
    """Random ordinary token ids; a longer call starts with the same ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (length,), generator=generator).tolist()


def as_stock(model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    """Attention as users get it, except that softcap needs eager: sdpa ignores it in 5.17."""
    softcap = getattr(model.config, "attn_logit_softcapping", None)
    return contextlib.nullcontext() if softcap is None else eager_attention(model)


@torch.no_grad()
def stock_generate(
    model: Any, prompt: list[int], *, rope_length: int | None = None, **kwargs: Any
) -> Any:
    """The stock model's `generate` on one prompt: new ids by row, and logits `[rows, steps, V]`."""
    input_ids = torch.tensor([prompt], device=model.device)
    pinned = contextlib.nullcontext() if rope_length is None else pinned_rope(model, rope_length)
    with as_stock(model), pinned:
        result = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            return_dict_in_generate=True,
            output_logits=kwargs.get("num_beams", 1) == 1,
            **kwargs,
        )
    rows = result.sequences[:, len(prompt) :].tolist()
    return rows, torch.stack(result.logits, 1).float() if result.logits else None


def stored(context: EncodedContext) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Copies of the keys and values `[1, G, L, D]` of every layer that stores any."""
    layers = [layer.pair() for layer in context.kv.layers if not layer.is_empty]
    return [(k_1GLD.clone(), v_1GLD.clone()) for k_1GLD, v_1GLD in layers]


def assert_same_kv(
    actual: EncodedContext, expected: EncodedContext, tolerance: float = 1e-4
) -> None:
    """Assert equal keys and values up to rounding; with tolerance 0, bit for bit."""
    for actual_layer, expected_layer in zip(stored(actual), stored(expected), strict=True):
        for a_1GLD, b_1GLD in zip(actual_layer, expected_layer, strict=True):
            torch.testing.assert_close(a_1GLD, b_1GLD, atol=tolerance, rtol=tolerance)
