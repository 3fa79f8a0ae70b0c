"""Following the store: a version that another machine promotes is soon served here too."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from slmops.infra.errors import SlmopsError
from slmops.infra.foundry.model_host import ModelHost
from slmops.infra.foundry.served_model import ModelSource, ServedVersion

LOG = logging.getLogger("slmops.serve")
NAMES = "the list of names"
LONGEST_PAUSE_S = 600.0


@dataclass(frozen=True)
class PutOff:
    """A champion that could not be loaded: the reason, and when the next attempt is made by `time.monotonic`."""

    champion: ServedVersion
    error: Exception
    pause_s: float
    until: float


class Following:
    """Makes a host serve each name's new champion, and new names if it serves all.

    An error with a name is logged once, and the name is reported as `behind`. The next poll tries again, so the host
    resumes when the cause is gone. A champion that cannot be loaded is tried again at growing intervals.
    """

    def __init__(self, host: ModelHost, source: ModelSource, interval_s: float, *, takes_new_names: bool) -> None:
        self._host = host
        self._source = source
        self._interval_s = interval_s
        self._takes_new_names = takes_new_names
        self._seen: dict[str, ServedVersion] = dict(host.champions)
        self._faults: dict[str, str] = {}
        self._put_off: dict[str, PutOff] = {}

    @property
    def behind(self) -> list[str]:
        """The names whose champion in the store may be another one; empty while the host is up to date."""
        return sorted(self._faults)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Poll the store at an interval, despite errors; an interval of 0 s disables polling."""
        looking = asyncio.create_task(self._run()) if self._interval_s else None
        try:
            yield
        finally:
            if looking:
                looking.cancel()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """Check every name once; an error with one name does not affect the others."""
        names = await self._names()
        self._faults = {what: reason for what, reason in self._faults.items() if what in {*names, NAMES}}
        for name in names:
            try:
                await self._look_at(name)
            except Exception as error:
                self._failed(name, error)
            else:
                self._succeeded(name)

    async def _names(self) -> Iterable[str]:
        names = set(self._host.champions)
        if not self._takes_new_names:
            return names
        try:
            names |= set(await asyncio.to_thread(self._source.names))
        except Exception as error:
            self._failed(NAMES, error)
        else:
            self._succeeded(NAMES)
        return names

    async def _look_at(self, name: str) -> None:
        champion = await asyncio.to_thread(self._source.champion, name)
        # A promotion on this machine hands over first and writes the alias last, so only a change of the alias counts,
        # or a promotion that has ended without one, because its process was killed.
        if champion != self._seen.get(name) or await self._was_left_by_a_promotion(name, champion):
            await self._go_over(name, champion)
        self._seen[name] = champion
        self._put_off.pop(name, None)

    async def _go_over(self, name: str, champion: ServedVersion) -> None:
        last = self._put_off.get(name)
        if last and last.champion == champion and time.monotonic() < last.until:
            raise last.error
        try:
            await self._host.go_over(champion)
        except Exception as error:
            pause_s = min(LONGEST_PAUSE_S, 2 * last.pause_s) if last and last.champion == champion else self._interval_s
            self._put_off[name] = PutOff(champion, error, pause_s, time.monotonic() + pause_s)
            raise

    async def _was_left_by_a_promotion(self, name: str, champion: ServedVersion) -> bool:
        served = self._host.champions.get(name)
        if served is None or served.version == champion.version:
            return False
        if await asyncio.to_thread(self._source.is_changing, name):
            return False
        if await asyncio.to_thread(self._source.champion, name) != champion:  # it ended meanwhile, with a new champion
            return False
        if name not in self._put_off:
            served_id, champion_id = served.model_id, champion.model_id
            LOG.warning("%s is served, but %s is the champion: a promotion was interrupted", served_id, champion_id)
        return self._host.champions.get(name) == served

    def _failed(self, what: str, error: Exception) -> None:
        reason = str(error) if isinstance(error, SlmopsError) else f"{type(error).__name__}: {error}."
        if what not in self._faults:  # log it once, because polls are frequent
            known = isinstance(error, SlmopsError)
            LOG.warning("%s cannot be followed: %s", what, reason, exc_info=None if known else error)
        self._faults[what] = reason

    def _succeeded(self, what: str) -> None:
        if self._faults.pop(what, None):
            LOG.info("%s is followed again", what)
