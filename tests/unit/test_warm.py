"""Forked programs look like fresh ones from outside: streams, folder, status, signals, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.warm import python


def outcome(code: str, redirection: str = "") -> tuple[int, str, str]:
    """Run code in a shell that redirects its streams; return status and what it wrote."""
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *python("-c", code)],
        input="hello",
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_streams_and_status() -> None:
    assert outcome("print(input() * 2); import sys; sys.exit(7)") == (7, "hellohello\n", "")
    assert outcome("import sys; sys.exit('no')") == (1, "", "no\n")
    status, _, err = outcome("1 / 0")
    assert (status, err.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")
    closed = "import sys; print(sys.stdin, sys.stdout, file=sys.stderr)"
    assert outcome(closed, "<&- >&-") == (0, "", "None None\n")


def test_folder_environment_and_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nprint(os.getcwd(), os.environ['WARM'], sys.argv[1:])\n")
    done = subprocess.run(
        python(script, "a b"),
        cwd=tmp_path,
        env=os.environ | {"WARM": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path} 1 ['a b']\n"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_signals_arrive_and_show_in_the_status(number: signal.Signals, status: int) -> None:
    code = "import time; print('here', flush=True); time.sleep(60)"
    process = subprocess.Popen(python("-c", code), stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="starts fresh processes here")
def test_a_killed_client_takes_its_program_along() -> None:
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = subprocess.Popen(python("-c", code), stdout=-1, text=True)
    assert process.stdout is not None
    program = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{program}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
