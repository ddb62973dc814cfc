"""A browser for tests: Debian's or any other Chromium, driven by Playwright's pip package.

`ALORA_REQUIRE_BROWSER=1` (CI) makes its absence a failure instead of a skip. While Playwright runs, its thread counts
as inside an event loop and `asyncio.run` fails there: keep the browser no longer than one test module.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGS = [
    "--headless=new",
    "--no-sandbox",  # root in a container has no user namespaces
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",  # a container's /dev/shm may have 64 MB
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find() -> str | None:
    """Path of a Chromium on PATH."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def absent(reason: str) -> None:
    """Skips the test with the reason, or fails it where a browser is required."""
    if os.environ.get("ALORA_REQUIRE_BROWSER") == "1":
        pytest.fail(f"ALORA_REQUIRE_BROWSER=1, but there is {reason}")
    pytest.skip(reason)


@contextmanager
def launched() -> Iterator[Browser]:
    """A headless browser; skips (or fails) where there is none."""
    if importlib.util.find_spec("playwright") is None:
        absent("no playwright: pip install playwright")
    path = find()
    if path is None:
        absent("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=ARGS)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Seen:
    """What a page did."""

    errors: list[str] = field(default_factory=list)  # of its console, and exceptions nobody caught
    origins: set[str] = field(default_factory=set)  # of everything it asked for
    posts: list[Any] = field(default_factory=list)  # bodies it sent


def watched(page: Page) -> Seen:
    """Begins to record; call before the page goes anywhere."""
    seen = Seen()
    page.on("console", lambda said: seen.errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", lambda request: seen.origins.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url))))
    page.on("request", lambda request: seen.posts.append(request.post_data_json) if request.method == "POST" else None)
    return seen


def colours(png: bytes | Path) -> int:
    """Number of different colours of a screenshot: 1 is a blank one."""
    from PIL import Image

    with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as image:
        return len(image.convert("RGB").getcolors(2**24))
