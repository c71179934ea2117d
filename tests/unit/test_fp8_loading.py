"""Models with linear layers in fp8: identity, files, refusals, adapters and plans."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from star_attention import EncodedContext, StarLLM
from star_attention.bench.models import SHAPES
from star_attention.errors import ContextMismatchError, InvalidInputError, UnsupportedModelError
from star_attention.hf.loading import checks
from star_attention.hf.loading import fp8 as loading
from star_attention.hf.shape import model_shape
from star_attention.linear.fp8 import Fp8Linear
from star_attention.planning import cost, steps
from star_attention.planning.hardware import HARDWARE
from star_attention.planning.plan import BlockPlan
from tests.engines import BUNDLED, bundled_tokenizer, ids, random_text_model, text_model
from tests.families import build
from tests.fp8_models import SIZES, dequantized, quantized
from tests.refusals import refused


def load(path: Any = BUNDLED, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(path, **(dict(weights="fp8", device="cpu") | settings))


# ----------------------------------------------------------------------- identity and files


def test_contexts_name_the_precision_of_weights(tmp_path: Path) -> None:
    star, other = load(dtype="float32"), load(weights=None, dtype="float32")
    context = star.with_config(block_size=64).encode("The tea is hot and the cup is blue.\n" * 20)
    assert star.runtime.identity["linear_weights"] == "fp8"
    assert other.runtime.identity["linear_weights"] == "as loaded"
    path = tmp_path / "tea.star"
    context.save(path)
    words = ("linear_weights: fp8 in the context, as loaded", 'weights="fp8"', "--weights fp8")
    refused(ContextMismatchError, *words, call=lambda: other.generate(context, "What is hot?"))
    refused(ContextMismatchError, *words, call=lambda: other.load_context(path))
    again: EncodedContext = load(dtype="float32").load_context(path)
    answers = [
        star.generate(each, "What is hot?", max_new_tokens=5, ignore_eos=True).token_ids
        for each in (context, again)
    ]
    assert answers[0] == answers[1]
    plain_context = other.encode("The tea is hot.")
    words = ("as loaded in the context, fp8", "without weights=")
    refused(ContextMismatchError, *words, call=lambda: star.generate(plain_context, "Hot?"))


def test_a_change_of_a_weight_or_a_scale_is_noticed() -> None:
    model = quantized("llama")
    star = StarLLM(model, block_size=24)
    before = star.runtime.identity
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.scale[3] *= 2
    changed = star.runtime.identity
    assert changed["checksum"] != before["checksum"]
    with torch.no_grad():
        layer.weight.view(torch.uint8)[0, 0] ^= 1
    assert star.runtime.identity["checksum"] != changed["checksum"]


def test_such_a_model_is_not_saved(tmp_path: Path) -> None:
    model = load(dtype="float32").model
    refused(InvalidInputError, "files cannot hold", call=lambda: model.save_pretrained(tmp_path))


# -------------------------------------------------------------------------------- refusals


def folder_with(tmp_path: Path, **fields: Any) -> Path:
    text_model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    return tmp_path


def test_unknown_precisions_are_refused() -> None:
    refused(
        InvalidInputError, "weights 'int8' is unknown", "fp8", call=lambda: load(weights="int8")
    )


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "torchao", "fp8"])
def test_quantized_weights_are_refused_by_name(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their packages are not installed, which would be said first.
    monkeypatch.setattr(checks, "need_quantization_packages", lambda *_: None)
    path = folder_with(tmp_path, quantization_config={"quant_method": method})
    words = (f"quantized already ({method})", "the original model")
    refused(InvalidInputError, *words, call=lambda: load(path))


def test_quantization_in_two_ways_is_refused() -> None:
    kwargs = {"quantization_config": {"quant_method": "torchao"}}
    call = partial(load, model_kwargs=kwargs)
    refused(InvalidInputError, "quantization_config", "leave one of them out", call=call)


def test_weights_elsewhere_are_refused() -> None:
    model: Any = build("llama", **SIZES)
    model.model.layers[1].mlp.up_proj.to("meta")
    words = ("moved for each forward", "layers.1.mlp.up_proj", "tensor_parallel")
    call = partial(loading.quantize, model, loading.layers(model), None)
    refused(InvalidInputError, *words, call=call)


# ------------------------------------------------------------------------------- adapters


def lora(folder: Path, **settings: Any) -> Path:
    """Save a small model with an adapter; return the adapter's folder."""
    peft = pytest.importorskip("peft")
    random_text_model(num_hidden_layers=3, **SIZES).save_pretrained(folder / "base")
    bundled_tokenizer().save_pretrained(folder / "base")

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    targets = dict(target_modules=["q_proj", "v_proj", "down_proj"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **(targets | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        outer = peft.get_peft_model(base, config).eval()
    outer.save_pretrained(folder / "lora")
    return folder / "lora"


def test_an_adapter_stays_as_it_is_around_layers_in_fp8(tmp_path: Path) -> None:
    path = lora(tmp_path)
    sizes: dict[str, Any] = dict(block_size=16, tokens_per_forward=48)
    stars = [load(path, weights=weights, **sizes) for weights in (None, "fp8")]
    layer = stars[1].model.base_model.model.model.layers[1].self_attn.q_proj
    assert type(layer.base_layer) is Fp8Linear
    assert layer.lora_A["default"].weight.dtype == torch.float32
    plain = dict(stars[0].model.named_modules())
    with torch.no_grad():
        for name, module in stars[1].model.named_modules():
            if isinstance(module, Fp8Linear):
                plain[name].weight.copy_(dequantized(module))
    exact, quick = (star.logits(star.encode(ids(101)), ids(7)) for star in stars)
    torch.testing.assert_close(quick, exact, atol=1e-4, rtol=1e-4)


def test_adapters_that_read_weights_are_refused(tmp_path: Path) -> None:
    path = lora(tmp_path, use_dora=True)
    refused(UnsupportedModelError, "DoRA", "merge the adapter", call=lambda: load(path))


# ---------------------------------------------------------------------------------- plans


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "mixtral", "qwen3_moe", "mistral"])
def test_bytes_of_a_plan_are_those_of_the_model(name: str) -> None:
    config = build(name, **SIZES).config
    shape, model = model_shape(config).in_fp8(), quantized(name)
    scales = [module.scale for module in model.modules() if isinstance(module, Fp8Linear)]
    nbytes = sum(weight.nbytes for weight in [*model.parameters(), *scales])
    assert shape.weight_bytes == nbytes


def test_predicted_times_and_memory() -> None:
    shape = model_shape(LlamaConfig(**SHAPES["llama-3.1-8b"], dtype="bfloat16"))
    small, plan = shape.in_fp8(), BlockPlan.resolve(2**17, 2**12, None, 1)
    memory, large = (
        cost.memory_per_rank(each, plan, tokens_per_forward=2**14) for each in (small, shape)
    )
    inner = shape.linear_parameters * 30 // 32
    assert small.quantizable_parameters == inner, "all layers but the first and the last"
    assert large.weights - memory.weights == inner - 4 * small.quantizable_rows
    mesh = steps.Mesh()
    read = steps.weight_bytes_read(small, mesh)
    plain = shape.linear_parameters - inner + shape.head_parameters
    assert read == inner + 4 * small.quantizable_rows + 2 * plain
    device = HARDWARE["h200-nvlink"]
    flops = cost.phase1(shape, plan, tokens_per_forward=2**14)
    quick = device.with_fp8(small.quantized_share)
    saved = flops.linear * (1 / device.matrix - 1 / device.matrix_fp8) * 30 / 32
    assert device.seconds(flops) - quick.seconds(flops) == pytest.approx(saved)
    assert HARDWARE["a100-nvlink"].with_fp8(1.0) is HARDWARE["a100-nvlink"]


@pytest.mark.parametrize(("name", "sizes"), [("gpt2", {}), ("llama", dict(num_hidden_layers=2))])
def test_a_shape_without_such_layers_is_refused(name: str, sizes: dict[str, Any]) -> None:
    shape = model_shape(build(name, **sizes).config)
    refused(InvalidInputError, "no plain linear layers", call=shape.in_fp8)
