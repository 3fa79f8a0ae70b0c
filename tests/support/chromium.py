"""Headless Chromium for tests and pictures; `browser` of tests/e2e/conftest.py opens its pages."""

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
DRIVER = shutil.which("chromedriver") or ""
HEIGHT = 900
Browser = Callable[[int, str], webdriver.Chrome]


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium, and open empty pages of a width in the light or the dark scheme in it, each in place of the last.

    It stays for all of them: a start costs more than most pages, and the next page of Prefect's UI finds its programs
    in the cache. A page's requests are in the performance log, without those of the pages before.
    """
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    quiet = ("disable-background-networking", "disable-component-update", "no-first-run", "disable-sync")
    # Containers have no sandbox of Chromium's kind, and little shared memory.
    usual = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars")
    for argument in (*quiet, *usual, f"user-data-dir={profile}"):
        options.add_argument(f"--{argument}")
    with webdriver.Chrome(options=options, service=Service(DRIVER)) as driver:
        yield functools.partial(_open_page, driver)


def _open_page(driver: webdriver.Chrome, width: int, scheme: str = "light") -> webdriver.Chrome:
    former = driver.current_window_handle
    driver.switch_to.new_window("tab")
    opened = driver.current_window_handle
    driver.switch_to.window(former)
    driver.close()
    driver.switch_to.window(opened)
    size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    preferred = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": preferred})
    for log in ("performance", "browser"):
        driver.get_log(log)  # which empties it
    return driver


def screenshot(driver: webdriver.Chrome, path: Path) -> None:
    """Save the whole page; a page that scrolls inside itself is given a window as tall as its content."""
    width = driver.execute_script("return innerWidth")
    tall = driver.execute_script(
        "return Math.max(...[document.documentElement, ...document.querySelectorAll('*')].map(one => one.scrollHeight))"
    )
    size = {"width": width, "height": min(tall, 16_000), "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.save_screenshot(str(path))
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**size, "height": HEIGHT})
