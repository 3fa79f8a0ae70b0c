"""Exams side by side: they share the cores and the memory, and each is kept as evidence."""

import threading
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from slmops.infra.records import Json, Record
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.version import Variant
from slmops.tasks.environment import estimates
from slmops.tasks.exams import together
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.exams.together import examine_together
from slmops.tasks.workshop import Workshop, working_in
from tests.support.versions import store_version


class Share(Record):
    """The threads of an exam."""

    threads: int


class Meeting(Exam[Share]):
    """An exam that ends when the other one has begun, or, without a meeting, at once."""

    kind, name, done_before = Kind("evaluation", Share, field="share"), "meet", "met before"

    def __init__(self, number: int, met: threading.Barrier | None) -> None:
        self.number, self.met = number, met

    def question(self, variant: Variant, settings: Settings) -> Json:
        return {"number": self.number}

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> Share:
        if self.met:
            self.met.wait()
        return Share(threads=shop.settings.threads)


@pytest.fixture
def examined(settings: Settings, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(Variant, "place", lambda *where: None)
    registry = open_registry(settings)
    version = registry.of(store_version(registry, tmp_path / "model"))

    @flow
    def run(threads: int, met: threading.Barrier | None) -> list[int]:
        machine = settings.machine.model_copy(update={"threads": threads})
        with working_in(Workshop(settings.model_copy(update={"machine": machine}), registry)):
            found = examine_together([Meeting(number, met) for number in (1, 2)], version.variant("int4"))
        return [share.threads for share in found]

    with temporary_settings({PREFECT_API_URL: server}):
        yield run


def test_exams_run_at_the_same_time_with_their_shares_of_the_threads_and_are_kept(examined: Any) -> None:
    assert examined(4, threading.Barrier(2, timeout=60)) == [2, 2]
    assert examined(4, threading.Barrier(2, timeout=0.01)) == [2, 2]  # from the evidence


@pytest.mark.parametrize("lacking", ["threads", "memory", "room"])
def test_exams_run_one_after_the_other_where_something_is_lacking(
    examined: Any, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(together, "run_abreast", lambda works: pytest.fail("side by side"))
    if lacking == "memory":
        available = type("Memory", (), {"available": 10**9})
        monkeypatch.setattr(together.psutil, "virtual_memory", lambda: available)
    if lacking == "room":
        monkeypatch.setattr(estimates, "MAX_BYTES_SIDE_BY_SIDE", 10**9)
    threads = 1 if lacking == "threads" else 2
    assert examined(threads, None) == [threads, threads]
