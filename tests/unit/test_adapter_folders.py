"""Folders of PEFT adapters as models, and adapters beside a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM, supported
from star_attention.errors import (
    InvalidInputError,
    MissingPackageError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from tests.command_line import failed, ok
from tests.engines import CONTEXT, QUERY, bundled_tokenizer, ids, text_model
from tests.families import build
from tests.refusals import refused

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and its adapter `lora`."""
    folder = tmp_path_factory.mktemp("adapters")
    text_model().save_pretrained(folder / "base")
    bundled_tokenizer().save_pretrained(folder / "base")
    with_lora(folder).save_pretrained(folder / "lora")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """The same, to be changed; the adapter still names the base of `saved`."""
    return Path(shutil.copytree(saved, tmp_path / "adapters"))


def with_lora(folder: Path, **settings: Any) -> Any:
    """A PEFT model around the base of a folder."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        **{"target_modules": ["q_proj", "v_proj"], **settings},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(base, config).eval()


def edit(adapter: Path, **fields: Any) -> Path:
    """Change fields of an adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return adapter


def load(path: Any, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(path, block_size=16, **settings)


def logits(star: StarLLM) -> Any:
    return star.logits(star.encode(ids(CONTEXT)), ids(QUERY))


def test_an_adapters_folder_answers_as_its_merged_model(saved: Path) -> None:
    merged = StarLLM(with_lora(saved).merge_and_unload(), block_size=16)
    base = load(saved / "base")
    for star in (load(saved / "lora"), load(saved / "base", adapter=saved / "lora")):
        torch.testing.assert_close(logits(star), logits(merged))
        assert star.tokenizer is not None
        assert (logits(star) - logits(base)).abs().max() > 1e-3
    assert supported(saved / "lora")


def test_a_base_that_is_not_here(folder: Path) -> None:
    adapter = edit(folder / "lora", base_model_name_or_path="/home/trainer/base")
    remedy = "give the base model's path, and this folder with --adapter (in Python: adapter=)"
    message = f"{adapter} is an adapter of /home/trainer/base, which cannot be loaded"
    refused(ModelNotFoundError, message, remedy, call=lambda: load(adapter))
    refused(ModelNotFoundError, message, remedy, call=lambda: supported(adapter))
    assert len(load(folder / "base", adapter=adapter).encode(ids(50))) == 50
    edit(adapter, base_model_name_or_path=None)
    refused(ModelNotFoundError, "does not name its base", remedy, call=lambda: load(adapter))


def test_folders_that_hold_no_adapter(folder: Path) -> None:
    base, adapter = folder / "base", folder / "lora"
    message = f"the folder {base} holds no adapter_config.json: it is not an adapter"
    refused(ModelNotFoundError, message, call=lambda: load(base, adapter=base))
    message = "there is no adapter folder /nowhere"
    refused(ModelNotFoundError, message, call=lambda: load(base, adapter="/nowhere"))
    message = "5 is not an adapter: expected the path of its folder or a hub id, got int"
    refused(ModelNotFoundError, message, call=lambda: load(base, adapter=5))
    message = "give the base model, and one adapter"
    refused(ModelNotFoundError, message, call=lambda: load(adapter, adapter=adapter))
    (adapter / "adapter_model.safetensors").unlink()
    message = f"the adapter at {adapter} has no weights (adapter_model.safetensors)"
    refused(ModelNotFoundError, message, call=lambda: load(adapter))
    shutil.copy(adapter / "adapter_config.json", base)
    message = "if it was merged into them, remove adapter_config.json"
    refused(ModelNotFoundError, message, call=lambda: load(base))


def test_adapters_that_cannot_run_are_refused_before_the_weights(folder: Path) -> None:
    adapter = edit(folder / "lora", peft_type="PROMPT_TUNING")
    message = "PROMPT_TUNING adapters put virtual tokens before every forward"
    refused(UnsupportedModelError, message, call=lambda: load(adapter))
    assert supported(adapter).reasons == (f"{message}; adapters inside the layers (LoRA) work",)
    edit(adapter, peft_type="LORA", task_type="SEQ_CLS")
    message = "it was trained for SEQ_CLS, not to generate text (CAUSAL_LM)"
    refused(UnsupportedModelError, message, call=lambda: load(adapter))


def test_an_adapter_of_another_model(folder: Path) -> None:
    """Forbids layers that stay as they were: peft only warns of them, or says nothing."""
    adapter = folder / "lora"
    build("llama").save_pretrained(folder / "other")
    message = f"the adapter at {adapter} could not be loaded around {folder / 'other'}: "
    remedy = "check that it was trained for this model"
    call = lambda: load(folder / "other", adapter=adapter)  # noqa: E731
    refused(ModelNotFoundError, message, "size mismatch", call=call)
    config = json.loads((folder / "base" / "config.json").read_text())
    deeper = StarLLM(text_model()).model.config.to_dict() | {"num_hidden_layers": 3}
    for name, layers in (("shallow", 1), ("deep", 3)):
        resized = type(text_model())(
            type(text_model().config)(**deeper | {"num_hidden_layers": layers})
        )
        resized.save_pretrained(folder / name)
    assert config["num_hidden_layers"] == 2
    call = lambda: load(folder / "shallow", adapter=adapter)  # noqa: E731
    refused(ModelNotFoundError, "the model has no place for", remedy, call=call)
    call = lambda: load(folder / "deep", adapter=adapter)  # noqa: E731
    refused(ModelNotFoundError, "Found missing adapter keys", remedy, call=call)


def test_a_tokenizer_with_new_tokens(folder: Path) -> None:
    """An adapter's tokens come with its tokenizer and its embeddings, or are refused."""
    tokenizer = bundled_tokenizer()
    tokenizer = type(tokenizer).from_pretrained(folder / "base")
    tokenizer.add_tokens(["<new>"])
    model = with_lora(folder).unload()
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
    )
    trained = peft.get_peft_model(model, config)
    trained.save_pretrained(folder / "grown")
    tokenizer.save_pretrained(folder / "grown")
    star = load(folder / "base", adapter=folder / "grown")
    assert star.encode("<new>").token_ids[-1] == len(tokenizer) - 1
    expected = StarLLM(trained.eval(), block_size=16)
    assert torch.equal(logits(star), logits(expected))
    tokenizer.save_pretrained(folder / "lora")
    message = "the adapter brings no embeddings for the others"
    refused(ModelNotFoundError, message, call=lambda: load(folder / "lora"))


def test_what_an_adapter_does_not_work_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "star_attention.hf.loading.packages.find_spec",
        lambda name: None if name == "peft" else object(),
    )
    with pytest.raises(MissingPackageError, match="is an adapter, which needs the package peft"):
        load(folder / "lora")
    message = "tensor_parallel 2 does not divide the number of ranks"
    refused(InvalidInputError, message, call=lambda: load(folder / "lora", tensor_parallel=2))


def test_on_the_command_line(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The secret number for otter is 4910508.\n" * 4)
    command = ["generate", tmp_path / "text.txt", "--query", "<|q|>What?<|a|>", "--json"]
    command += ["--max-new-tokens", "8"]
    answers = {
        name: json.loads(ok(*command, *model).out)["token_ids"]
        for name, model in {
            "base": ["-m", saved / "base"],
            "folder": ["-m", saved / "lora"],
            "both": ["-m", saved / "base", "--adapter", saved / "lora"],
        }.items()
    }
    assert answers["folder"] == answers["both"] != answers["base"]
    line = failed(*command, "-m", saved / "base", "--adapter", "/nowhere")
    assert line.startswith("error: there is no adapter folder /nowhere")
