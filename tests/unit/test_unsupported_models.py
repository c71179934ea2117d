"""Models that Star Attention cannot run are refused with the reason, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from star_attention import StarLLM, supported
from star_attention.errors import (
    InvalidInputError,
    UnsupportedModelError,
)
from tests.families import FAMILIES, REFUSED, UNUSUAL, build
from tests.refusals import refused

RUNNING_STATE, LINEAR = (
    "running state instead of keys and values of all tokens",
    "linear-attention layers",
)
OFF_INTERFACE = "attention does not go through transformers' attention interface"
REASONS = {
    "mamba": RUNNING_STATE,
    "mamba2": RUNNING_STATE,
    "falcon_mamba": RUNNING_STATE,
    "rwkv": RUNNING_STATE,
    "jamba": LINEAR,
    "bamba": LINEAR,
    "falcon_h1": "hybrid layers",
    "granitemoehybrid": LINEAR,
    "qwen3_next": LINEAR,
    "qwen3_5": LINEAR,
    "minimax": LINEAR,
    "recurrent_gemma": "running state instead of keys and values",
    "lfm2": "conv layers",
    "llama4": "chunked-attention layers",
    "deepseek_v32": "selects keys with an indexer of its own",
    "glm_moe_dsa": "selects keys with an indexer of its own",
    "deepseek_v4": "compressed_attention layers",
    "doge": "a bias for each key",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "bert": "attends in both directions",
    "bloom": OFF_INTERFACE,
    "mpt": OFF_INTERFACE,
    "codegen": OFF_INTERFACE,
    "gptj": OFF_INTERFACE,
    "falcon": OFF_INTERFACE,
}


@pytest.mark.parametrize("name", REFUSED)
def test_families_are_refused_by_name_with_the_reason(name: str, tmp_path: Path) -> None:
    config, model = REFUSED[name](), build(name)
    for value in (config, model):
        support = supported(value)
        assert not support
        assert any(REASONS[name] in reason for reason in support.reasons), support
        assert str(support).startswith("not supported: ")
    refused(UnsupportedModelError, type(model).__name__, REASONS[name], call=lambda: StarLLM(model))
    # Before any weight is read: the folder holds none.
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=config.model_type) as error:
        StarLLM.from_pretrained(tmp_path)
    # Text shows some of the reasons.
    assert any(reason in str(error.value) for reason in supported(config).reasons)
    assert not supported(tmp_path)


@pytest.mark.parametrize("name", FAMILIES | UNUSUAL)
def test_no_family_is_refused_by_mistake(name: str) -> None:
    support = supported((FAMILIES | UNUSUAL)[name]())
    assert support, support
    assert str(support) == "supported"


@pytest.mark.parametrize("value", [None, 5, torch.nn.Linear(2, 3), torch.nn.Linear])
def test_something_else_as_a_model(value: Any) -> None:
    refused(
        UnsupportedModelError,
        type(value).__name__,
        "is not a transformers model",
        call=lambda: StarLLM(value),
    )
    assert "is not a transformers model" in str(supported(value))


def test_a_model_in_training_mode() -> None:
    model = build("llama").train()
    message = "LlamaForCausalLM is in training mode; call model.eval() first"
    refused(InvalidInputError, message, call=lambda: StarLLM(model))
    assert StarLLM(model.eval())


def test_prompt_tuning() -> None:
    prompt_tuning = PromptTuningConfig(
        num_virtual_tokens=4, task_type="CAUSAL_LM", num_layers=3, token_dim=72
    )
    model = get_peft_model(build("llama"), prompt_tuning).eval()
    message = ["virtual tokens before every forward", "adapters inside the layers (LoRA) work"]
    refused(UnsupportedModelError, *message, call=lambda: StarLLM(model))
    assert "virtual tokens" in str(supported(model))
