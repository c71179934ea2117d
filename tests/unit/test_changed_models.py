"""A context is refused once weights, buffers, settings or the tokenizer are not those it was
encoded with, by whatever way they changed."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from tokenizers.models import BPE
from torch import nn

from star_attention import StarLLM
from star_attention.errors import ContextMismatchError, InvalidInputError
from star_attention.hf.loading import checksum, identity, tensor_parallel
from star_attention.hf.loading.identities import Identities
from tests.engines import CONTEXT, bundled_tokenizer, ids, text_model
from tests.families import build

BLOCK = 32


def projection(model: Any) -> Any:
    return model.get_decoder().layers[1].mlp.up_proj


def copied(model: Any) -> None:
    with torch.no_grad():
        projection(model).weight[2, 3].add_(1)


def trained(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.tensor([ids(8)]), labels=torch.tensor([ids(8)])).loss.backward()
    optimizer.step()


def loaded(model: Any) -> None:
    model.load_state_dict(build("llama", seed=1).state_dict())


def replaced_data(model: Any) -> None:
    weight = projection(model).weight
    weight.data = weight.data * 2


def replaced_weight(model: Any) -> None:
    projection(model).weight = nn.Parameter(projection(model).weight.detach() * 2)


def replaced_module(model: Any) -> None:
    layers = model.get_decoder().layers
    layers[1] = build("llama", seed=1).get_decoder().layers[1]


WAYS: dict[str, Callable[[Any], Any]] = {
    "one element, in place": copied,
    "an optimizer": trained,
    "load_state_dict": loaded,
    "through .data": lambda model: projection(model).weight.data.mul_(1.5),
    "copied to .data": lambda model: projection(model).weight.data.copy_(torch.ones(1)),
    "the first element through .data": lambda model: projection(model).weight.data[0, 0].add_(1),
    "another .data": replaced_data,
    "another weight": replaced_weight,
    "another module": replaced_module,
}


@pytest.mark.parametrize("way", WAYS)
def test_changed_weights_are_noticed(way: str, tmp_path: Path) -> None:
    """Forbids answers of the new weights on keys of the old ones."""
    model = build("llama")
    star = StarLLM(model, block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    context.save(tmp_path / "a.star")
    assert len(star.generate(context, [5], max_new_tokens=2).token_ids) == 2
    WAYS[way](model)
    for call in (
        lambda: star.generate(context, [5]),
        lambda: star.logits(context, [5]),
        lambda: star.extend(context, [5]),
        lambda: StarLLM(model).load_context(tmp_path / "a.star"),
        lambda: star.load_context(tmp_path / "a.star"),
    ):
        with pytest.raises(ContextMismatchError) as caught:
            call()
        assert caught.value.field == "weights"
    assert len(star.generate(star.encode(ids(CONTEXT)), [5], max_new_tokens=2).token_ids) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_file_is_refused_for_a_single_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    """Forbids samples, and sums that were kept although `.data` was written."""
    model = build("llama", dtype)
    star = StarLLM(model, block_size=BLOCK)
    star.encode(ids(CONTEXT)).save(tmp_path / "a.star")
    for _, weight in model.named_parameters():
        bits = weight.data.view(-1)[-1:].view(torch.int16)
        bits ^= 1
        with pytest.raises(ContextMismatchError, match="differs in weights"):
            star.load_context(tmp_path / "a.star")
        bits ^= 1
    star.load_context(tmp_path / "a.star")


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids a pass over the weights for every short context and every answer."""
    passes: list[int] = []

    def counted(tensors: Any) -> list[bytes]:
        listed = list(tensors)
        passes.append(len(listed))
        return checksum.digests(listed)

    monkeypatch.setattr(identity, "digests", counted)
    model = build("llama")
    star = StarLLM(model, block_size=BLOCK)
    # As if a pass took longer than a hundredth of the encoding, as with any real model.
    monkeypatch.setattr(
        "star_attention.hf.loading.identities.time.perf_counter", iter(range(99)).__next__
    )
    contexts = [star.encode(ids(CONTEXT, seed)) for seed in range(3)]
    for context in contexts:
        star.generate(context, [5], max_new_tokens=1)
    assert passes == [len(list(model.parameters()))]
    copied(model)
    star.encode(ids(CONTEXT))
    assert passes[1:] == [1], "only the tensor that changed"


