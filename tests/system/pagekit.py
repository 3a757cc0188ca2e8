"""What the tests of the status page share: a browser that is driven.

`Browser` is Debian's Chromium, headless, driven by selenium through its chromedriver. Screenshots are kept in the
directory that FLUXRES_SCREENSHOTS names, build/screenshots of the checkout by default.
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar, cast

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from fluxres.base.json import JsonObject

T = TypeVar("T")

PATIENCE: Final = 60.0
"""Seconds that a test waits for what has to come; reached only when something is wrong."""
ROOT: Final = Path(__file__).parents[2]
SCREENSHOTS: Final = Path(os.environ.get("FLUXRES_SCREENSHOTS") or ROOT / "build" / "screenshots")
DESKTOP: Final = (1360, 900)
PHONE: Final = (360, 740)
_NOISE: Final = ("net::ERR_", "WebSocket connection to", "503 (")
"""What Chromium itself says in the console about a server that is away."""


class Browser:
    """A headless Chromium of `size` pixels that tells pages that the system is dark, or light. A context manager."""

    def __init__(self, *, size: tuple[int, int] = DESKTOP, dark: bool = False) -> None:
        chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium is None or chromedriver is None:
            pytest.skip("no browser to drive: chromium or chromedriver is missing (Debian: chromium, chromium-driver)")
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--mute-audio"):
            options.add_argument(argument)
        options.add_argument("--force-color-profile=srgb")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=chromedriver)
        self.driver = webdriver.Chrome(options=options, service=service)
        self._errors: list[str] = []
        self.resize(size)
        self.prefer(dark=dark)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()

    def resize(self, size: tuple[int, int]) -> None:
        """Have a viewport of exactly this size."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, *, dark: bool) -> None:
        """Tell pages that the system is dark, or light."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def open(self, url: str) -> None:
        """Go to a page."""
        self.driver.get(url)

    def wait(self, check: Callable[[], T | None], what: str, timeout: float = PATIENCE) -> T:
        """Wait until `check` returns something true, and return that."""
        try:
            found = WebDriverWait(self.driver, timeout, poll_frequency=0.05).until(lambda _: check())
        except Exception as error:
            self.screenshot("failure")
            raise AssertionError(f"{what} never came about; the page says:\n{self.text()[:4000]}") from error
        assert found is not None
        return found

    def wait_for(self, selector: str, text: str = "", *, timeout: float = PATIENCE) -> WebElement:
        """Wait for an element of a CSS selector that has `text` in its own."""

        def check() -> WebElement | None:
            # One script, since what is found may be drawn anew before it is asked.
            script = (
                "return [...document.querySelectorAll(arguments[0])]"
                ".find((e) => (e.textContent ?? '').includes(arguments[1]));"
            )
            return cast("WebElement | None", self.js(script, selector, text))

        return self.wait(check, f"{selector} with {text!r}", timeout)

    def wait_gone(self, selector: str) -> None:
        """Wait until no element of a selector is left."""
        self.wait(lambda: not self.driver.find_elements(By.CSS_SELECTOR, selector), f"the end of {selector}")

    def count(self, selector: str) -> int:
        """How many elements there are of a selector."""
        return cast("int", self.js("return document.querySelectorAll(arguments[0]).length;", selector))

    def text(self, selector: str = "body") -> str:
        """The text of the first element of a selector, "" where there is none."""
        script = "return document.querySelector(arguments[0])?.innerText ?? '';"
        return cast("str", self.js(script, selector))

    def js(self, script: str, *arguments: object) -> object:
        """What a script returns."""
        return cast("object", self.driver.execute_script(script, *arguments))

    def press(self, selector: str, text: str = "") -> None:
        """Click the first element of a selector that has `text` in its own."""
        self.wait_for(selector, text)
        script = "[...document.querySelectorAll(arguments[0])].find(e => e.textContent.includes(arguments[1])).click();"
        self.js(script, selector, text)

    def keys(self, *keys: str) -> None:
        """Type on whatever has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def overflow(self) -> int:
        """How many pixels the page is wider than its viewport."""
        script = "return document.documentElement.scrollWidth - document.documentElement.clientWidth;"
        return cast("int", self.js(script))

    def screenshot(self, name: str, *, whole: bool = False) -> Path:
        """Keep what is seen, or the whole page, as NAME.png."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot",
            {"format": "png", "captureBeyondViewport": whole, **(self._clip() if whole else {})},
        )
        path.write_bytes(base64.b64decode(shot["data"]))
        return path

    def _clip(self) -> dict[str, JsonObject]:
        script = "const e = document.documentElement; return [e.clientWidth, e.scrollHeight];"
        width, height = cast("tuple[int, int]", self.js(script))
        return {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}

    def errors(self) -> list[str]:
        """What the console has so far that is no word about a server that is away."""
        entries = cast("list[dict[str, str]]", self.driver.execute("getLog", {"type": "browser"})["value"])
        for entry in entries:
            if entry["level"] in ("SEVERE", "WARNING") and not any(noise in entry["message"] for noise in _NOISE):
                self._errors.append(entry["message"])
        return self._errors

    def forgive(self, text: str) -> None:
        """Forget the errors so far that say this."""
        self._errors = [error for error in self.errors() if text not in error]
