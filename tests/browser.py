"""A real browser, for tests of the site: headless Chromium with an empty profile, through its own driver."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,900"
)


class Browser:
    """One window."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Load it, as if typed, and wait until the page is drawn."""
        self.driver.get("about:blank")  # else a new #... alone would load nothing
        self.driver.get(address)
        self.until("return document.documentElement.dataset.drawn")

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script of the page returns."""
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: Any) -> Any:
        """The first value of `script` that is true; TimeoutException after 10 s."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 10, poll_frequency=0.02).until(lambda _: self.run(script, *arguments))

    def text(self, selector: str) -> str:
        """The text of the first element there."""
        return str(self.until("return document.querySelector(arguments[0])?.textContent", selector))

    def texts(self, selector: str) -> list[str]:
        """The texts of all of them."""
        script = "return [...document.querySelectorAll(arguments[0])].map(node => node.textContent)"
        return [str(text) for text in self.run(script, selector)]

    def click(self, selector: str) -> None:
        """A real click at the middle of the first element."""
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.by import By

        node = self.driver.find_element(By.CSS_SELECTOR, selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", node)
        ActionChains(self.driver).move_to_element(node).click().perform()

    def press(self, *keys: str) -> None:
        """Keys, one after another, to whatever has the focus."""
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def size(self, width: int, height: int = 900) -> None:
        """Of the page, in CSS pixels: windows of less than 500 cannot be had otherwise."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, theme: str) -> None:
        """What the system prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": theme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def complaints(self) -> list[str]:
        """What the console has had to say since the last call."""
        return [str(entry["message"]) for entry in self.driver.get_log("browser")]


def missing() -> str | None:
    """Why there can be no browser; None if there can."""
    for programs in (CHROMES, ("chromedriver",)):
        if not any(map(shutil.which, programs)):
            return f"no {' or '.join(programs)} on the PATH"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed"
    return None


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A new one. Downloads nothing: browser and driver are the system's."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    profile = tempfile.mkdtemp(prefix="saezoo-browser-")
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, CHROMES)))
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
        shutil.rmtree(profile, ignore_errors=True)


needs_browser: Callable[..., Any] = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def address(site: Path, route: str = "#/") -> str:
    """Of a page of a site on this disk."""
    return f"{(site / 'index.html').resolve().as_uri()}{route}"
