"""docker-compose.yml's Prefect server and workers, natively: authentication, a deploy over the API whose variants two
workers build while one is killed, and one from the form of Prefect's UI.

One stack for all, and the tests follow each other: while the killed worker is not yet missed, the form is filled in.
"""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from slmops.infra.errors import BadInput
from slmops.infra.olive.calls import Build
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.tasks.runs.dispatch import check_pool
from tests.e2e.conftest import OPEN_GATE, SMALL, Slmops
from tests.e2e.test_up import ENDED, example, wait_for
from tests.support import prefect_api
from tests.support.chromium import Browser, screenshot
from tests.support.errors import coded
from tests.support.stack import IS_INSTALLED, MISSING, Stack, running_stack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("stack"),
    pytest.mark.skipif(not IS_INSTALLED, reason=MISSING),
]

VARIABLES = {**QUIET_ENVIRONMENT, **OPEN_GATE, **SMALL, "SLMOPS_SOAK__REQUESTS": "0", "SLMOPS_MACHINE__THREADS": "1"}
VARIABLES["SLMOPS_WORKER__LOST_AFTER_S"] = "60"  # the least that is allowed: two signs of life that did not come
WORKERS = ("worker-1", "worker-2")
POOL = "builders"
T = TypeVar("T")
ERROR = re.compile(r"^(\w+(?:Error|Exception)\b.*)$", re.MULTILINE)
# Prefect 3.8 takes in changed automations while it evaluates them; it evaluates them again five seconds later.
RELOADED = "AssertionError: Trigger._automation has been garbage collected"
DEADLINE_S = 900  # a hang, not a slow machine, fails here


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The server, a deployer and two workers; all that they have in common are the API and the store."""
    with running_stack(tmp_path_factory.mktemp("stack"), VARIABLES) as running:
        running.start("deployer")
        for name in WORKERS:
            running.start("worker", name)
        for name in WORKERS:
            running.wait_until_healthy("worker", name)
        running.wait_until_healthy("deployer")
        yield running


@pytest.fixture(scope="module")
def slmops(stack: Stack) -> Slmops:
    """The command line on a machine of its own that knows the API and the store."""
    environment = {
        "PREFECT_API_URL": stack.api_url,
        "PREFECT_API_AUTH_STRING": stack.authentication,
        "SLMOPS_STORE__URI": "s3://slmops/models",
        "SLMOPS_STORE__ENDPOINT_URL": stack.store.endpoint_url,
        "SLMOPS_STORE__REGION": "us-east-1",
        "SLMOPS_STORE__ACCESS_KEY_ID": stack.store.access_key_id,
        "SLMOPS_STORE__SECRET_ACCESS_KEY": stack.store.secret_access_key,
        "SLMOPS_WORKER__POOL": POOL,
    }
    return Slmops(stack.folder / "client", {**VARIABLES, **environment})


@pytest.fixture(scope="module")
def checkpoint(slmops: Slmops, tiny: Path) -> str:
    """The checkpoint's address in the store, which all machines can read."""
    return slmops.run("ingest", tiny).stdout.split()[-1]


