"""The files of `deploy/`: commands and settings are the server's, and what reads them agrees."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from star_attention.cli import serving
from tests.command_line import ok

pytest.importorskip("starlette")

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT, SITE, DOCKERFILE = (
    DEPLOY / n for n in ("star-attention.service", "nginx.conf", "Dockerfile")
)
SETTINGS = "/etc/star-attention/serve.toml"
MODEL = "/srv/models/model"


def unjoined(path: Path) -> str:
    """Return a file's text with its continued lines in one."""
    return path.read_text(encoding="utf-8").replace("\\\n", " ")


def command_of_unit() -> list[str]:
    match = re.search(r"^ExecStart=(.*)$", unjoined(UNIT), re.MULTILINE)
    assert match is not None
    return shlex.split(match[1])


def command_of_image() -> list[str]:
    match = re.search(r"^ENTRYPOINT (.*)$", unjoined(DOCKERFILE), re.MULTILINE)
    assert match is not None
    command: list[str] = json.loads(match[1])
    return command


@pytest.mark.parametrize(
    ("command", "host"),
    [(command_of_unit(), "127.0.0.1"), (command_of_image(), "0.0.0.0")],
    ids=["unit", "image"],
)
def test_the_commands_run(command: list[str], host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids options of the server that are renamed, and not here."""
    calls: list[Any] = []
    monkeypatch.setattr(serving, "serve", lambda *arguments: calls.append(arguments))
    program, *arguments = (word.replace(SETTINGS, str(DEPLOY / "serve.toml")) for word in command)
    assert Path(program).name == "star-attention"
    ok(*arguments)
    ((model, settings, _, _),) = calls
    assert model.model == MODEL
    assert settings.host == host
    assert settings.keys is not None
    assert settings.store is not None


def test_all_settings_of_the_example_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbids a line that fails once somebody takes its comment sign away."""
    calls: list[Any] = []
    monkeypatch.setattr(serving, "serve", lambda *arguments: calls.append(arguments))
    text = (DEPLOY / "serve.toml").read_text(encoding="utf-8")
    path = tmp_path / "serve.toml"
    path.write_text(re.sub(r"^# (?=[a-z-]+ = )", "", text, flags=re.MULTILINE))
    ok("serve", "--config", path)
    ((_, settings, _, _),) = calls
    assert settings.max_host_bytes == 64 * 2**30


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd")
    # Of the command it looks whether it is there.
    text = UNIT.read_text(encoding="utf-8")
    unit = tmp_path / UNIT.name
    unit.write_text(text.replace("/opt/star-attention/bin/star-attention", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_nginx_takes_the_site(tmp_path: Path) -> None:
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx")
    site = re.sub(r"listen 443 ssl;|ssl_cert.*;", "", SITE.read_text(encoding="utf-8"))
    folders = "".join(
        f"{name}_temp_path {tmp_path / name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path / 'pid'}; events {{}}\nhttp {{ access_log off; {folders}\n{site}\n}}\n"
    )
    command = ["nginx", "-t", "-e", tmp_path / "log", "-c", config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_image_is_run_by_nobody_special_and_watched() -> None:
    text = unjoined(DOCKERFILE)
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001"]
    health = re.search(r"^HEALTHCHECK .* CMD (\[.*\])$", text, re.MULTILINE)
    assert health is not None
    python, flag, code = json.loads(health[1])
    assert (python, flag) == ("python", "-c")
    compile(code, "health", "exec")
    # What it copies, and nothing that a checkout has beside it.
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*"
    for names in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for name in names.split():
            assert f"!{name}" in ignored
            assert (DEPLOY.parent / name).exists()
