"""Models that are more than a checkpoint: LoRA adapters (PEFT) and quantized weights (torchao)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from star_attention import StarLLM, supported
from star_attention.errors import ContextMismatchError, UnsupportedModelError
from tests.engines import CONTEXT, assert_same_kv, ids, stock_generate, text_model
from tests.families import build

peft = pytest.importorskip("peft")
QUERY = [5, 6, 7]
SIZES: dict[str, Any] = dict(block_size=16, anchor_size=10)


def with_lora(model: PreTrainedModel, name: str = "default", seed: int = 0) -> Any:
    """Add a random LoRA adapter to queries, values and the MLP of a model."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config, adapter_name=name).eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_lora_model_answers_as_its_merged_model(family: str) -> None:
    lora = with_lora(build(family))
    merged = copy.deepcopy(lora).merge_and_unload()
    assert supported(lora)
    contexts = [
        StarLLM(model, **SIZES).encode(ids(CONTEXT)) for model in (lora, merged, build(family))
    ]
    assert_same_kv(contexts[0], contexts[1])
    # The adapter has an effect.
    with pytest.raises(AssertionError):
        assert_same_kv(contexts[0], contexts[2])
    for settings in ({}, dict(num_beams=2), dict(do_sample=True, seed=1)):
        replies = [
            StarLLM(model, **SIZES).generate(context, QUERY, max_new_tokens=8, **settings).token_ids
            for model, context in zip((lora, merged), contexts, strict=False)
        ]
        assert replies[0] == replies[1]


def test_a_lora_model_with_one_block_is_its_own_generate() -> None:
    lora = with_lora(build("llama"))
    star = StarLLM(lora, method="dense")
    reply = star.generate(star.encode(ids(CONTEXT)), QUERY, max_new_tokens=8)
    [stock], _ = stock_generate(lora, ids(CONTEXT) + QUERY, max_new_tokens=8)
    assert reply.token_ids == stock


def test_switching_adapters_is_noticed(tmp_path: Path) -> None:
    """A context encoded with one adapter does not answer with another, nor with none."""
    lora = with_lora(build("llama"), "first")
    lora.add_adapter("second", lora.peft_config["first"])
    star = StarLLM(lora, **SIZES)
    context = star.encode(ids(CONTEXT))
    expected = star.generate(context, QUERY, max_new_tokens=4).token_ids
    context.save(tmp_path / "context.star")

    lora.set_adapter("second")
    for call in (
        lambda: star.generate(context, QUERY),
        lambda: star.logits(context, QUERY),
        lambda: star.extend(context, QUERY),
        lambda: star.load_context(tmp_path / "context.star"),
    ):
        with pytest.raises(ContextMismatchError, match="adapters"):
            call()
    lora.set_adapter("first")
    with lora.disable_adapter(), pytest.raises(ContextMismatchError, match="adapters"):
        star.generate(context, QUERY)
    assert star.generate(context, QUERY, max_new_tokens=4).token_ids == expected
    loaded = star.load_context(tmp_path / "context.star")
    assert star.generate(loaded, QUERY, max_new_tokens=4).token_ids == expected


def test_a_context_of_the_base_model_does_not_fit_its_adapter() -> None:
    base = build("llama")
    context = StarLLM(base, **SIZES).encode(ids(CONTEXT))
    star = StarLLM(with_lora(base), **SIZES)
    with pytest.raises(ContextMismatchError, match="adapters"):
        star.generate(context, QUERY)


def test_adapters_that_prepend_tokens_are_refused() -> None:
    model = peft.get_peft_model(
        build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert not supported(model)
    with pytest.raises(UnsupportedModelError, match="virtual tokens"):
        StarLLM(model.eval())


# ---------------------------------------------------------------------- quantized


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
def test_an_int8_model_answers_as_its_own_generate(tmp_path: Path) -> None:
    """Quantized on loading, by transformers' own arguments; several blocks run, too."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    build("llama").save_pretrained(tmp_path)
    star = StarLLM.from_pretrained(
        tmp_path,
        dtype="float32",
        device="cpu",
        method="dense",
        model_kwargs=dict(quantization_config=TorchAoConfig(Int8WeightOnlyConfig())),
    )
    weight = star.model.model.layers[0].self_attn.q_proj.weight
    assert type(weight) is not torch.nn.Parameter or weight.dtype == torch.int8
    context = star.encode(ids(CONTEXT))
    reply = star.generate(context, QUERY, max_new_tokens=8, return_logits=True)
    [stock], stock_1TV = stock_generate(star.model, ids(CONTEXT) + QUERY, max_new_tokens=8)
    assert reply.token_ids == stock
    torch.testing.assert_close(reply.logits, stock_1TV[0], atol=1e-3, rtol=1e-3)
    exact = StarLLM(build("llama"), method="dense")
    difference = (
        (exact.logits(exact.encode(ids(CONTEXT)), QUERY) - star.logits(context, QUERY)).abs().max()
    )
    # The weights are quantized.
    assert 1e-3 < difference < 1

    context.save(tmp_path / "context.star")
    loaded = star.load_context(tmp_path / "context.star")
    assert star.generate(loaded, QUERY, max_new_tokens=8).token_ids == stock
    blocks = StarLLM(star.model, **SIZES)
    assert len(blocks.generate(blocks.encode(ids(CONTEXT)), QUERY, max_new_tokens=3).token_ids) == 3


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
def test_a_model_quantized_in_place() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(text_model())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    star = StarLLM(model, method="dense")
    reply = star.generate(star.encode(ids(CONTEXT)), QUERY, max_new_tokens=8, ignore_eos=True)
    [stock], _ = stock_generate(model, ids(CONTEXT) + QUERY, max_new_tokens=8, eos_token_id=None)
    assert reply.token_ids == stock
