"""A context is refused for another model, tokenizer or setting, naming the field that differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_attention import EncodedContext, StarLLM
from star_attention.errors import (
    ContextMismatchError,
)
from tests.engines import (
    BUNDLED,
    CONTEXT,
    assert_same_kv,
    bundled_tokenizer,
    engine,
    ids,
)
from tests.families import FAMILIES, build
from tests.saved_contexts import BLOCK, answer, load_fully, small_context


@pytest.fixture(scope="module")
def context() -> EncodedContext:
    return small_context()


@pytest.fixture
def path(tmp_path: Path, context: EncodedContext) -> Path:
    context.save(tmp_path / "a.star")
    return tmp_path / "a.star"


def llama(**settings: Any) -> Any:
    config = FAMILIES["llama"]()
    for name, value in settings.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def lora(seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = LoraConfig(
            r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return get_peft_model(build("llama"), words).eval()


def other_tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.add_tokens(["another"])
    return tokenizer


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("weights", lambda: StarLLM(build("llama", seed=1))),
        ("config.model_type", lambda: engine("qwen3")),
        ("config.model_type", lambda: engine("deepseek_v3")),
        ("config.num_key_value_heads", lambda: engine("llama_mqa")),
        ("config.rope_parameters", lambda: engine("llama_llama3scaling")),
        ("config.num_hidden_layers", lambda: StarLLM(llama(num_hidden_layers=2))),
        ("config.vocab_size", lambda: StarLLM(llama(vocab_size=300))),
        ("config.rms_norm_eps", lambda: StarLLM(llama(rms_norm_eps=0.5))),
        ("dtype", lambda: StarLLM(build("llama", torch.bfloat16))),
        ("tokenizer", lambda: engine("llama", other_tokenizer())),
        ("method", lambda: engine("llama", method="dense")),
        ("adapters", lambda: StarLLM(lora())),
    ],
)
def test_a_mismatch_is_refused_by_the_field_that_differs(
    field: str, other: Callable[[], StarLLM], tmp_path: Path
) -> None:
    path = tmp_path / "a.star"
    star = engine("llama", bundled_tokenizer(), block_size=BLOCK)
    star.encode(ids(CONTEXT)).save(path)
    with pytest.raises(
        ContextMismatchError,
        match=rf"a\.star does not fit: it differs in {field}: .* in the context, .* in this model;",
    ) as caught:
        other().load_context(path)
    assert caught.value.field == field
    remedy = (
        "load the model in float32 (dtype=, or --dtype)"
        if field == "dtype"
        else "load the model that encoded it"
    )
    assert f"; {remedy}, or encode the context again" in str(caught.value)
    load_fully(path, star)


def test_one_changed_weight_is_seen(path: Path) -> None:
    """Fine-tuning changes all weights, so a sample is enough, if it covers every tensor."""
    model = build("llama")
    for name, parameter in model.named_parameters():
        original = parameter.data.clone()
        parameter.data *= 1.01
        with pytest.raises(ContextMismatchError) as caught:
            StarLLM(model).load_context(path)
        assert caught.value.field == "weights", name
        parameter.data.copy_(original)
    load_fully(path, StarLLM(model))


def test_token_ids_alone_need_no_tokenizer(tmp_path: Path) -> None:
    engine("llama", bundled_tokenizer()).encode(ids(CONTEXT)).save(tmp_path / "a.star")
    assert load_fully(tmp_path / "a.star", engine("llama")).identity["tokenizer"] is None


def test_an_adapter_belongs_to_its_context(tmp_path: Path) -> None:
    star = StarLLM(lora(), block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    context.save(tmp_path / "a.star")
    again = star.load_context(tmp_path / "a.star")
    assert_same_kv(again, context, tolerance=0)
    assert answer(star, again) == answer(star, context)
    with pytest.raises(ContextMismatchError) as plain:
        engine("llama").load_context(tmp_path / "a.star")
    assert plain.value.field == "adapters"
    with pytest.raises(ContextMismatchError) as trained:
        StarLLM(lora(seed=1)).load_context(tmp_path / "a.star")
    assert trained.value.field == "weights"


def test_an_adapter_that_is_switched_off_does_not_count(tmp_path: Path) -> None:
    """Forbids an answer without the adapter on a context that was encoded with it."""
    model = lora()
    star = StarLLM(model, block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    with model.disable_adapter(), pytest.raises(ContextMismatchError) as off:
        answer(star, context)
    assert off.value.field == "adapters"
    assert len(answer(star, context)) == 6


def test_a_context_of_another_model_is_refused_without_a_file(context: EncodedContext) -> None:
    with pytest.raises(
        ContextMismatchError, match="the context does not fit: it differs in weights: "
    ):
        answer(StarLLM(build("llama", seed=1)), context)
