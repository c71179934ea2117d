"""Help, version, the generated page, and options that are passed on."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from star_attention.cli import app, docs
from star_attention.cli.formatting import format_seconds
from star_attention.cli.streams import say
from star_attention.config import StarConfig
from star_attention.demo.settings import DemoSettings
from star_attention.planning.quality import QUALITIES
from tests.command_line import failed, ok, run
from tests.engines import BUNDLED


def test_demo_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo itself is tested in test_demo.py; it takes a minute."""
    calls = []

    def run_demo(settings: DemoSettings, out: str, *, progress: Any) -> str:
        calls.append((settings, out, progress))
        return "a table"

    for module, stand_in in (("run", {"run_demo": run_demo}), ("report", {"as_text": str})):
        name = f"star_attention.demo.{module}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**stand_in))
    assert (
        ok("demo", "-m", BUNDLED, "--out", tmp_path, "--tokens", "2k", "--seed", "3").out
        == "a table\n"
    )
    settings = DemoSettings(model=str(BUNDLED), tokens=2048, seed=3)
    assert calls == [(settings, str(tmp_path), say)]
    assert "tokens '2x' is not a number of tokens" in failed("demo", "--tokens", "2x")
    (tmp_path / "book.txt").write_text("a book")
    assert "book.txt is not a folder; give another one with --out" in failed(
        "demo", "-m", BUNDLED, "--out", tmp_path / "book.txt"
    )
    monkeypatch.chdir(tmp_path)
    assert "run this in a checkout of the repository" in failed("demo")


def test_the_version() -> None:
    from star_attention import __version__

    assert ok("--version").out == f"star-attention {__version__}\n"


def test_without_a_command_it_shows_help() -> None:
    done = run()
    assert done.status == 2
    assert "generate" in done.out + done.err


def test_help_lists_the_options_of_ranks_last() -> None:
    """Forbids that who runs one process reads past them to find `--query`."""
    text = ok("generate", "--help").out
    groups = ("Model", "Context", "Query", "Answer", "Output", "Ranks")
    places = [text.index(f"─ {group} ─") for group in groups]
    assert places == sorted(places)


def test_the_docs_page_is_fresh_and_does_not_depend_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert docs.main(["--check"]) == 0
    monkeypatch.setenv("COLUMNS", "31")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert docs.main(["--check"]) == 0
    for word in ("## star-attention ask", "`--top-k N`", "Default: 256.", "`tokens_per_s`"):
        assert word in docs.page()
    assert "Default: ." not in docs.page()
    for name in ("--top-k N", "--temperature X", "--block-size SIZE", "--reserve-tokens SIZE"):
        rows = [line for line in docs.page().splitlines() if line.startswith(f"| `{name}`")]
        assert len(rows) <= 2, "shared options are listed once, and where they differ"
    monkeypatch.chdir(tmp_path)
    assert docs.main(["--check"]) == 1
    stale = capsys.readouterr().err
    for name in ("cli.md", "api.md"):
        assert f"docs/{name} is stale; run: python -m star_attention.cli.docs" in stale
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    assert docs.main(["--bogus"]) == 2


@pytest.mark.parametrize("field", dataclasses.fields(StarConfig), ids=lambda field: field.name)
def test_every_setting_is_an_option_with_its_help(field: dataclasses.Field[Any]) -> None:
    """A new setting is one field of `StarConfig`."""
    command: Any = typer.main.get_command(app).commands["generate"]  # type: ignore[attr-defined]
    (option,) = (option for option in command.params if option.name == field.name)
    assert option.opts == ["--" + field.name.replace("_", "-")]
    assert option.help == field.metadata["help"]
    assert option.rich_help_panel == field.metadata["panel"]
    # A preset gives way to fields that are given, so that their options have no default.
    is_by_rule = field.default is None or field.name in QUALITIES["paper"]
    default = field.default if isinstance(field.default, bool) else str(field.default)
    assert option.default == (None if is_by_rule else default)


@pytest.mark.parametrize(
    ("value", "text"), [(12.34, "12.3 s"), (0.4, "0.4 s"), (0.034, "0.03 s"), (1234.5, "1,234.5 s")]
)
def test_format_seconds(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_the_listings_say_what_the_commands_say() -> None:
    """Groups list commands without importing them. Forbids a listing that is out of date."""
    root: Any = typer.main.get_command(app)
    for group in (root, root.commands["bench"], root.commands["eval"]):
        for name, listed in group.commands.for_listing().items():
            command = group.commands[name]
            assert listed.name == command.name == name
            summary = inspect.cleandoc(command.help).split("\n\n")[0]
            assert " ".join(summary.split()) == listed.help
