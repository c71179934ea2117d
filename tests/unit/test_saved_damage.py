"""A damaged or foreign file of a context is refused: it never gives a wrong answer."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from star_attention import EncodedContext
from star_attention.errors import (
    ContextNotFoundError,
    CorruptContextError,
)
from tests.engines import (
    CONTEXT,
    engine,
    ids,
)
from tests.saved_contexts import load_fully, small_context


@pytest.fixture(scope="module")
def context() -> EncodedContext:
    return small_context()


@pytest.fixture
def path(tmp_path: Path, context: EncodedContext) -> Path:
    context.save(tmp_path / "a.star")
    return tmp_path / "a.star"


def outcome(path: Path) -> str:
    try:
        opened = load_fully(path)
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
        pytest.param(lambda data: b"", "truncated, modified or something else", id="empty"),
        pytest.param(
            lambda data: b"Once upon a time.\n" * 99,
            "it does not begin like one; give a file",
            id="text",
        ),
        pytest.param(
            lambda data: b"\x00" * 4096, "is not a saved context: it does not begin", id="zeros"
        ),
        pytest.param(
            lambda data: data[:100], "truncated, modified or something else", id="shorter"
        ),
        pytest.param(
            lambda data: data[:8], "truncated, modified or something else", id="eight bytes"
        ),
        pytest.param(
            lambda data: data + b"!", "truncated, modified or something else", id="longer"
        ),
        pytest.param(lambda data: data + data, "truncated, modified or something else", id="twice"),
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


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Forbids waiting for its other end for ever, with Python's lock held."""
    os.mkfifo(tmp_path / "pipe.star")
    with pytest.raises(CorruptContextError, match=r"pipe\.star is a pipe or a device; give a file"):
        engine("llama").load_context(tmp_path / "pipe.star")


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
    rewrite(path, lambda header, _: header.update(format_version=5))
    with pytest.raises(
        CorruptContextError, match="has format version 5, this library reads up to version 4"
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
        load_fully(path)
