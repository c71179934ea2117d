"""Saved contexts: the same answers after a round trip, and never a wrong one from a damaged or foreign file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from star_attention import EncodedContext, StarLLM
from star_attention.errors import (
    ContextMismatchError,
    ContextNotFoundError,
    ContextSaveError,
    CorruptContextError,
)
from tests.engines import (
    BUNDLED,
    CONTEXT,
    QUERY,
    assert_same_kv,
    bundled_tokenizer,
    engine,
    ids,
    stored,
    tiny,
)
from tests.families import FAMILIES, build

BLOCK = 20
# What a layer keeps differs: plain, shared between layers, compressed (MLA), two to a layer, pinned frequencies, sinks.
KINDS = ["llama", "gemma3n", "deepseek_v3", "longcat_flash", "phi3_longrope", "gpt_oss"]


@pytest.fixture(scope="module")
def context() -> EncodedContext:
    return engine("llama", block_size=BLOCK).encode(ids(CONTEXT))


@pytest.fixture
def path(tmp_path: Path, context: EncodedContext) -> Path:
    context.save(tmp_path / "a.star")
    return tmp_path / "a.star"


def answer(star: StarLLM, context: EncodedContext) -> list[int]:
    tokens: list[int] = star.generate(context, ids(QUERY, seed=2), max_new_tokens=6).token_ids
    return tokens


def use(path: Path, star: StarLLM | None = None) -> EncodedContext:
    """Open a file and touch all that it holds."""
    opened: EncodedContext = (star or engine("llama")).load_context(path)
    stored(opened)
    return opened


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_round_trip_keeps_every_bit_and_every_answer(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    star = StarLLM(
        tiny(name) if dtype == torch.float32 else build(name, dtype),
        block_size=BLOCK,
        anchor_size=7,
    )
    context = star.encode(ids(CONTEXT))
    context.save(tmp_path / "a.star")
    again = star.load_context(tmp_path / "a.star")
    assert torch.equal(again.token_ids, context.token_ids)
    assert again.token_ids.dtype == torch.int64
    assert (again.plan, again.method, again.identity) == (
        context.plan,
        context.method,
        context.identity,
    )
    assert (again.rope_length, again.chat, again.encode_s) == (
        context.rope_length,
        None,
        context.encode_s,
    )
    assert (again.rope_length is not None) == (name == "phi3_longrope")
    assert [layer.expands for layer in again.kv.layers] == [
        layer.expands for layer in context.kv.layers
    ]
    assert [layer.is_empty for layer in again.kv.layers] == [
        layer.is_empty for layer in context.kv.layers
    ]
    assert_same_kv(again, context, tolerance=0)
    assert again.nbytes == context.nbytes
    first, second = (
        star.generate(c, ids(QUERY), max_new_tokens=6, return_logits=True) for c in (context, again)
    )
    assert first.token_ids == second.token_ids
    assert torch.equal(first.logits, second.logits)


def test_kinds_differ_in_what_they_keep() -> None:
    """Forbids a round-trip test over layers that are all alike."""
    contexts = {name: engine(name, block_size=BLOCK).encode(ids(CONTEXT)) for name in KINDS}
    assert [layer.is_empty for layer in contexts["gemma3n"].kv.layers] == [False, False, True, True]
    assert all(layer.expands for layer in contexts["deepseek_v3"].kv.layers)
    assert len(contexts["longcat_flash"].kv.layers) == 4
    assert contexts["phi3_longrope"].rope_length == CONTEXT + 1024


def test_a_loaded_context_can_be_extended_and_saved_again(
    path: Path, context: EncodedContext
) -> None:
    star = engine("llama", block_size=64)
    extended = star.extend(star.load_context(path), ids(31, seed=3))
    assert_same_kv(extended, star.extend(context, ids(31, seed=3)), tolerance=0)
    extended.save(path)  # over the file that the first part is still mapped from
    assert_same_kv(star.load_context(path), extended, tolerance=0)
    assert answer(star, star.load_context(path)) == answer(star, extended)


def test_the_bundled_model_answers_the_same_from_a_file(tmp_path: Path) -> None:
    star = StarLLM.from_pretrained(BUNDLED, dtype="float32", block_size=256, anchor_size=64)
    text = (
        "The hill is tall and the road is long.\nThe secret number for torpidity-kill is 4910508.\n"
        * 30
    )
    messages = [{"role": "user", "content": text}]
    question = "What is the secret number for torpidity-kill?"
    context = star.encode(messages)
    context.save(tmp_path / "a.star")
    reply = star.generate(context, question, max_new_tokens=24, return_logits=True)
    # A fresh engine with other sizes of its own: everything comes from the file.
    other = StarLLM.from_pretrained(BUNDLED, dtype="float32", block_size="4k")
    again = other.load_context(tmp_path / "a.star")
    assert again.chat == context.chat
    assert (again.plan.block_size, again.plan.anchor_size) == (256, 64)
    loaded = other.generate(again, question, max_new_tokens=24, return_logits=True)
    assert (loaded.text, loaded.token_ids) == (reply.text, reply.token_ids)
    assert torch.equal(loaded.logits, reply.logits)
    assert "4910508" in loaded.text


def test_sizes_come_from_the_file(path: Path) -> None:
    again = engine("llama", block_size=50, anchor_size=3).load_context(path)
    assert (again.plan.block_size, again.plan.anchor_size, len(again)) == (BLOCK, BLOCK, CONTEXT)


# ---------------------------------------------------------------------- the file


def test_the_file_is_plain_safetensors_for_its_owner_only(path: Path) -> None:
    """It holds the text's token ids: nobody else is to read it, and nothing in it runs."""
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with safe_open(path, framework="pt") as file:
        assert file.get_tensor("token_ids").tolist() == ids(CONTEXT)
        assert set(file.keys()) == {
            "token_ids",
            *(f"layers.{i}.{kv}" for i in range(3) for kv in "kv"),
        }