@pytest.fixture(scope="module")
def killed(stack: Stack, slmops: Slmops, checkpoint: str) -> Iterator["subprocess.Popen[str]"]:
    """The documented call, running, with a precision for each worker; one of them was killed during its build."""
    script = example("sh", "curl").replace('["int4"]', '["int8", "int4"]')
    assert "int8" in script
    variables = slmops.variables(CHECKPOINT=checkpoint, NAME="scaled")
    calling = subprocess.Popen(
        ["bash", "-c", script], cwd=stack.folder, env=variables, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not all(builds_of(stack, name) for name in WORKERS):
            assert calling.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stack.kill(WORKERS[1])
        yield calling
    finally:
        calling.kill()
        calling.wait()


def builds_of(stack: Stack, name: str) -> list[psutil.Process]:
    """The build processes of a worker."""
    found = []
    for process in stack.tree(name):
        try:
            if Build.target() in process.cmdline():
                found.append(process)
        except psutil.Error:  # it has ended
            continue
    return found


def query(stack: Stack, path: str, **body: Any) -> list[dict[str, Any]]:
    """Ask the API for all that fits."""
    return prefect_api.query(stack.api_url.replace("://", f"://{stack.authentication}@"), path, **body)


class Page:
    """A person's actions on a page: wait for visible elements, and click them by their text."""

    def __init__(self, driver: webdriver.Chrome, folder: Path) -> None:
        self.driver = driver
        self.folder = folder

    def open(self, address: str) -> None:
        self.driver.get(address)

    def on(self, selector: str, text: str | None, act: Callable[[WebElement], T]) -> T:
        """Act on the first visible element of a CSS selector, with exactly this text if one is given.

        The page may draw the element anew between the look and the act: then it is looked for again.
        """

        def done(_: object) -> tuple[T] | None:
            for element in self.driver.find_elements(By.CSS_SELECTOR, selector):
                if element.is_displayed() and (text is None or element.text.strip() == text):
                    return (act(element),)
            return None

        try:
            waiting = WebDriverWait(self.driver, 60, ignored_exceptions=[StaleElementReferenceException])
            return waiting.until(done)[0]
        except TimeoutException:
            self.shot("failed")
            body = self.driver.find_element(By.TAG_NAME, "body").text
            raise AssertionError(f"{selector} {text or ''}: {body}") from None

    def wait_for(self, selector: str, text: str | None = None) -> None:
        self.on(selector, text, lambda _: None)

    def click(self, selector: str, text: str | None = None) -> None:
        self.on(selector, text, WebElement.click)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.driver.find_elements(By.CSS_SELECTOR, selector)]

    def fill(self, label: str, value: str) -> None:
        """Type into the field that a label names."""
        field = self.on("label", label, lambda one: one.get_attribute("for"))
        self.on(f"[id='{field}']", None, lambda one: one.send_keys(value))

    def remove(self, chosen: str) -> None:
        """Remove one of several chosen values."""
        self.click(f"button[aria-label='Remove {chosen} tag']")

    def shot(self, name: str) -> None:
        screenshot(self.driver, self.folder / f"{name}.png")


def test_the_api_refuses_who_does_not_say_the_password(stack: Stack, slmops: Slmops) -> None:
    flows = f"{stack.api_url}/flows/filter"
    assert httpx.post(flows, json={}).status_code == httpx.codes.UNAUTHORIZED
    assert httpx.post(flows, json={}, auth=("slmops", "guessed")).status_code == httpx.codes.UNAUTHORIZED
    assert httpx.get(f"{stack.api_url}/health").status_code == httpx.codes.OK
    (refused,) = slmops.json("up", "--check", status=1, PREFECT_API_AUTH_STRING="slmops:guessed")["checks"]
    assert "PREFECT_API_AUTH_STRING is not its user and password" in refused["found"]


def test_machines_that_start_at_once_register_each_automation_once(stack: Stack) -> None:
    names = [automation["name"] for automation in query(stack, "automations")]
    assert len(names) == len(set(names)) == 3


def test_the_check_of_the_services_reports_when_they_have_ended(stack: Stack) -> None:
    assert stack.is_healthy("prefect-services")
    services, stack.processes["prefect-services"] = stack.processes["prefect-services"], stack.processes["prefect-api"]
    try:  # whose timers are others
        assert not stack.is_healthy("prefect-services")
    finally:
        stack.processes["prefect-services"] = services


def test_an_unknown_pool_is_refused(stack: Stack) -> None:
    here = {PREFECT_API_URL: stack.api_url, PREFECT_API_AUTH_STRING: stack.authentication}
    with temporary_settings(here), pytest.raises(BadInput, check=coded("work-pool-missing", "'nobody'")) as refused:
        check_pool("nobody", ["build-variant"])
    assert "slmops up --pool nobody" in refused.value.what_to_do