# -------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("family", ["llama", "gemma3", "llama_llama3scaling"])
@pytest.mark.parametrize("hidden", [False, True], ids=["in place", "through .data"])
def test_edited_frequencies_are_noticed(family: str, hidden: bool, tmp_path: Path) -> None:
    """Forbids leaving them out because they follow from the config."""
    model = build(family)
    star = StarLLM(model, block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    context.save(tmp_path / "a.star")
    for name, buffer in model.named_buffers():
        if "inv_freq" in name and "original" not in name:
            (buffer.data if hidden else buffer).mul_(0.5)
    for call in (
        lambda: star.generate(context, [5]),
        lambda: StarLLM(model).load_context(tmp_path / "a.star"),
    ):
        with pytest.raises(ContextMismatchError) as caught:
            call()
        assert caught.value.field == "rotary"
    edited = star.encode(ids(CONTEXT))
    edited.save(tmp_path / "b.star")
    star.load_context(tmp_path / "b.star")
    with pytest.raises(ContextMismatchError, match="rotary"):
        StarLLM(build(family)).load_context(tmp_path / "b.star")


@pytest.mark.parametrize("family", ["phi3_longrope", "llama_dynamic_ntk"])
def test_frequencies_that_the_plain_model_chooses_do_not_count(family: str) -> None:
    """Forbids refusing a context because the plain model has run on a long text."""
    model = build(family)
    star = StarLLM(model, block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    state = identity.state(model)
    with torch.no_grad():
        model(torch.tensor([ids(300)]), use_cache=False)
    assert identity.state(model) == state
    assert len(star.generate(context, [5], max_new_tokens=1).token_ids) == 1


# ------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gemma2", "attn_logit_softcapping", 3.5),
        ("gemma2", "final_logit_softcapping", 3.5),
        ("granite", "attention_multiplier", 0.5),
        ("mistral", "sliding_window", 7),
        ("llama", "rms_norm_eps", 0.5),
    ],
)
def test_settings_edited_after_encoding_are_noticed(family: str, field: str, value: Any) -> None:
    model = build(family)
    star = StarLLM(model, block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    setattr(model.config, field, value)
    with pytest.raises(ContextMismatchError) as caught:
        star.generate(context, [5])
    assert caught.value.field == f"config.{field}"


def test_settings_that_an_engine_was_made_with_stay() -> None:
    """Forbids one window for the masks of the plain model, and another for ours."""
    model = build("mistral")
    star = StarLLM(model, block_size=BLOCK)
    model.config.sliding_window = 7
    with pytest.raises(InvalidInputError, match=r"windows were edited .* StarLLM"):
        star.encode(ids(CONTEXT))
    assert StarLLM(model).encode(ids(CONTEXT))
    model = build("llama")
    star = StarLLM(model, block_size=BLOCK)
    model.config.rope_parameters["rope_theta"] = 77.0
    with pytest.raises(InvalidInputError, match=r"77\.0"):
        star.encode(ids(CONTEXT))


# ------------------------------------------------------------------------------- adapters


def test_adapters_changed_by_any_way_are_noticed(tmp_path: Path) -> None:
    """Forbids looking at the model as a whole only: layers are switched one by one."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(build("llama"), config).eval()
    star = StarLLM(model, block_size=BLOCK)
    weights = peft.get_peft_model_state_dict(model)

    layers = [m for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)]

    def scaled() -> None:
        for layer in layers:
            layer.scaling["default"] *= 2

    def exchange_scales() -> None:
        first, second = layers[0].scaling, layers[1].scaling
        first["default"], second["default"] = second["default"], first["default"]

    for field, change in (
        (
            "weights",
            lambda: peft.set_peft_model_state_dict(model, {k: weights[k] * 3 for k in weights}),
        ),
        ("weights", lambda: [w.data.mul_(2) for n, w in model.named_parameters() if "lora_A" in n]),
        ("adapters", scaled),
        ("adapters", lambda: layers[0].scaling.update(default=5.0)),
        ("adapters", exchange_scales),
        ("adapters", lambda: layers[0].enable_adapters(False)),
        ("adapters", lambda: layers[0].enable_adapters(True)),
        ("adapters", lambda: layers[0].set_adapter([])),
        ("adapters", lambda: layers[0].set_adapter(["default"])),
        ("weights", model.merge_adapter),
    ):
        context = star.encode(ids(CONTEXT))
        context.save(tmp_path / "a.star")
        star.generate(context, [5], max_new_tokens=1)
        change()
        for use in (
            functools.partial(star.generate, context, [5]),
            lambda: star.load_context(tmp_path / "a.star"),
        ):
            with pytest.raises(ContextMismatchError) as caught:
                use()
            assert caught.value.field == field


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
def test_every_part_of_a_quantized_weight_counts(tmp_path: Path) -> None:
    """Forbids leaving out what torch does not show as one tensor."""
    quantization = pytest.importorskip("torchao.quantization")
    model = build("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    star = StarLLM(model, block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    context.save(tmp_path / "a.star")
    star.load_context(tmp_path / "a.star")
    parts = list(checksum.plain_parts(projection(model).weight))
    assert len(parts) >= 2
    for part in parts:
        last = part.view(-1)[-1:].view(torch.uint8)
        last ^= 1
        with pytest.raises(ContextMismatchError, match="weights"):
            star.load_context(tmp_path / "a.star")
        last ^= 1
    star.generate(context, [5], max_new_tokens=1)
    parts[0].view(-1)[:1] += 1
    with pytest.raises(ContextMismatchError, match="weights"):
        star.generate(context, [5])


# ------------------------------------------------------------------------------ tokenizer


def added(tokenizer: Any) -> None:
    tokenizer.add_tokens(["the cat"])


def normalized(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def merged(tokenizer: Any) -> None:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in rules["merges"]]
    tokenizer.backend_tokenizer.model = BPE(rules["vocab"], merges[: len(merges) // 2])


def with_dropout(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.model.dropout = 0.5


@pytest.mark.parametrize("change", [added, normalized, merged, with_dropout])
def test_a_changed_tokenizer_is_noticed(change: Callable[[Any], None]) -> None:
    """Forbids a query in other tokens than the context, as only the object was compared."""
    tokenizer = copy.deepcopy(bundled_tokenizer())
    star = StarLLM(text_model(), tokenizer, block_size=BLOCK)
    context = star.encode("the cat sat. " * 20)
    tokenizer("a longer text", padding=True, truncation=True, max_length=4)
    star.generate(context, "What?", max_new_tokens=1)
    other = copy.deepcopy(tokenizer)
    change(other)
    for engine in (StarLLM(text_model(), other), copy.copy(star)):
        if engine.tokenizer is tokenizer:
            change(tokenizer)
        with pytest.raises(ContextMismatchError) as caught:
            engine.generate(context, "What?", max_new_tokens=1)
        assert caught.value.field == "tokenizer"


def test_another_tokenizer_of_the_same_engine_is_noticed() -> None:
    star = StarLLM(text_model(), bundled_tokenizer(), block_size=BLOCK)
    context = star.encode("the cat sat. " * 20)
    star.tokenizer = copy.deepcopy(bundled_tokenizer())
    star.generate(context, "What?", max_new_tokens=1)
    normalized(star.tokenizer)
    with pytest.raises(ContextMismatchError, match="tokenizer"):
        star.generate(context, "What?")
    star.tokenizer = None
    assert star.generate(context, [5], max_new_tokens=1).token_ids


def test_modules_that_hold_each_other_are_read_once() -> None:
    """Forbids a walk without end over a module that is registered within itself."""
    model = build("llama")
    model.get_decoder().layers[0].mlp.outer = model
    star = StarLLM(model, block_size=BLOCK)
    context = star.encode(ids(CONTEXT))
    assert star.generate(context, [5], max_new_tokens=1).token_ids
    copied(model)
    with pytest.raises(ContextMismatchError, match="weights"):
        star.generate(context, [5])


def test_a_changed_shard_is_not_the_whole_model_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids the identity of the time of loading for weights that have changed since."""
    model = build("llama")
    whole = identity.model_identity(model, model)
    monkeypatch.setattr(
        tensor_parallel, "model_shard", lambda _: SimpleNamespace(identity=dict(whole))
    )
    identities = Identities(model, model)
    assert identities.of(None) == whole | {"tokenizer": None}
    copied(model)
    with pytest.raises(ContextMismatchError, match="differs in weights"):
        identity.check("the context", whole, identities.of(None))