def test_opening_a_file_reads_no_keys(path: Path) -> None:
    """Damage in the last layer is not seen when the file is opened, but before the layer is used."""
    star = engine("llama")
    with safe_open(path, framework="pt") as file:
        needle = file.get_tensor("layers.2.v").numpy().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 100] ^= 1
    path.write_bytes(data)
    opened = star.load_context(path)
    assert all(not layer.is_loaded for layer in opened.kv.layers)
    opened.kv.layers[0].pair()
    opened.kv.layers[1].pair()
    assert not opened.kv.layers[2].is_loaded
    for _ in range(2):
        with pytest.raises(
            CorruptContextError, match=r"layers\.2\.v in .*a\.star does not match its checksum"
        ):
            answer(star, opened)


def test_keys_are_pages_of_the_file(path: Path) -> None:
    """Memory-mapped: what is read can be dropped again, and a context larger than memory can be opened."""
    opened = use(path)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            low, _, high = line.split()[0].partition("-")
            mapped.append(range(int(low, 16), int(high, 16)))
    for k_1GLD, v_1GLD in (layer.pair() for layer in opened.kv.layers):
        assert any(k_1GLD.data_ptr() in area for area in mapped)
        assert any(v_1GLD.data_ptr() in area for area in mapped)


@pytest.mark.parametrize("target", [".", "missing/a.star", "a.star/b", "x" * 300, "nul\0byte"])
def test_a_place_that_cannot_be_written(target: str, path: Path, context: EncodedContext) -> None:
    before = path.read_bytes()
    with pytest.raises(ContextSaveError, match="cannot save the context to") as caught:
        context.save(path.parent / target)
    assert isinstance(caught.value, OSError)
    assert os.listdir(path.parent) == ["a.star"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("target", [5, None, ["a.star"]])
def test_what_is_no_path(target: Any, context: EncodedContext) -> None:
    with pytest.raises(
        ContextSaveError, match=r"it is no path, but of type .*; give a text or a pathlib.Path"
    ):
        context.save(target)


def test_a_home_is_not_expanded_and_it_says_so(context: EncodedContext) -> None:
    """As everywhere in Python; forbids the advice to create a folder `~`."""
    says = "; ~ is not expanded here: write the folder out"
    with pytest.raises(ContextSaveError, match=f"the folder ~ does not exist{says}"):
        context.save("~/nowhere.star")
    with pytest.raises(ContextNotFoundError, match=f"no saved context at ~/nowhere.star{says}"):
        engine("llama").load_context("~/nowhere.star")


def test_a_long_name_is_no_hindrance(tmp_path: Path, context: EncodedContext) -> None:
    """Forbids a temporary name that is longer than the name that was asked for."""
    context.save(tmp_path / ("x" * 255))
    assert os.listdir(tmp_path) == ["x" * 255]


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 1000, 60_000])
def test_a_write_that_fails_half_way_leaves_the_old_file(limit: int, path: Path) -> None:
    before = path.read_bytes()
    assert len(before) > 60_000
    other = engine("llama", block_size=BLOCK).encode(ids(CONTEXT, seed=5))
    with (
        file_size_limit(limit),
        pytest.raises(
            ContextSaveError,
            match=r"cannot save .*File too large.*free space or choose another place",
        ),
    ):
        other.save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["a.star"]
    other.save(path)
    assert use(path).token_ids.tolist() == ids(CONTEXT, seed=5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk: Path, context: EncodedContext) -> None:
    """Forbids a half-written file, and a crash (a write into mapped pages of a full disk kills the process)."""
    target = small_disk / "a.star"
    context.save(target)  # 117 KiB
    before = target.read_bytes()
    with pytest.raises(
        ContextSaveError,
        match=r"No space left on device.*a file that stood there before is untouched",
    ):
        context.save(target)
    assert target.read_bytes() == before
    assert os.listdir(small_disk) == ["a.star"]


# ---------------------------------------------------------------------- damage


def outcome(path: Path) -> str:
    try:
        opened = use(path)
    except CorruptContextError:
        return "refused"
    return "used" if opened.token_ids.tolist() == ids(CONTEXT) else "wrong"


