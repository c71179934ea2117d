"""GGUF files as models: alone, in folders, on the command line, and broken ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from star_attention import StarLLM, supported
from star_attention.errors import MissingPackageError, ModelNotFoundError
from star_attention.hf.loading.load import load_tokenizer
from tests.command_line import failed, ok
from tests.engines import QUERY, bundled_tokenizer, ids, text_model
from tests.gguf_files import write_llama
from tests.real_model import packaged_file
from tests.refusals import refused

pytest.importorskip("gguf")

TEXT = "The secret number for otter is 4910508.\n"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one GGUF file."""
    folder = tmp_path_factory.mktemp("gguf")
    write_llama(folder / "tiny.gguf", text_model())
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(written, tmp_path / "model"))


def load(path: Any, **settings: Any) -> StarLLM:
    return StarLLM.from_pretrained(path, block_size=32, **settings)


def test_a_file_answers_as_the_model_it_was_made_of(written: Path) -> None:
    star = load(written / "tiny.gguf")
    original = StarLLM(text_model(), bundled_tokenizer(), block_size=32)
    expected = original.logits(original.encode(ids(100)), ids(QUERY))
    assert torch.equal(star.logits(star.encode(ids(100)), ids(QUERY)), expected)
    for text in (TEXT, "  two spaces,\n\n12345 é"):
        assert star.encode(text).token_ids.tolist() == original.encode(text).token_ids.tolist()
    chat = star.encode([{"role": "user", "content": TEXT}])
    assert star.tokenizer.decode(chat.token_ids).endswith(TEXT)
    assert star.tokenizer.eos_token == "<eos>"


@pytest.mark.slow
def test_every_way_to_name_a_file(folder: Path) -> None:
    expected = load(folder / "tiny.gguf").encode(TEXT).kv.layers[1].stored()[0]
    ways: list[tuple[Path, dict[str, Any]]] = [
        (folder, {}),
        (folder, dict(gguf_file="tiny.gguf")),
        (folder, dict(model_kwargs={"gguf_file": "tiny.gguf"})),
        (folder.parent, dict(subfolder=folder.name)),
    ]
    for path, settings in ways:
        star = load(path, **settings)
        assert torch.equal(star.encode(TEXT).kv.layers[1].stored()[0], expected)
    assert supported(folder)
    assert supported(folder / "tiny.gguf")
    # A config beside the file is not the file's own.
    (folder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    assert supported(folder)
    star = load(folder, gguf_file="tiny.gguf")
    assert torch.equal(star.encode(TEXT).kv.layers[1].stored()[0], expected)
    # A projector of a vision model is no language model.
    (folder / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    assert supported(folder)


def test_tokenizer_files_beside_the_file_come_first(folder: Path) -> None:
    tokenizer = bundled_tokenizer()
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|a|>"}))
    assert load_tokenizer(folder).eos_token == "<|a|>"
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder).eos_token == "<eos>"


def test_a_saved_context_does_not_depend_on_the_files_name(folder: Path, tmp_path: Path) -> None:
    star = load(folder)
    context = star.encode(TEXT)
    context.save(tmp_path / "text.star")
    expected = star.generate(context, "<|q|>What?<|a|>", max_new_tokens=4).token_ids
    (folder / "tiny.gguf").rename(folder / "other.gguf")
    star = load(folder / "other.gguf")
    loaded = star.load_context(tmp_path / "text.star")
    assert star.generate(loaded, "<|q|>What?<|a|>", max_new_tokens=4).token_ids == expected


def test_on_the_command_line(written: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(4 * TEXT)
    model = ["-m", written / "tiny.gguf"]
    saved = tmp_path / "text.star"
    command = ["generate", *model, tmp_path / "text.txt", "--query", "<|q|>What?<|a|>", "--json"]
    first = json.loads(ok(*command, "--max-new-tokens", "4", "--save", saved).out)
    command = ["ask", saved, *model, "--query", "<|q|>What?<|a|>", "--json"]
    again = json.loads(ok(*command, "--max-new-tokens", "4").out)
    assert first["token_ids"] == again["token_ids"]
    plan = json.loads(ok("plan", *model, "--context", "1k", "--json").out)
    assert plan["parameters"] == sum(weight.numel() for weight in text_model().parameters())
    estimate = ["estimate", *model, "--context", "1k", "--hardware", "a100-nvlink", "--json"]
    assert json.loads(ok(*estimate).out)


def test_files_that_cannot_be_loaded(folder: Path) -> None:
    file = folder / "tiny.gguf"
    missing = folder / "none.gguf"
    refused(ModelNotFoundError, f"there is no GGUF file {missing}", call=lambda: load(missing))
    refused(
        ModelNotFoundError,
        f"there is no GGUF file {missing}",
        call=lambda: load(folder, gguf_file="none.gguf"),
    )
    broken = folder / "broken.gguf"
    broken.write_bytes(b"<html>")
    message = f"{broken} is not a GGUF file: it does not begin like one"
    refused(ModelNotFoundError, message, call=lambda: load(broken))
    message = "holds 2 GGUF files, broken.gguf, tiny.gguf; give the path of one of them"
    refused(ModelNotFoundError, message, call=lambda: load(folder))
    said = f"no model could be read at {broken}: the file is truncated or damaged; copy or"
    for size in (10, 300, file.stat().st_size - 9):
        broken.write_bytes(file.read_bytes()[:size])
        refused(ModelNotFoundError, said, call=lambda: load(broken))
    refused(
        ModelNotFoundError, "/dev/null is neither a folder nor a", call=lambda: load("/dev/null")
    )
    part = folder / "tiny-00001-of-00002.gguf"
    file.rename(part)
    message = f"{part} is one part of a GGUF file; join the parts with llama.cpp's"
    refused(ModelNotFoundError, message, call=lambda: load(part))
    refused(ModelNotFoundError, "name two files", call=lambda: load(part, gguf_file="x.gguf"))


def test_a_missing_package(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "star_attention.hf.loading.packages.find_spec",
        lambda name: None if name == "gguf" else object(),
    )
    message = (
        f"{written / 'tiny.gguf'} is a GGUF file, which needs the package gguf; run: pip install"
        ' "star-attention[gguf]"'
    )
    with pytest.raises(MissingPackageError) as caught:
        load(written)
    assert str(caught.value) == message
    line = failed("plan", "-m", written / "tiny.gguf", "--context", "1k")
    assert line == f"error: {message}"


@pytest.mark.slow
def test_a_published_model() -> None:
    """Dense attention on a published, quantized file answers as its own `generate`."""
    star = StarLLM.from_pretrained(packaged_file(), method="dense")
    head, question = "The dog is called Rex. The cat is called Tom.\n", "What is the dog's name?"
    context = star.encode([{"role": "user", "content": head}])
    reply = star.generate(
        context, [{"role": "user", "content": question}], max_new_tokens=20, do_sample=False
    )
    prompt = star.tokenizer.apply_chat_template(
        [{"role": "user", "content": head + question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    stock = star.model.generate(**prompt, max_new_tokens=20, do_sample=False)
    assert reply.token_ids == stock[0, prompt["input_ids"].shape[1] :].tolist()
    assert "Rex" in reply.text
