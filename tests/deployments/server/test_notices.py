"""Notices by a notification block of Prefect, on a real server."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.deployments.server.automations import keep_automations
from slmops.deployments.server.notices import CHAMPION_NOTICE, NOTICES, VERDICT_NOTICE, notices
from slmops.infra.errors import BadInput
from slmops.infra.server_settings import NoticeSettings
from slmops.tasks.runs.events import CHAMPION_PROMOTED
from tests.support.errors import coded

DEADLINE_S = 240  # a hang, not a slow machine, fails here


@pytest.fixture
def client(server: str) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: server}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def chat() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A chat service: its address, and the messages that it has taken."""
    messages: list[dict[str, str]] = []

    class Taking(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Taking) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{service.server_port}", messages
        service.shutdown()


def test_a_block_takes_the_notice_of_a_new_champion_once_it_is_switched_on(
    client: SyncPrefectClient, server: str, chat: tuple[str, list[dict[str, str]]]
) -> None:
    address, messages = chat
    form = {"subject": "{{subject}}", "body": "{{body}}"}
    CustomWebhookNotificationBlock(name="chat", url=address, json_data=form).save("team", overwrite=True)
    wanted = notices(NoticeSettings(block="custom-webhook/team"), "here", client)
    assert {automation.name for automation in wanted} == {*NOTICES}
    assert {automation.name for automation in wanted if not automation.enabled} == {CHAMPION_NOTICE, VERDICT_NOTICE}
    (champion,) = [automation for automation in wanted if automation.name == CHAMPION_NOTICE]
    keep_automations(client, [champion])
    assert champion.id
    try:
        client.request("PATCH", f"/automations/{champion.id}", json={"enabled": True}).raise_for_status()
        name = f"home-{uuid4().hex}"
        promoted = event(name, summary=f"{name}@2 is the champion, in place of {name}@1.")
        deadline = time.monotonic() + DEADLINE_S
        while not messages:
            # The server learns of an automation in the background: an event right after it may come too early.
            assert time.monotonic() < deadline
            httpx.post(f"{server}/events", json=[{**promoted, "id": str(uuid4())}]).raise_for_status()
            time.sleep(1)
        assert messages[0]["subject"] == f"{name}@2: {CHAMPION_PROMOTED}"
        assert messages[0]["body"].strip() == f"{name}@2 is the champion, in place of {name}@1."
    finally:
        client.delete_automation(champion.id)


def event(name: str, summary: str) -> dict[str, Any]:
    return {
        "occurred": "2026-01-01T00:00:00Z",
        "event": CHAMPION_PROMOTED,
        "resource": {"prefect.resource.id": f"slmops.model.{name}"},
        "payload": {"reference": f"{name}@2", "summary": summary},
    }


def test_a_block_that_is_not_there_or_sends_nothing_is_refused(client: SyncPrefectClient) -> None:
    with pytest.raises(BadInput, check=coded("notice-block-missing", "slack-webhook/nobody")):
        notices(NoticeSettings(block="slack-webhook/nobody"), "here", client)
    Secret(value="x").save("kept", overwrite=True)
    with pytest.raises(BadInput, check=coded("notice-block-kind", "secret/kept")):
        notices(NoticeSettings(block="secret/kept"), "here", client)
