"""Every setting, weight, buffer and adapter that a context depends on is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from star_attention import StarLLM, errors
from star_attention.errors import ContextMismatchError
from star_attention.hf.loading import identity
from tests.engines import CONTEXT, bundled_tokenizer, ids
from tests.families import FAMILIES, build


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gemma2", "hidden_activation", "gelu"),
        ("gemma2", "attn_logit_softcapping", 30.0),
        ("gpt2", "layer_norm_epsilon", 0.5),
        ("gpt2", "activation_function", "relu"),
        ("nemotron", "norm_eps", 0.5),
        ("mistral", "sliding_window", 7),
        ("llama", "head_dim", 8),
        ("granite", "attention_multiplier", 0.5),
        ("granite", "embedding_multiplier", 2.0),
        ("granite", "residual_multiplier", 0.25),
        ("deepseek_v3", "routed_scaling_factor", 2.0),
        ("deepseek_v3", "norm_topk_prob", False),
    ],
)
def test_every_setting_that_keys_depend_on_is_compared(family: str, field: str, value: Any) -> None:
    """Forbids a list of known settings: it would lack the names of new families."""
    model = build(family)
    before = identity.model_identity(model, model)
    assert field in before["config"]
    setattr(model.config, field, value)
    mismatch = identity.difference(before, identity.model_identity(model, model))
    assert mismatch is not None
    assert mismatch[0] == f"config.{field}"


@pytest.mark.parametrize("family", FAMILIES)
def test_running_a_model_does_not_change_its_identity(family: str) -> None:
    """Buffers count, except those that a model recomputes while it runs."""
    model = build(family)
    before, state = identity.model_identity(model, model), identity.state(model)
    with torch.no_grad():
        model(torch.tensor([ids(40)]), use_cache=False)
    assert identity.model_identity(model, model) == before
    assert identity.state(model)[:-1] == state[:-1]


def test_buffers_count() -> None:
    model = build("deepseek_v3")
    name, buffer = next(
        (name, buffer) for name, buffer in model.named_buffers() if "correction_bias" in name
    )
    before = identity.model_identity(model, model)
    buffer += 1.0
    mismatch = identity.difference(before, identity.model_identity(model, model))
    assert mismatch is not None
    assert mismatch[0] == "weights", name


def test_names_and_shapes_of_weights_count() -> None:
    model = build("llama")
    before = identity.model_identity(model, model)
    layer = model.get_decoder().layers[0].mlp
    layer.gate_proj, layer.up_proj = layer.up_proj, layer.gate_proj
    assert identity.difference(before, identity.model_identity(model, model)) is not None


def test_rules_of_a_tokenizer_count_but_not_its_last_call() -> None:
    tokenizer = bundled_tokenizer()
    before = identity.tokenizer_identity(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert identity.tokenizer_identity(tokenizer) == before
    changed = tokenizer.__class__.from_pretrained(tokenizer.name_or_path)
    changed.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    assert changed.get_vocab() == tokenizer.get_vocab()
    assert identity.tokenizer_identity(changed) != before


def with_lora(alpha: int) -> Any:
    torch.manual_seed(5)
    config = LoraConfig(
        r=2,
        lora_alpha=alpha,
        target_modules=["q_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(build("llama"), config).eval()


def test_the_scale_of_an_adapter_counts(tmp_path: Path) -> None:
    """The same weights with another scale are another model."""
    StarLLM(with_lora(8), block_size=32).encode(ids(CONTEXT)).save(tmp_path / "a.star")
    with pytest.raises(
        ContextMismatchError, match=r"adapters: .*x4.* in the context, .*x32.* in this model"
    ):
        StarLLM(with_lora(64), block_size=32).load_context(tmp_path / "a.star")


def test_a_mismatch_keeps_its_field_on_other_ranks() -> None:
    with pytest.raises(ContextMismatchError) as refused:
        identity.check(
            "its own.star", {"config": {"vocab_size": 64}}, {"config": {"vocab_size": 32}}
        )
    error = errors.rebuild("ContextMismatchError", str(refused.value))
    assert isinstance(error, ContextMismatchError)
    assert error.field == refused.value.field == "config.vocab_size"
    assert str(error) == str(refused.value)


def test_weights_changed_after_encoding_are_noticed() -> None:
    model = with_lora(8)
    star = StarLLM(model, block_size=32)
    context = star.encode(ids(CONTEXT))
    star.generate(context, [5], max_new_tokens=2)
    model.delete_adapter("default")
    torch.manual_seed(6)
    again = LoraConfig(
        r=2, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model.add_adapter("default", again)
    model.set_adapter("default")
    model.eval()
    with pytest.raises(ContextMismatchError, match="weights"):
        star.generate(context, [5], max_new_tokens=2)
