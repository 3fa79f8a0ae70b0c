"""The host's start: a version that cannot be read or loaded does not keep the others from being served."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.foundry.model_host import ModelHost
from slmops.infra.foundry.model_process import ModelProcess
from slmops.infra.foundry.served_model import PlacedModel, ServedVersion
from slmops.infra.settings import ServeSettings
from tests.support.errors import coded


class Source:
    """A store in which some names cannot be read, and some versions cannot be placed."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def names(self) -> list[str]:
        return list(self._names)

    def champion(self, name: str) -> ServedVersion:
        if name == "unreadable":
            raise StageFailed("The manifest of unreadable is damaged.", "", "manifest-damaged")
        return self.version(name, 1)

    def version(self, name: str, version: int) -> ServedVersion:
        return ServedVersion(name, version, "int4")

    def place(self, served: ServedVersion, folder: Path) -> PlacedModel:
        if served.name == "endless":
            raise BadInput("The chat template takes more than 30 s.", "", "chat-template-unbounded")
        if served.name == "hostile":
            raise KeyError("context_length")
        return PlacedModel(1, ())


@pytest.fixture(autouse=True)
def _without_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop() -> None:
        return

    async def start(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(load_ms=1.0, has_ended=False, ended=asyncio.Event().wait, stop=stop)

    monkeypatch.setattr(ModelProcess, "start", start)


def served_of(folder: Path, *stored: str, given: tuple[str, ...] = ()) -> list[str]:
    async def started() -> list[str]:
        host = ModelHost(Source(*stored), ServeSettings(), folder, folder)
        try:
            await host.start(given)
            return [model.served.name for model in host.models if model.is_loaded]
        finally:
            await host.close()

    return asyncio.run(started())


def test_the_others_are_served(tmp_path: Path) -> None:
    assert served_of(tmp_path, "unreadable", "endless", "hostile", "good") == ["good"]


def test_a_store_of_which_nothing_can_be_served_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, check=coded("manifest-damaged")):
        served_of(tmp_path, "unreadable", "endless")


def test_a_given_name_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, check=coded("manifest-damaged")):
        served_of(tmp_path, "unreadable", "good", given=("unreadable", "good"))
