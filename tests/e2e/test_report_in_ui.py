"""The report as a person sees it: in Prefect's own UI and as a file, in headless Chromium.

The screenshots stay in the tests' temporary folder.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from slmops.infra.settings import Settings
from slmops.infra.storage.manifest import Manifest, Source
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.exams.statements import Statement
from slmops.tasks.report.publish import publish_report
from slmops.tasks.report.records import DeployReport
from tests.support.chromium import Browser, screenshot
from tests.support.prefect_api import query
from tests.support.reports import full_report, full_variant
from tests.support.versions import stored_variant
from tests.tasks.report.test_report import HOSTILE, hostile_report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

WIDTHS = (1280, 390)

# Elements that lie beyond the window's right edge or their own frame, and blocks that lie on one another.
CUT = """
const root = document.querySelector(arguments[0]);
root.querySelectorAll("details").forEach(one => one.open = true);
const faults = [];
const told = (fault, one) => faults.push(`${fault}: ${one.tagName} ${(one.innerText || one.alt || "").slice(0, 60)}`);
const scrolls = one => one && (["auto", "scroll"].includes(getComputedStyle(one).overflowX) || scrolls(
    one.parentElement === root ? null : one.parentElement));
for (const one of root.querySelectorAll("h1, h2, h3, h4, p, li, table, th, td, img, svg, pre, summary, dd, code")) {
    const box = one.getBoundingClientRect();
    if (!box.width || scrolls(one.closest("pre"))) continue;
    if (box.left < -1 || box.right > innerWidth + 1) told("beyond the window", one);
    if (box.right > root.getBoundingClientRect().right + 1) told("beyond the page's column", one);
    if (one.matches("td, th") && one.scrollWidth > one.clientWidth + 1) told("cut", one);
}
for (const row of root.querySelectorAll("tr")) {
    [...row.children].reduce((left, right) => {
        if (left.getBoundingClientRect().right > right.getBoundingClientRect().left + 1) told("overlaps", right);
        return right;
    });
}
[...root.children].filter(one => one.getBoundingClientRect().height).reduce((above, below) => {
    if (above.getBoundingClientRect().bottom > below.getBoundingClientRect().top + 1) told("on the one above", below);
    return below;
});
if (document.documentElement.scrollWidth > innerWidth + 1) faults.push("the page scrolls sideways");
return faults;
"""
# A picture is visible when it is what a click on its centre would meet.
PICTURES = """
return [...document.querySelector(arguments[0]).querySelectorAll(arguments[1])].map(one => {
    one.scrollIntoView({block: "center"});
    const box = one.getBoundingClientRect();
    const met = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
    return {natural: one.naturalWidth ?? box.width, width: box.width, height: box.height,
            visible: one === met || one.contains(met)};
});
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def stored_version(registry: ModelRegistry, folder: Path) -> Manifest:
    """The third version of the demo's name."""
    source = Source(digest="3f" * 32, origin="/home/me/home", architecture="Qwen2ForCausalLM", parameters=19_600_000)
    for number in range(3):
        folder.mkdir(exist_ok=True)
        (folder / "genai_config.json").write_text(json.dumps({"number": number}))
        variant = stored_variant(registry, folder)
        manifest, _ = registry.commit("home", source, {"olive-ai": "0.13.0"}, [variant])
    return manifest


def report_of_long_words() -> DeployReport:
    """A report with what no browser breaks: an address of the store, an answer without spaces, names of files."""
    answer = '{"device":"light","room":"garage","action":"on","level":100}'
    fact = {"name": "end of an answer", "value": "<|im_end|>", "used": "<|im_end|> (2)"}
    return full_report(
        *(full_variant(precision, answer=answer) for precision in ("fp16", "int8", "int4")),
        checkpoint=f"store://{'3f' * 32}",
        statements=(Statement(**fact, read_from="generation_config.json"),),
    )


def published(report: DeployReport, settings: Settings, server: str, tmp_path: Path) -> tuple[DeployReport, str]:
    """Publish a report as a deploy does; returns it and the address of its page."""
    registry = open_registry(settings)
    manifest = stored_version(registry, tmp_path / "variant")
    with temporary_settings({PREFECT_API_URL: server}):
        report = publish_report(report, registry.of(manifest), settings)
    (artifact,) = query(server, "artifacts/latest", artifacts={"key": {"any_": ["slmops-home"]}})
    assert len(artifact["data"]) < 200_000
    for name in ("report.md", "report.html"):
        stored = registry.objects.read_bytes(f"models/home/3/evidence/{name}").decode()
        assert stored == (settings.home_dir / "reports" / f"home@3.{name.split('.')[1]}").read_text("utf-8")
    page = f"{server.removesuffix('/api')}/v2/artifacts/artifact/{artifact['latest_id']}"
    return report, page


def opened(driver: webdriver.Chrome, page: str, root: str = ".prose") -> None:
    driver.get(page)
    shown = f"return document.querySelector('{root} h1')?.innerText"
    WebDriverWait(driver, 240).until(lambda _: driver.execute_script(shown) == "home@3: registered")
    complete = "return [...document.images].every(one => one.complete)"
    WebDriverWait(driver, 240).until(lambda _: driver.execute_script(complete))