def test_every_truncated_file_is_refused(path: Path) -> None:
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = {*range(12), header - 1, header, header + 1, len(data) - 1}
    lengths |= {random.Random(0).randrange(len(data)) for _ in range(60)}
    assert outcome(path) == "used"
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        assert outcome(path) == "refused", f"{length} of {len(data)} bytes"


def test_every_flipped_bit_is_refused(path: Path) -> None:
    """One bit anywhere: in the length, the header, its checksum, the token ids, any tensor."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    pick = random.Random(1)
    places = [*range(12), *(pick.randrange(header) for _ in range(250)), header, len(data) - 1]
    places += [pick.randrange(header, len(data)) for _ in range(250)]
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << pick.randrange(8)
        path.write_bytes(damaged)
        assert outcome(path) == "refused", f"byte {place} of {len(data)}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda data: b"", "truncated, changed or something else", id="empty"),
        pytest.param(
            lambda data: b"Once upon a time.\n" * 99,
            "it does not begin like one; give what",
            id="text",
        ),
        pytest.param(
            lambda data: b"\x00" * 4096, "is no saved context: it does not begin", id="zeros"
        ),
        pytest.param(lambda data: data[:100], "truncated, changed or something else", id="shorter"),
        pytest.param(
            lambda data: data[:8], "truncated, changed or something else", id="eight bytes"
        ),
        pytest.param(lambda data: data + b"!", "truncated, changed or something else", id="longer"),
        pytest.param(lambda data: data + data, "truncated, changed or something else", id="twice"),
    ],
)
def test_other_files_are_refused(
    change: Callable[[bytes], bytes], message: str, path: Path
) -> None:
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorruptContextError, match=message):
        engine("llama").load_context(path)


def test_a_foreign_safetensors_file_is_refused(path: Path) -> None:
    save_file({"layers.0.k": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(CorruptContextError, match="a safetensors file, but not a saved context"):
        engine("llama").load_context(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptContextError, match="is a folder; give the file of a saved context"):
        engine("llama").load_context(tmp_path)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ContextNotFoundError, match=r"there is no saved context at .*none\.star"):
        engine("llama").load_context(tmp_path / "none.star")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(CorruptContextError, match="File name too long"):
        engine("llama").load_context(tmp_path / ("x" * 300))


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> None:
    """The same file with another header or other tensors, and a header checksum that fits."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["star_attention"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    change(header, tensors)
    text = json.dumps(header)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, path, metadata={"star_attention": text, "sha256": checksum})


def test_a_format_of_the_future_is_refused_by_its_version(path: Path) -> None:
    rewrite(path, lambda header, _: header.update(format_version=2))
    with pytest.raises(
        CorruptContextError, match="has format version 2, this library reads version 1"
    ):
        engine("llama").load_context(path)


def test_tensors_must_be_those_of_the_header(path: Path) -> None:
    rewrite(path, lambda _, tensors: tensors.pop("layers.1.k"))
    with pytest.raises(
        CorruptContextError, match="does not hold the tensors that its header lists"
    ):
        engine("llama").load_context(path)


def test_tensors_must_be_where_they_were(path: Path) -> None:
    """Forbids two layers of equal shape changing places."""

    def swap(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.k"], tensors["layers.1.k"] = tensors["layers.1.k"], tensors["layers.0.k"]

    rewrite(path, swap)
    with pytest.raises(
        CorruptContextError, match=r"layers\.0\.k in .* does not match its checksum"
    ):
        use(path)


# ---------------------------------------------------------------------- another model or setting


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
    mine = engine("llama", bundled_tokenizer(), block_size=BLOCK)
    mine.encode(ids(CONTEXT)).save(path)
    with pytest.raises(
        ContextMismatchError, match=rf"a\.star does not fit: its {field} is .*, this model's is"
    ) as no:
        other().load_context(path)
    assert no.value.field == field
    remedy = (
        "load the model in float32 (dtype=, or --dtype)"
        if field == "dtype"
        else "load the model that encoded it"
    )
    assert f"; {remedy}, or encode the context again" in str(no.value)
    use(path, mine)


def test_one_changed_weight_is_seen(path: Path) -> None:
    """Fine-tuning changes all weights, so a sample is enough; but it must be of every one of them."""
    model = build("llama")
    for name, parameter in model.named_parameters():
        kept = parameter.data.clone()
        parameter.data *= 1.01
        with pytest.raises(ContextMismatchError) as caught:
            StarLLM(model).load_context(path)
        assert caught.value.field == "weights", name
        parameter.data.copy_(kept)
    use(path, StarLLM(model))


def test_token_ids_alone_need_no_tokenizer(tmp_path: Path) -> None:
    engine("llama", bundled_tokenizer()).encode(ids(CONTEXT)).save(tmp_path / "a.star")
    assert use(tmp_path / "a.star", engine("llama")).identity["tokenizer"] is None


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
    with pytest.raises(ContextMismatchError, match="the context does not fit: its weights is"):
        answer(StarLLM(build("llama", seed=1)), context)
