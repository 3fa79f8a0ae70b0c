"""A served version: its id, its source, its process, and its users."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx

from slmops.infra import errors
from slmops.infra.foundry.abilities import Abilities
from slmops.infra.foundry.model_process import ModelProcess
from slmops.infra.records import Json
from slmops.infra.server_settings import ServeSettings


class NotServed(errors.SlmopsError):
    """No served model has the requested name."""


class Busy(errors.SlmopsError):
    """Too many requests wait for the model, or there is not enough memory for it now."""


class NotLoaded(errors.SlmopsError):
    """The model could not be loaded at the last attempt; the next one is made after `retry_after_s`."""

    def __init__(self, model_id: str, retry_after_s: float) -> None:
        super().__init__(
            f"{model_id} cannot be loaded at present.", f"The server tries again in {retry_after_s:.0f} s."
        )
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class ServedVersion:
    """A version's variant that is served, by its Foundry id `NAME:VERSION`."""

    name: str
    version: int
    precision: str

    @property
    def model_id(self) -> str:
        """The id that the runtime serves it under."""
        return f"{self.name}:{self.version}"


@dataclass(frozen=True)
class PlacedModel:
    """A model folder that is ready to be loaded: its size in bytes, its control tokens' texts, and its abilities.

    `response_schema` is the JSON Schema of answers to requests that name no other format, if the version has one.
    """

    size_bytes: int
    control_tokens: tuple[str, ...]
    abilities: Abilities = field(default_factory=Abilities)
    response_schema: Json | None = None


class ModelSource(Protocol):
    """The source of versions; every call may block."""

    def names(self) -> list[str]:
        """Return the names that have a champion; raises the store's own errors."""

    def champion(self, name: str) -> ServedVersion:
        """Return the champion of a name; raises `BadInput` when there is none, and the store's own errors."""

    def is_changing(self, name: str) -> bool:
        """Whether a promotion of this name is running; raises the store's own errors."""

    def version(self, name: str, version: int) -> ServedVersion:
        """Return a version's selected variant; raises `BadInput` when there is none that passed the gate."""

    def place(self, served: ServedVersion, folder: Path) -> PlacedModel:
        """Write the verified model into a new folder; raises `StageFailed`."""


class RunningModel:
    """A version that is served: its process and its users."""

    def __init__(self, served: ServedVersion, settings: ServeSettings) -> None:
        self.served = served
        self.process: ModelProcess | None = None
        self.placed = PlacedModel(0, ())
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(settings.request_timeout_s, connect=5), limits=httpx.Limits(max_connections=None)
        )
        self.waiting = 0
        self.active = 0
        self.used_at = time.monotonic()
        self.is_retired = False
        self.reserved_bytes = 0  # while it is being loaded
        self.fault: str | None = None  # why the last attempt to load it failed
        self.failures = 0
        self.not_before = 0.0
        self.turns = asyncio.Semaphore(settings.max_concurrency)
        self.loading = asyncio.Lock()
        self.unused = asyncio.Event()
        self.unused.set()

    @property
    def is_loaded(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and not self.process.has_ended

    @property
    def url(self) -> str:
        """The web service's address."""
        assert self.process
        return self.process.url

    @property
    def memory_bytes(self) -> int:
        """The memory that it uses, or will use as soon as it is loaded."""
        return max(self.reserved_bytes, self.process.rss_bytes if self.process else 0)

    def answered(self) -> None:
        """Note that the process works, so that a later crash is not one of a series."""
        self.failures = 0