def test_prefects_page_shows_the_plots_and_every_table(
    browser: Browser, settings: Settings, server: str, tmp_path: Path
) -> None:
    _, page = published(report_of_long_words(), settings, server, tmp_path)
    for width in WIDTHS:
        driver = browser(width, "light")
        opened(driver, page)
        screenshot(driver, tmp_path / f"prefect-{width}.png")
        pictures = driver.execute_script(PICTURES, ".prose", "img")
        assert len(pictures) == 4
        for picture in pictures:
            assert picture["natural"] > 0
            assert picture["visible"]
            assert picture["width"] > 0.85 * min(width - 32, 584)
        assert driver.execute_script(CUT, ".prose") == []
        screenshot(driver, tmp_path / f"prefect-{width}-unfolded.png")


FOLDED = """
const named = one => one.innerText === "All figures of speed";
const fold = [...document.querySelectorAll("summary")].find(named).parentElement;
const shown = () => fold.querySelector("table").checkVisibility();
const before = shown();
fold.querySelector("summary").click();
return [before, shown(), [...document.querySelectorAll("details")].every(one => one.children.length > 1)];
"""


def test_folds_open_with_a_click_in_both_of_prefects_interfaces(
    browser: Browser, settings: Settings, server: str, tmp_path: Path
) -> None:
    _, page = published(report_of_long_words(), settings, server, tmp_path)
    for root, address in ((".prose", page), (".markdown-renderer", page.replace("/v2/", "/"))):
        driver = browser(390, "light")
        opened(driver, address, root)
        shown_before, shown, are_full = driver.execute_script(FOLDED)
        screenshot(driver, tmp_path / f"fold{root}.png")
        assert (shown_before, shown, are_full) == (False, True, True)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 391


LINK = "return [...document.querySelectorAll('a')].find(one => one.innerText === arguments[0])?.href"


def test_the_page_of_a_version_leads_to_its_report_in_both_of_prefects_interfaces(
    browser: Browser, settings: Settings, server: str, tmp_path: Path
) -> None:
    published(full_report(), settings, server, tmp_path)
    (version,) = query(server, "artifacts/latest", artifacts={"key": {"any_": ["slmops-home-version"]}})
    driver = browser(1280, "light")
    for root, interface in ((".prose", "/v2"), (".markdown-renderer", "")):
        driver.get(f"{server.removesuffix('/api')}{interface}/artifacts/artifact/{version['latest_id']}")
        named = partial(driver.execute_script, LINK, "The report of home@3")
        address = WebDriverWait(driver, 240).until(lambda _, named=named: named())
        screenshot(driver, tmp_path / f"version{root}.png")
        opened(driver, address, root)


def test_what_others_wrote_does_nothing_on_prefects_page(
    browser: Browser, settings: Settings, server: str, tmp_path: Path
) -> None:
    report = hostile_report(HOSTILE[0]).model_copy(update={"question": HOSTILE[1], "description": HOSTILE[2]})
    _, page = published(report, settings, server, tmp_path)
    driver = browser(1280, "light")
    opened(driver, page)
    assert driver.execute_script("return window.hacked") is None
    inserted = "return [...document.querySelectorAll('.prose img')].map(one => one.src.slice(0, 10))"
    assert set(driver.execute_script(inserted)) == {"data:image"}
    assert driver.execute_script("return document.querySelectorAll('.prose script').length") == 0
    assert HOSTILE[0] in driver.execute_script("return document.querySelector('.prose').innerText")
    assert not [url for url in requests_of(driver) if "127.0.0.1:9/" in url]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_file_opens_alone_and_is_readable(
    browser: Browser, settings: Settings, server: str, tmp_path: Path, scheme: str
) -> None:
    report, _ = published(full_report(), settings, server, tmp_path)
    assert report.html_file
    address = Path(report.html_file).as_uri()
    for width in WIDTHS:
        driver = browser(width, scheme)
        driver.get(address)
        screenshot(driver, tmp_path / f"file-{scheme}-{width}.png")
        pictures = driver.execute_script(PICTURES, "main", "figure svg")
        assert len(pictures) == 4
        assert all(picture["visible"] and picture["width"] > 300 and picture["height"] > 80 for picture in pictures)
        assert driver.execute_script(CUT, "main") == []
        screenshot(driver, tmp_path / f"file-{scheme}-{width}-unfolded.png")
        background, ink = driver.execute_script(
            "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        )
        assert (brightness(background) > brightness(ink)) == (scheme == "light")
        assert requests_of(driver) == [address]
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []


def brightness(colour: str) -> int:
    """Sum of a CSS `rgb()` colour's parts."""
    return sum(int(part) for part in colour.strip("rgba()").split(",")[:3])


def requests_of(driver: webdriver.Chrome) -> list[str]:
    """The page's requests since it was opened, without data: addresses."""
    messages: list[dict[str, Any]] = [
        json.loads(entry["message"])["message"] for entry in driver.get_log("performance")
    ]
    asked = [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in asked if not url.startswith(("data:", "about:", "chrome:"))]
