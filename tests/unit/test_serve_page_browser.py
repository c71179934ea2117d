"""The page at `/` in headless Chromium, over a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium")

from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys as Press

from star_attention import StarLLM
from star_attention.serve.keys import Keys
from tests.browsers import Page, browser, resize
from tests.command_line import NEEDLE, NOISE, OTHER, OTHER_QUESTION, QUESTION
from tests.engines import bundled_model, bundled_tokenizer
from tests.servers import ANSWER, DOCUMENT, Server, running

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ODD = f"Café 🦭 naïve — 海へ行く。\n{DOCUMENT}"
LONG = NOISE * 90 + NEEDLE + NOISE * 60
HOSTILE = (
    f"<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>\n{ODD}"
)
WATCH = """(window.seen = [], new MutationObserver(() => {
  const bar = document.querySelector("#list progress");
  if (bar && bar.value) window.seen.push(bar.value);
  const answer = document.querySelector(".answer");
  if (answer) window.seen.push(answer.textContent.length);
}).observe(document.body, {childList: true, subtree: true, attributes: true}))"""
"""Notes what the page shows of progress, and of an answer that grows."""
IN_SIGHT = """((inner, outer) => inner.top > outer.top && inner.bottom < outer.bottom)(
  ...[...arguments].map((each) => document.querySelector(each).getBoundingClientRect()))"""
PROGRAMS = ("curl", "python")
MARKDOWN = """const [text, done] = arguments;
import("/page/markdown.js").then(({rendered}) => {
  const box = document.createElement("div");
  box.append(...rendered(text));
  done(box.innerHTML);
});"""
SHOW = """const [text, sources, done] = arguments;
import("/page/reader.js").then(async ({Reader}) => {
  const reader = new Reader();
  reader.texts.set("id", text);
  await reader.show({id: "id"}, sources);
  const marksOf = (_, index) => [...document.querySelectorAll(`mark[data-source="${index}"]`)];
  const textOf = (marks) => marks.map((mark) => mark.textContent).join("");
  const sizes = [...document.querySelectorAll(".chunk")].map((each) => each.textContent.length);
  done([document.getElementById("reader").textContent, sources.map(marksOf).map(textOf), sizes]);
});"""
SLOW_TEXTS = """((fetch) => {
  const waits = new Promise((resolve) => (window.goOn = resolve));
  window.fetch = async (url, options) => {
    const response = await fetch(url, options);
    if (url.endsWith("/text")) await waits;
    return response;
  };
})(window.fetch)"""
"""Holds texts of documents back until `goOn` is called."""
ANSWER_LINES = (
    "## Clocks",
    "The **first** of `a * b`,",
    "<b>not bold</b>",
    "- one",
    "  2) 2 * 3 * 4",
    "```python",
    "# code **as it is**",
    "",
    "- x",
    "```",
    "[a link](javascript:alert(1))",
    "~~~",
    "not ended",
)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Page]:
    with browser() as chrome:
        yield Page(chrome)


@pytest.fixture
def server() -> Iterator[Server]:
    star = StarLLM(bundled_model(), bundled_tokenizer(), block_size=512, tokens_per_forward=512)
    with running(star) as server:
        yield server


@pytest.fixture
def page(chrome: Page, server: Server) -> Page:
    """The page of a server without keys, on a wide screen."""
    resize(chrome.chrome, 1400, 900)
    chrome.complaints()
    chrome.open(server.url)
    return chrome


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_from_a_document_to_an_answer_and_its_sources(page: Page, tmp_path: Path) -> None:
    assert page.find("#send").get_attribute("disabled")
    page.run(WATCH)
    page.upload(written(tmp_path, "long.txt", f"🦭 Café\n{LONG}"))
    shares = {value for value in page.run("window.seen") if value < 1}
    assert len(shares) > 2, "the progress was not shown"
    page.run("window.seen.length = 0")
    page.ask(QUESTION)
    assert ANSWER in page.answers()[0]
    assert len(set(page.run("window.seen"))) > 3, "the answer did not stream"
    first = page.texts(".source .passage")[0]
    assert first == NEEDLE.strip()
    # The server counts characters, the browser halves of some: the mark must have the same text.
    assert page.texts("mark[data-source='0']") == [first]
    assert page.run(IN_SIGHT, "mark[data-source='0']", "#reader")
    place = LONG.index(NEEDLE) / len(LONG)
    ticks = page.run("[...document.querySelectorAll('.tick')].map((tick) => tick.style.left)")
    assert min(abs(float(tick.rstrip("%")) / 100 - place) for tick in ticks) < 0.01
    assert page.complaints() == []


def test_a_conversation_goes_on(page: Page, tmp_path: Path) -> None:
    """Forbids that a second question forgets the first, and a program that asks otherwise."""
    page.upload(written(tmp_path, "a.txt", ODD))
    page.ask(QUESTION)
    page.ask(OTHER_QUESTION)
    assert len(page.answers()) == 2
    page.button("Copy as curl or Python", ".turn:last-child").click()
    curl, python = (page.run(f"document.getElementById('{name}').value") for name in PROGRAMS)
    body = json.loads(re.search(r"-d '(.*)'$", curl, re.DOTALL)[1])  # type: ignore[index]
    assert [message["content"] for message in body["messages"]] == [
        QUESTION,
        page.answers()[0],
        OTHER_QUESTION,
    ]
    by_curl = json.loads(subprocess.check_output(["bash", "-c", curl], stderr=subprocess.DEVNULL))
    assert by_curl["choices"][0]["message"]["content"] == page.answers()[1]
    assert len(by_curl["star"]["sources"]) == 3
    by_python = subprocess.check_output([sys.executable, "-c", python], text=True)
    assert by_python.startswith(f"{page.answers()[1]}\n0.")
    page.button("Close", "#request-dialog").click()
    page.button("New conversation").click()
    assert page.answers() == []
    assert page.all("mark") == []


def test_two_documents(page: Page, server: Server, tmp_path: Path) -> None:
    """Forbids answers, sources and texts of one document beside another one."""
    page.upload(written(tmp_path, "a.txt", NOISE * 12 + NEEDLE + NOISE * 8))
    page.ask(QUESTION)
    page.upload(written(tmp_path, "b.txt", NOISE * 12 + OTHER + NOISE * 8))
    assert page.answers() == []
    assert page.all("mark") == []
    page.wait("document.getElementById('reader').textContent.includes(arguments[0])", OTHER)
    page.ask(OTHER_QUESTION)
    assert page.texts("mark[data-source='0']") == [OTHER.strip()]
    page.button("a.txt").click()
    assert ANSWER in page.answers()[0]
    page.wait(
        "document.querySelector(\"mark[data-source='0']\")?.textContent === arguments[0]",
        NEEDLE.strip(),
    )
    page.button("Pin a.txt").click()
    page.wait("document.querySelector('[aria-pressed=true][aria-label=\"Pin a.txt\"]') !== null")
    contexts = {each["name"]: each for each in server.get("/v1/contexts").json()["data"]}
    assert (contexts["a.txt"]["pinned"], contexts["b.txt"]["pinned"]) == (True, False)
    page.button("Delete a.txt").click()
    page.button("Keep it").click()
    assert len(page.all("#list li")) == 2
    page.button("Delete a.txt").click()
    page.button("Delete", "#delete-dialog").click()
    page.wait("document.querySelectorAll('#list li').length === 1")
    assert [each["name"] for each in server.get("/v1/contexts").json()["data"]] == ["b.txt"]
    page.wait_for(".answer", "8081780")


def test_documents_of_earlier_and_of_others(page: Page, server: Server) -> None:
    """Forbids that a page knows only what it has uploaded itself."""
    body = {"text": ODD, "name": "of a program"}
    assert server.post("/v1/contexts?wait=true", body).status_code == 201
    page.open(server.url)
    page.wait_for("#list li.current", "of a program")
    page.wait_for("#reader", "海へ行く")
    page.ask(QUESTION)
    assert page.texts("mark[data-source='0']") == [NEEDLE.strip()]


def test_sources_that_come_before_the_text(page: Page, tmp_path: Path) -> None:
    """Forbids that marks are lost, or a place is not found, while a long text is on its way."""
    page.run(SLOW_TEXTS)
    page.upload(written(tmp_path, "a.txt", ODD))
    page.ask(QUESTION)
    page.wait_for("#text-note", "Loading the text")
    page.find(".source").click()
    page.run("window.goOn()")
    page.wait("document.activeElement.tagName === 'MARK'")
    assert page.texts("mark[data-source='0']") == [NEEDLE.strip()]
    assert len(page.all(".tick")) == 3


def test_a_hostile_document(page: Page, tmp_path: Path) -> None:
    """Forbids that a text or a name becomes part of the page."""
    page.upload(written(tmp_path, "<img src=x onerror=alert(1)>.txt", HOSTILE))
    page.ask(f"<b>{QUESTION}</b>")
    page.wait("document.getElementById('reader').textContent.startsWith(arguments[0])", HOSTILE)
    assert page.all("main img, main script, main b") == []
    assert page.chrome.title == "Ask long documents"
    assert page.complaints() == []


@pytest.mark.parametrize("unit", ["word🦭 ", "🦭", "line\n", "\r\n", "ab\tc"])
def test_long_texts_are_shown_as_they_are(page: Page, unit: str) -> None:
    """Forbids texts and marks that change where the page cuts a text into parts."""
    text = "\ufeff" + unit * (60_000 // len(unit))
    spans = [(0, 3), (14_990, 17_010), (len(text) // 2, len(text) // 2 + 5), (59_000, 59_004)]
    sources = [{"start": start, "end": end, "weight": 0.2} for start, end in spans]
    shown, marks, sizes = page.chrome.execute_async_script(SHOW, text, sources)
    assert shown == text
    assert marks == [text[start:end] for start, end in spans]
    assert max(sizes) <= 2 * 2 * 8000


def test_answers_in_markdown(page: Page) -> None:
    """Forbids that an answer becomes more than texts, or loses some of them."""
    html = page.chrome.execute_async_script(MARKDOWN, "\n".join(ANSWER_LINES))
    assert html == (
        '<p class="heading">Clocks</p>'
        "<p>The <strong>first</strong> of <code>a * b</code>,\n&lt;b&gt;not bold&lt;/b&gt;</p>"
        '<div class="item level-0"><span class="mark">•</span><div>one</div></div>'
        '<div class="item level-1"><span class="mark">2)</span><div>2 * 3 * 4</div></div>'
        '<pre tabindex="0"><code># code **as it is**\n\n- x</code></pre>'
        "<p>[a link](javascript:alert(1))</p>"
        '<pre tabindex="0"><code>not ended</code></pre>'
    )


def test_pasted_text_and_the_keyboard_alone(page: Page) -> None:
    """Forbids controls that cannot be reached, or lose the focus, without a mouse."""
    keys = ActionChains(page.chrome)
    page.run("document.getElementById('choose').focus()")
    keys.send_keys(Press.TAB).send_keys(Press.ENTER).perform()
    assert page.focused() == "paste-text"
    keys.send_keys("The secret number for torpidity-kill is 4910508. It rains.").perform()
    keys.send_keys(Press.TAB, Press.TAB, Press.ENTER).perform()
    page.wait_for("#list li.current", "in memory")
    page.run("document.getElementById('question').focus()")
    keys.send_keys(QUESTION, Press.ENTER).perform()
    page.wait_for(".foot", "Copy answer")
    assert page.focused() == "question"
    for _ in range(20):
        if page.focused() == "source":
            break
        keys.key_down(Press.SHIFT).send_keys(Press.TAB).key_up(Press.SHIFT).perform()
    assert page.focused() == "source"
    keys.send_keys(Press.ENTER).perform()
    page.wait("document.activeElement.tagName === 'MARK'")
    keys.send_keys(Press.ESCAPE).perform()
    assert page.focused() == "source"
    page.wait_for("#status", "Answer: The secret number")


def test_keys(chrome: Page, tmp_path: Path) -> None:
    """Forbids a page that is stuck with a wrong key, or keeps one for longer than its tab."""
    keys = Keys.of({"key-of-ann": "ann", "key-of-bob": "bob"})
    with running(keys=keys) as server:
        ann = {"authorization": "Bearer key-of-ann"}
        server.post("/v1/contexts?wait=true", {"text": ODD, "name": "of ann"}, headers=ann)
        chrome.open(server.url)
        for key, message in (("wrong", "does not know this key"), ("key-of-bob", "")):
            chrome.wait("document.getElementById('key-dialog').open")
            chrome.find("#key").send_keys(key + Press.ENTER)
            if message:
                chrome.wait_for("#key-error", message)
        chrome.wait_for("#model", "needle-17m")
        chrome.wait_for("#no-documents", "No documents yet")
        assert chrome.run("Object.values(sessionStorage)") == ["key-of-bob"]
        assert chrome.run("[localStorage.length, document.cookie, location.search]") == [0, "", ""]
        chrome.upload(written(tmp_path, "b.txt", ODD))
        chrome.ask(QUESTION)
        chrome.button("Copy as curl or Python").click()
        for name in PROGRAMS:
            assert "key-of-bob" not in chrome.run(f"document.getElementById('{name}').value")
        chrome.run("sessionStorage.clear()")
