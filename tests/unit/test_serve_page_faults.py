"""The page at `/` in headless Chromium: answers that are stopped, faults, phones, and screen
readers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("selenium")

from tests.browsers import Page, browser, resize
from tests.servers import DOCUMENT, Server, engine, eventually, running

pytestmark = [pytest.mark.browser, pytest.mark.slow]

AXE = "STAR_ATTENTION_AXE"
"""Names the file axe.min.js of the npm package axe-core, for who has it."""
DROP = """(([text]) => {
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([text], "dropped.txt"));
  for (const name of ["dragover", "drop"]) {
    document.body.dispatchEvent(
      new DragEvent(name, {dataTransfer, bubbles: true, cancelable: true}));
  }
})(arguments)"""


@pytest.fixture(scope="module")
def chrome() -> Iterator[Page]:
    with browser() as chrome:
        yield Page(chrome)


@pytest.fixture
def server() -> Iterator[Server]:
    """A server whose answers are nonsense, and end at their limit alone."""
    with running(default_max_tokens=20_000) as server:
        yield server


@pytest.fixture
def page(chrome: Page, server: Server, tmp_path: Path) -> Page:
    """The page of a server without keys, on a wide screen, with a document."""
    resize(chrome.chrome, 1400, 900)
    chrome.open(server.url)
    path = tmp_path / "a.txt"
    path.write_text(DOCUMENT, encoding="utf-8")
    chrome.upload(path)
    return chrome


def send(page: Page, question: str) -> None:
    page.find("#question").send_keys(question)
    page.button("Ask").click()


def test_an_answer_that_is_stopped(page: Page, server: Server) -> None:
    """Forbids that the model goes on for nobody, or the page waits for ever."""
    send(page, "Who?")
    page.wait("document.querySelector('.answer')?.textContent.length > 20")
    assert not server.is_idle()
    page.button("Stop").click()
    page.wait_for(".wait", "Stopped.")
    assert eventually(server.is_idle)
    assert server.metric("request_aborted_total", phase="decode") == 1
    page.run("(document.getElementById('max-tokens').value = '4')")
    page.ask("Where?")
    assert len(page.answers()) == 2
    page.wait_for(".foot", "4 tokens")


def test_an_answer_that_goes_on_beside_another_document(page: Page, tmp_path: Path) -> None:
    """Forbids an answer in the wrong conversation, and one that ends when nobody looks."""
    send(page, "Who?")
    page.wait("document.querySelector('.answer')?.textContent.length > 20")
    other = tmp_path / "b.txt"
    other.write_text(f"Other.\n{DOCUMENT}", encoding="utf-8")
    page.upload(other)
    assert page.answers() == []
    page.button("Ask")
    page.button("a.txt").click()
    length = len(page.answers()[0])
    page.wait(
        "document.querySelector('.turns:not([hidden]) .answer').textContent.length > arguments[0]",
        length,
    )
    page.button("Stop").click()
    page.wait_for(".wait", "Stopped.")


def test_a_document_that_is_being_read(chrome: Page) -> None:
    """Forbids buttons that are others before a click has ended, and progress of uploads alone."""
    with running(engine()) as server:
        server.post("/v1/contexts", {"text": DOCUMENT * 60, "name": "long.txt"})
        chrome.open(server.url)
        chrome.wait("document.querySelector('#list progress')?.value > 0")
        chrome.run("(window.before = document.querySelector('[aria-label=\"Delete long.txt\"]'))")
        send(chrome, "Who?")
        chrome.wait_for(".wait", "Reading the document, ")
        share = chrome.run("document.querySelector('#list progress').value")
        chrome.wait("document.querySelector('#list progress').value > arguments[0]", share)
        assert chrome.run("document.contains(window.before)")
        chrome.button("Delete long.txt").click()
        chrome.button("Delete", "#delete-dialog").click()
        chrome.wait("document.querySelectorAll('#list li').length === 0")
        assert eventually(lambda: server.metric("encodes_total", outcome="canceled") == 1)


def test_many_documents_at_once(chrome: Page, tmp_path: Path) -> None:
    """Forbids that streams of progress take all connections that a browser has to a server."""
    with running(engine(), drain_timeout=0.0) as server:
        chrome.open(server.url)
        short, *others = [tmp_path / f"{number}.txt" for number in range(8)]
        short.write_text(DOCUMENT, encoding="utf-8")
        chrome.upload(short)
        for path in others:
            path.write_text(f"{path.name}\n{DOCUMENT * 30}", encoding="utf-8")
        chrome.find("#files").send_keys("\n".join(map(str, others)))
        chrome.wait("document.querySelectorAll('#list [aria-label=Reading]').length === 7")
        # Only the first of them was chosen, and nothing after the user has turned elsewhere.
        chrome.button("0.txt").click()
        chrome.ask("Who?")
        assert chrome.all("#list li.current .name")[0].text == "0.txt"
        assert len(chrome.all("#list progress")) == 7


def test_a_file_that_is_dropped(page: Page) -> None:
    page.run(DROP, DOCUMENT[:2000])
    page.wait_for("#list li.current .name", "dropped.txt")
    page.wait_for("#list li.current", "in memory")
    assert not page.find("#overlay").is_displayed()


def test_what_the_server_refuses(page: Page, server: Server, tmp_path: Path) -> None:
    """Forbids errors without words, or without a remedy."""
    page.run("(document.getElementById('max-tokens').value = '999999')")
    page.ask("Who?")
    page.wait_for(".error", "maximum context length is 65536 tokens")
    page.wait_for(".error", "Ask for a shorter answer in Options")
    assert "max_tokens" not in page.find(".error").text
    page.run("(document.getElementById('max-tokens').value = '4')")
    page.button("Ask again").click()
    page.wait_for(".foot", "4 tokens")
    assert page.all(".error") == []
    picture = tmp_path / "photo.txt"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    page.find("#files").send_keys(str(picture))
    page.wait_for("#list .error", "photo.txt")
    assert [each.text for each in page.all("#list .error button")] == ["Close"]
    page.button("Close photo.txt").click()
    id = server.get("/v1/contexts").json()["data"][0]["id"]
    httpx.delete(f"{server.url}/v1/contexts/{id}")
    page.ask("Who?")
    page.wait_for(".error", "The document is gone. Add it again.")
    # The list learns it at its next look; the conversation stays.
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait_for("#list li.current", "No longer on the server. Add it again.")
    assert len(page.answers()) == 2
    assert not page.find("#send").is_enabled()
    page.button("Delete a.txt").click()
    page.button("Delete", "#delete-dialog").click()
    page.wait_for("#no-documents", "No documents yet")
    assert page.answers() == []


def test_a_server_that_ends(chrome: Page, tmp_path: Path) -> None:
    """Forbids a page that says nothing when nobody answers."""
    with running() as server:
        chrome.open(server.url)
        path = tmp_path / "a.txt"
        path.write_text(DOCUMENT, encoding="utf-8")
        chrome.upload(path)
    chrome.ask("Who?")
    chrome.wait_for(".error", "The server does not answer. Check that it is running")
    chrome.find("#files").send_keys(str(path))
    chrome.wait_for("#list .error", "The upload was interrupted.")


@pytest.mark.parametrize("width", [320, 390, 900])
def test_narrow_screens(page: Page, width: int) -> None:
    """Forbids what is cut off, and parts that cannot be reached."""
    resize(page.chrome, width, 700)
    page.run("(document.getElementById('max-tokens').value = '4')")
    parts = {"Documents": "documents", "Questions": "talk", "Text": "text"}
    for name, id in parts.items():
        if name == "Documents" and width > 720:
            continue
        page.button(name, "nav").click()
        if name == "Questions":
            page.ask("Who?")
        assert page.find(f"#{id}").is_displayed()
        wide: list[str] = page.run(
            "[...document.querySelectorAll('*')].filter((each) => each.checkVisibility() &&"
            " each.getBoundingClientRect().right > innerWidth + 1).map((each) => each.outerHTML)"
        )
        assert wide == [], name
    page.button("Questions", "nav").click()
    page.find(".source").click()
    assert page.find("#text").is_displayed()
    page.button("Back to the answer").click()
    assert page.focused() == "source"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_axe_finds(page: Page, scheme: str) -> None:
    """Forbids controls without a name, and texts without contrast."""
    if AXE not in os.environ:
        pytest.skip(f"needs axe-core; {AXE} names its axe.min.js")
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    page.run("(document.getElementById('max-tokens').value = '4')")
    page.ask("Who?")
    page.button("Pin a.txt").click()
    page.chrome.execute_script(Path(os.environ[AXE]).read_text(encoding="utf-8"))
    check = "axe.run().then((found) => arguments[0](found.violations))"
    found: list[dict[str, Any]] = page.chrome.execute_async_script(check)
    for dialog in ("key", "paste", "delete", "request"):
        page.run(f"document.getElementById('{dialog}-dialog').showModal()")
        found += page.chrome.execute_async_script(check)
        page.run(f"document.getElementById('{dialog}-dialog').close()")
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