def test_the_form_of_the_ui_starts_a_deploy(
    browser: Browser,
    stack: Stack,
    killed: "subprocess.Popen[str]",
    checkpoint: str,
    tmp_path: Path,
) -> None:
    page = Page(browser(1280, "light"), tmp_path)
    page.open(stack.api_url.removesuffix("/api"))
    page.on("input[type=password]", None, lambda one: one.send_keys(stack.authentication))
    page.click("button", "Login")
    page.click("a", "Deployments")
    page.click("a", "deploy")
    page.click("button", "Run")
    page.click("[role=menuitem]", "Custom run")
    page.fill("checkpoint", checkpoint)
    page.fill("name", "by-form")
    page.shot("form")
    assert page.texts("label")[:4] == ["Run Name", "checkpoint", "name", "precisions (Optional)"]
    for unwanted in ("fp16", "int8"):
        page.remove(unwanted)
    page.shot("filled")
    page.click("button", "Submit")

    page.wait_for("button", "View run")
    page.open("about:blank")  # the page of a run under way takes a third of a core

    def ended() -> dict[str, Any] | None:
        runs = query(stack, "flow_runs", flows={"name": {"any_": ["deploy"]}})
        mine = (run for run in runs if run["parameters"]["name"] == "by-form")
        return next((run for run in mine if run["state"]["type"] in ENDED), None)

    run = wait_for(ended, DEADLINE_S)
    assert run["state"]["type"] == "COMPLETED", run["state"]["message"]
    assert run["parameters"]["precisions"] == ["int4"]
    page.open(f"{stack.api_url.removesuffix('/api')}/v2/runs/flow-run/{run['id']}")
    page.wait_for("span", "Completed")
    page.shot("run")
    page.click("button", "Artifacts")
    page.wait_for("a[href$='/artifacts/key/slmops-by-form']")
    (report,) = query(stack, "artifacts", artifacts={"key": {"any_": ["slmops-by-form"]}})
    page.open(f"{stack.api_url.removesuffix('/api')}/v2/artifacts/artifact/{report['id']}")
    page.wait_for(".prose h1", "by-form@1: registered")
    page.shot("report")


def test_what_the_killed_worker_built_another_builds(
    stack: Stack, slmops: Slmops, killed: "subprocess.Popen[str]"
) -> None:
    output = killed.communicate(timeout=DEADLINE_S)[0]
    assert killed.returncode == 0, output
    assert "# scaled@1: registered" in output, output
    runs = [run for run in query(stack, "flow_runs") if run["parameters"].get("name") == "scaled"]
    builds = [run for run in runs if run["name"].startswith("build-scaled-")]
    assert sorted(run["state"]["type"] for run in builds) == ["COMPLETED", "COMPLETED", "CRASHED"]
    (crashed,) = [run for run in builds if run["state"]["type"] == "CRASHED"]
    assert "No sign of life" in crashed["state"]["message"]
    again = [run for run in builds if run["name"] == crashed["name"]]
    assert len(again) == 2
    listed = {model["name"]: len(model["variants"]) for model in slmops.json("list")["models"]}
    assert listed["scaled"] == 2
    # The killed machine wrote nothing that could be taken for a version.
    assert not list((stack.home(WORKERS[1]) / "cache" / "builds").glob("*.json"))


def test_the_composed_catalog_lists_what_was_deployed(stack: Stack, killed: "subprocess.Popen[str]") -> None:
    stack.start("catalog")
    stack.wait_until_healthy("catalog")
    models = f"http://127.0.0.1:{stack.ports['catalog']}/asset-gallery/v1.0/models"
    asked = {"filters": [], "pageSize": 50}
    assert httpx.post(models, json=asked).status_code == httpx.codes.UNAUTHORIZED
    token = Path(stack.composed["secrets"]["catalog-token"]["file"]).read_text("utf-8").strip()
    found = httpx.post(models, params={"token": token}, json=asked).raise_for_status().json()
    assert "scaled" in json.dumps(found)
    assert token not in stack.said("catalog")
    assert {*ERROR.findall(stack.said("prefect-services"))} <= {RELOADED}
