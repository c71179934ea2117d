"""The page at `/`: its files, what they may load, and who gets them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from star_attention.serve.http.page import PATHS
from star_attention.serve.keys import Keys
from tests.servers import Server, running

FOLDER = Path(__file__).parents[2] / "src" / "star_attention" / "serve" / "page"
FILES = sorted(FOLDER.iterdir())
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg"}
SCRIPTS = [path for path in FILES if path.suffix == ".js"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(keys=Keys.of({"key-of-ann": "ann"})) as server:
        yield server


def paths_of(text: str) -> set[str]:
    """Return what a file of the page loads."""
    wanted = r"(?:src|href)=\"([^\"#][^\"]*)\"|from \"([^\"]+)\"|@import (\S+)"
    return {next(filter(None, match.groups())) for match in re.finditer(wanted, text)}


def test_every_file_is_served_without_a_key(server: Server) -> None:
    """Forbids a file that is forgotten in the list, and a page that cannot ask for the key."""
    assert {f"/page/{path.name}" for path in FILES} - PATHS == {"/page/index.html"}
    for path in PATHS:
        response = server.get(path)
        assert response.status_code == 200, path
        name = path.rpartition("/")[2] or "index.html"
        assert response.content == (FOLDER / name).read_bytes()
        assert response.headers["content-type"].startswith(KINDS[Path(name).suffix])
    assert server.get("/v1/contexts").status_code == 401
    assert server.get("/page/").status_code == 401


def test_the_page_may_load_nothing_from_elsewhere(server: Server) -> None:
    for path in PATHS:
        headers = server.get(path).headers
        policy = headers["content-security-policy"]
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules.pop("default-src") == "'none'"
        assert rules.pop("require-trusted-types-for") == "'script'"
        assert set(rules.values()) == {"'self'", "'none'"}
        assert rules["script-src"] == "'self'"
        assert rules["frame-ancestors"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
    loaded = set().union(*(paths_of(path.read_text(encoding="utf-8")) for path in FILES))
    assert {f"/page/{path.rpartition('/')[2]}" for path in loaded} == PATHS - {"/"}
    assert [path for path in loaded if not re.fullmatch(r"(?:page|\.)/[a-z]+\.\w+", path)] == []


def test_documents_cannot_become_elements() -> None:
    """Forbids ways by which a text could be read as HTML or run as a script."""
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<script(?! type=\"module\" src=)|<style|\son\w+=|\sstyle=", html) == []
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser"
    for path in SCRIPTS:
        assert re.findall(ways, path.read_text(encoding="utf-8")) == [], path.name


def test_files_can_be_read_in_one_go() -> None:
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400, path.name
        assert max(map(len, lines)) <= 100, path.name
