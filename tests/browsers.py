"""A headless browser for tests, and the server's page in it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from tests.servers import eventually

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
_WAIT_S = 30


@contextlib.contextmanager
def browser(width: int = 1400, height: int = 900) -> Iterator[webdriver.Chrome]:
    """Run Chromium with an empty profile while the block runs; skip a test where there is none."""
    program = next(filter(None, map(shutil.which, _NAMES)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in _OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        resize(chrome, width, height)
        yield chrome
    finally:
        chrome.quit()


def resize(chrome: webdriver.Chrome, width: int, height: int) -> None:
    """Set the size of the page itself, which may be that of a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@dataclass(frozen=True)
class Page:
    """The server's page in a browser.

    Attributes:
        chrome: the browser.
    """

    chrome: webdriver.Chrome

    def open(self, url: str) -> None:
        """Open the page as in a new tab."""
        self.chrome.get(f"{url}/")
        self.wait(
            "document.getElementById('model').textContent || document.querySelector('[open]')"
        )

    def run(self, script: str, *values: Any) -> Any:
        """Return the value of an expression in the page."""
        return self.chrome.execute_script(f"return {script}", *values)

    def wait(self, script: str, *values: Any) -> None:
        """Wait until an expression is true."""
        assert eventually(lambda: bool(self.run(script, *values)), _WAIT_S), script

    def find(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Return the texts of all elements, in sight or not."""
        found = "[...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
        texts: list[str] = self.run(found, selector)
        return texts

    def wait_for(self, selector: str, text: str) -> None:
        """Wait until an element in sight has a text in it."""
        seen = (
            "[...document.querySelectorAll(arguments[0])].some("
            "(each) => each.checkVisibility() && each.textContent.includes(arguments[1]))"
        )
        self.wait(seen, selector, text)

    def button(self, text: str, within: str = "body") -> WebElement:
        """Return the button in sight that is named by a text."""
        for each in self.all(f"{within} button"):
            if each.is_displayed() and text in (each.text, each.accessible_name):
                return each
        raise AssertionError(f"there is no button {text}")

    def upload(self, path: Path) -> None:
        """Choose a file, and wait until it has been read."""
        self.find("#files").send_keys(str(path))
        self.wait_for("#list li.current .name", path.name)
        self.wait_for("#list li.current", "in memory")

    def ask(self, question: str) -> None:
        """Ask, and wait until the answer has ended."""
        before = len(self.all(".foot, .error"))
        self.find("#question").send_keys(question)
        self.button("Ask").click()
        self.wait("document.querySelectorAll('.foot, .error').length > arguments[0]", before)

    def answers(self) -> list[str]:
        """Return the answers of the conversation in sight."""
        return self.texts(".turns:not([hidden]) .answer")

    def focused(self) -> str:
        """Return the id, the class or the tag of what has the focus."""
        name: str = self.run(
            "(({id, className, tagName}) => id || className || tagName)(document.activeElement)"
        )
        return name

    def complaints(self) -> list[str]:
        """Return what the browser has complained of since the last call."""
        return [entry["message"] for entry in self.chrome.get_log("browser")]
