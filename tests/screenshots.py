"""The pictures of README: the first screen of a page, in headless Chromium.

`python -m tests.screenshots reports/home@1.html docs/report.png`, in SLMOPS_HOME
"""

import sys
import tempfile
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

from tests.e2e.test_report_in_ui import CHROMIUM, DRIVER

WIDTH, HEIGHT = 1000, 900
LARGEST = 150_000  # bytes
COMPLETE = "return document.readyState === 'complete' && [...document.images].every(image => image.complete)"


def take(page: str, picture: Path, *, height: int = HEIGHT) -> None:
    """Save the first `height` pixels of a page (a file or an address) as a PNG; raises `SystemExit` if it is large."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "hide-scrollbars", f"user-data-dir={profile}"):
            options.add_argument(f"--{argument}")
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(page if "://" in page else Path(page).resolve().as_uri())
            WebDriverWait(driver, 60).until(lambda _: driver.execute_script(COMPLETE))
            driver.save_screenshot(str(picture))
        finally:
            driver.quit()
    if picture.stat().st_size > LARGEST:
        raise SystemExit(f"{picture} has {picture.stat().st_size} bytes, more than {LARGEST}.")


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
