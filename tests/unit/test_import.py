"""Importing loads and starts nothing, and all public names are there."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import star_attention
from star_attention import errors
from tests.engines import BUNDLED

# Runs before the code under test. A class that cannot be instantiated, not a function, so that
# libraries can still derive from socket.socket while they are imported.
NO_NETWORK = """
import socket
class Blocked(socket.socket):
    def __new__(cls, *args, **kwargs):
        raise AssertionError("a socket was opened")
def blocked(*args, **kwargs):
    raise AssertionError("a host name was looked up or connected to")
socket.socket = Blocked
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = blocked
"""

REPORT = """
import json, sys
torch = sys.modules.get("torch")
dist = sys.modules.get("torch.distributed")
print("\\n" + json.dumps({
    "status": status,
    "torch": torch is not None,
    "transformers": "transformers" in sys.modules,
    "samples": any(name.startswith("star_attention.evals.samples") for name in sys.modules),
    "costs": "star_attention.planning.cost" in sys.modules,
    "cuda": torch is not None and torch.cuda.is_initialized(),
    "process_group": dist is not None and dist.is_available() and dist.is_initialized(),
}))
"""

RUN_MODULE = """
import runpy, sys
sys.argv = ["star-attention", *{arguments!r}]
status = 0
try:
    runpy.run_module("star_attention", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    status = stop.code or 0
"""


# No process group may be created even if torchrun's variables describe one.
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def in_new_process(code: str, *, warnings: str = "error") -> dict[str, Any]:
    """Run `code` in a fresh interpreter without a network and report what it loaded and started."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", NO_NETWORK + code + REPORT],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | TORCHRUN,
    )
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "stdout": done.stdout}


def test_import_starts_nothing() -> None:
    seen = in_new_process("import star_attention; status = 0")
    assert not seen["torch"]
    assert not seen["transformers"]
    assert not seen["cuda"]
    assert not seen["process_group"]


HELPED = (
    "",
    "generate",
    "encode",
    "ask",
    "plan",
    "estimate",
    "calibrate",
    "demo",
    "serve",
    "warmup",
    "bench",
    "bench prefill",
    "eval",
    "eval ruler",
    "eval report",
)


@pytest.mark.parametrize("command", HELPED)
def test_help_imports_only_declarations(command: str) -> None:
    seen = in_new_process(RUN_MODULE.format(arguments=[*command.split(), "--help"]))
    assert seen["status"] == 0
    assert "Usage" in seen["stdout"]
    assert not seen["torch"]
    assert not seen["transformers"]
    assert not seen["samples"]
    assert not seen["costs"]


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import transformers", "transformers"),
        ("import star_attention.evals.samples.sample", "samples"),
        ("import star_attention.planning.cost", "costs"),
        (
            "import torch.distributed as dist; "
            "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
            "process_group",
        ),
    ],
)
def test_the_probe_sees_what_it_looks_for(code: str, name: str) -> None:
    """Forbids a test that passes because the report looks in the wrong place."""
    allow_sockets = "socket.socket = Blocked.__base__; "
    assert in_new_process(f"{allow_sockets}{code}; status = 0")[name]


def test_the_probe_sees_a_socket() -> None:
    with pytest.raises(AssertionError, match="a socket was opened"):
        in_new_process("socket.socket(); status = 0")


def test_a_model_folder_needs_no_network(tmp_path: Path) -> None:
    """It loads without the network even if HF_HUB_OFFLINE is not set."""
    code = f"""
import os
import re
os.environ.pop("HF_HUB_OFFLINE", None)
import logging
logging.disable(logging.WARNING)
from star_attention import StarLLM
star = StarLLM.from_pretrained({str(BUNDLED)!r}, block_size=256, device="cpu")
context = star.encode("The secret number for otter is 7." + " Tea is hot." * 100)
star.generate(context, "<|q|>What?<|a|>", max_new_tokens=2)
context.save({str(tmp_path / "a.star")!r})
star.load_context({str(tmp_path / "a.star")!r})
status = 0
"""
    # Other libraries' deprecation warnings do not matter here.
    assert in_new_process(code, warnings="ignore")["status"] == 0


def test_every_public_name_resolves() -> None:
    assert len(set(star_attention.__all__)) == len(star_attention.__all__)
    for name in star_attention.__all__:
        assert getattr(star_attention, name) is not None
        assert name in dir(star_attention)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """Forbids a lazy `__getattr__` for any name: it breaks `hasattr`, pickling and pydoc."""
    assert not hasattr(star_attention, "no_such_name")


DOCUMENTED = [
    "StarLLM",
    "EncodedContext",
    "Generation",
    "supported",
    "pipeline",
    "errors",
    "__version__",
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_exist(name: str) -> None:
    assert getattr(star_attention, name) is not None


ERRORS = [
    e for _, e in inspect.getmembers(errors, inspect.isclass) if e.__module__ == errors.__name__
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_ours(error: type[Exception]) -> None:
    """Users catch everything that the library raises on purpose by one base class."""
    assert issubclass(error, errors.StarAttentionError)
    assert error.__doc__


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_is_in_the_drawn_tree(error: type[Exception]) -> None:
    assert re.search(
        rf"^[ │]*(├── |└── )?{error.__name__}( |$)", errors.__doc__ or "", re.MULTILINE
    )
