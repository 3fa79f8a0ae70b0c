"""The forms that a person fills in, in Prefect's own UI and headless Chromium: of a deploy, and of an approval.

The screenshots stay in the tests' temporary folder.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings
from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

from slmops.deployments.server.registration import read_deployments, register_deployments
from slmops.deployments.server.work_pool import DEFAULT_POOL, ensure_pool
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION
from slmops.tasks.runs import pause
from slmops.tasks.versions import approval
from slmops.tasks.versions.approval import Approval
from slmops.tasks.workshop import Workshop, working_in
from tests.flows.test_promotion import passed
from tests.support.chromium import Browser, screenshot
from tests.support.paused_runs import paused
from tests.support.prefect_api import call

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]

TEXT = "return document.body.innerText"
VERDICT = "home@2 is better than home@1: +12.0 points (4.0 to 20.0) on 50 rows."
# Columns of a table that lie beyond its frame.
CUT = """
return [...document.querySelectorAll("[role=dialog] th, [role=dialog] td")].filter(
    cell => cell.getBoundingClientRect().right > cell.closest("[role=dialog]").getBoundingClientRect().right
).map(cell => cell.innerText);
"""
CLICK = """
const found = [...document.querySelectorAll("button")].find(button => button.innerText.trim() === arguments[0]);
found?.click();
return Boolean(found);
"""


@pytest.fixture
def api(server: str) -> Iterator[str]:
    with temporary_settings({PREFECT_API_URL: server}):
        yield server


def wait_for_text(driver: webdriver.Chrome, text: str) -> str:
    """Return the page's text when it has this part."""
    WebDriverWait(driver, 240).until(lambda _: text in driver.execute_script(TEXT))
    return str(driver.execute_script(TEXT))


def test_the_form_of_a_deploy_has_fields_and_lists_only(browser: Browser, api: str, tmp_path: Path) -> None:
    ensure_pool(DEFAULT_POOL)
    register_deployments([entry for entry in read_deployments() if entry["name"] == "deploy"])
    deployment = call("GET", f"{api}/deployments/name/deploy/deploy")["id"]
    driver = browser(1280, "light")
    driver.get(f"{api.removesuffix('/api')}/deployments/deployment/{deployment}/run")
    shown = wait_for_text(driver, "training_run")
    screenshot(driver, tmp_path / "form.png")
    assert "type None" not in shown
    required = ("checkpoint", "name")
    first = ("checkpoint", "name", "precisions", "evaluation_file", "Evaluation: scorer", "Gate: max_kl_divergence")
    places = [shown.index(f"\n{field}{'' if field in required else ' (Optional)'}\n") for field in first]
    assert places == sorted(places)
    assert shown.count("Add item") == 1  # the budget's; recipes and checks are lists to choose from


def test_an_approval_shows_the_figures_and_takes_the_answer(
    browser: Browser, api: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pause, "POLL_S", 0.2)
    registry = open_registry(settings)
    for number in (1, 2):
        passed(registry, tmp_path, number)
    registry.set_alias("home", CHAMPION, 1, "the first")

    @flow(name="asks", flow_run_name="asks-home@2")
    def asks() -> Approval:
        with working_in(Workshop(settings, registry)):
            return approval.ask_approval(registry.find("home@2"), VERDICT)

    driver = browser(1280, "light")
    with paused(asks, api) as run:
        driver.get(f"{api.removesuffix('/api')}/runs/flow-run/{run.id}")
        WebDriverWait(driver, 240).until(lambda _: driver.execute_script(CLICK, "Resume"))
        shown = wait_for_text(driver, "home@1 (champion)")
        driver.save_screenshot(str(tmp_path / "approval.png"))
        assert "Promote home@2 in place of home@1?" in shown
        assert VERDICT in shown
        assert driver.execute_script(CUT) == []
        assert driver.execute_script(CLICK, "Submit")
        answered = run.result()
    assert answered == Approval(given=False)  # the form's default keeps the champion
