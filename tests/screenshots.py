"""The pictures of README: the first screen of a page, in headless Chromium.

`python -m tests.screenshots reports/home@1.html docs/report.png`, in SLMOPS_HOME
`python -m tests.screenshots http://127.0.0.1:4200/runs/flow-run/ID docs/run.png Completed`, with no password
"""

import sys
import tempfile
from pathlib import Path

from selenium.webdriver.support.wait import WebDriverWait

from tests.support.chromium import chromium

WIDTH, HEIGHT = 1000, 900
LARGEST = 150_000  # bytes
COMPLETE = "return document.readyState === 'complete' && [...document.images].every(image => image.complete)"


def take(page: str, picture: Path, text: str = "", *, height: int = HEIGHT) -> None:
    """Save the first `height` pixels of a page (a file or an address) that shows a text as a PNG.

    Raises `SystemExit` if it is large.
    """
    with tempfile.TemporaryDirectory() as profiles, chromium(Path(profiles)) as open_browser:
        driver = open_browser(WIDTH, "light")
        size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(page if "://" in page else Path(page).resolve().as_uri())
        WebDriverWait(driver, 60).until(lambda _: driver.execute_script(COMPLETE))
        WebDriverWait(driver, 60).until(lambda _: text in driver.execute_script("return document.body.innerText"))
        driver.save_screenshot(str(picture))
    if picture.stat().st_size > LARGEST:
        raise SystemExit(f"{picture} has {picture.stat().st_size} bytes, more than {LARGEST}.")


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
