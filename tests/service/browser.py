"""A headless Chromium for tests of pages, and a tab that keeps account of what a page did."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, sync_playwright

VARIABLE = "TIP_RAY_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Alone with the page: no look-ups at Google's hosts, and root may start it.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator[Browser]:
    """While it runs, this thread has an event loop: start none beside it."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(playwright), args=ARGUMENTS
        )
        try:
            yield browser
        finally:
            browser.close()


def find_chromium(playwright: Playwright) -> str:
    """The one that TIP_RAY_CHROMIUM names, one on PATH, or Playwright's own."""
    own = playwright.chromium.executable_path
    found = [os.environ.get(VARIABLE), *map(shutil.which, NAMES), own]
    for path in found:
        if path and Path(path).exists():
            return path
    pytest.fail(
        f"no Chromium: set {VARIABLE}, or `apt-get install chromium`, or `playwright install "
        f"chromium`"
    )


class Tab:
    """A page at `base`; everything that it asked for, said or threw is kept."""

    def __init__(self, browser: Browser, base: str, **context: Any) -> None:
        self.base = base
        self.context = browser.new_context(**context)
        self.page: Page = self.context.new_page()
        self.asked: list[str] = []
        self.said: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def _note(self, message: ConsoleMessage) -> None:
        """A refused answer is the page's to show: the browser's own line about it says no more."""
        if not message.text.startswith("Failed to load resource"):
            self.said.append(message.text)

    def keep_token(self, key: str, token: str) -> None:
        """As if it had been typed in this tab before."""
        self.page.add_init_script(f"sessionStorage.setItem({key!r}, {token!r})")

    def open(self, route: str) -> Page:
        """The view of `route`, such as `runs/a-run`."""
        self.page.goto(f"{self.base}/#/{route}")
        return self.page

    def text(self, selector: str) -> str:
        """As it is shown, of the first that matches, once that is there."""
        return self.page.locator(selector).first.inner_text()

    def overflow(self) -> int:
        """Pixels that the page is wider than its window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def foreign(self) -> list[str]:
        """What was asked for elsewhere."""
        return [url for url in self.asked if urlsplit(url).netloc != urlsplit(self.base).netloc]

    def close(self) -> None:
        self.context.close()
