"""Who owns the notices' automations: only the machine that set the webhook removes them."""

from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
from prefect.automations import Automation
from prefect.client import orchestration

from slmops.deployments.server import automations, notices
from slmops.infra.settings import NoticeSettings, Settings, WorkerSettings

NOTICES = {*notices.NOTICES}


class Server:
    """A Prefect API that several machines share, with its automations by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: dict[str, Automation] = {}
        monkeypatch.setattr(orchestration, "get_client", lambda **_: self)

        def save(automation: Automation) -> None:  # a bound method would not be given the automation
            automation.id = automation.id or uuid4()
            self.known[automation.name] = automation

        for method in ("create", "update"):
            monkeypatch.setattr(Automation, method, save)
        block = uuid4()
        monkeypatch.setattr(notices, "_webhook_block", lambda settings: block if settings.webhook_url else None)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        return

    def read_deployment_by_name(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(id=uuid4())

    def read_automations_by_name(self, name: str) -> list[Automation]:
        return [self.known[name]] if name in self.known else []

    def delete_automation(self, found: UUID) -> None:
        self.known = {name: automation for name, automation in self.known.items() if automation.id != found}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


@pytest.fixture
def with_webhook(settings: Settings) -> Settings:
    return settings.model_copy(update={"notices": NoticeSettings.model_validate({"webhook_url": "http://hook"})})


def test_a_second_machine_without_the_webhook_leaves_the_notices(
    server: Server, settings: Settings, with_webhook: Settings
) -> None:
    automations.register_automations(with_webhook, "first")
    server.known[notices.FAILURE_NOTICE].enabled = False
    automations.register_automations(settings, "second")
    assert server.known.keys() >= NOTICES
    server.known[notices.CHAMPION_NOTICE].enabled = True
    automations.register_automations(with_webhook, "first")
    on = {name for name in NOTICES if server.known[name].enabled}
    assert on == {notices.APPROVAL_NOTICE, notices.REGRESSION_NOTICE, notices.CHAMPION_NOTICE}


def test_the_machine_that_set_the_webhook_removes_them(
    server: Server, settings: Settings, with_webhook: Settings
) -> None:
    automations.register_automations(with_webhook, "first")
    automations.register_automations(settings, "first")
    assert not server.known.keys() & NOTICES


def test_the_limit_of_a_lost_run_is_a_setting(server: Server, settings: Settings) -> None:
    patient = settings.model_copy(update={"worker": WorkerSettings(lost_after_s=600)})
    automations.register_automations(patient, "first")
    assert server.known[automations.LOST_RUNS].trigger.within.total_seconds() == 600
