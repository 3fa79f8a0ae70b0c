"""The lease on a name's champion: of all machines that use a store, one changes a name's champion at a time.

A process writes its own lease, and only then lists the others: of two at once, the later sees the earlier. Who sees
another withdraws and waits, so no two processes hold it. A lease is renewed while it is held; one whose process has
ended on this machine, or that was not renewed for `TERM` by the store's clock, is removed by the next process.
"""

import json
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from slmops.infra.errors import PassingFault, StageFailed
from slmops.infra.process.call import OnProgress
from slmops.infra.storage.holders import is_lost, this_process
from slmops.infra.storage.objects import Entry, ObjectStore

FOLDER = "promotions"
TERM = timedelta(minutes=5)
RENEW_EVERY_S = 30.0
POLL_S = 0.5
WAIT_S = 1800.0  # a change proves a version and loads it on every server: it takes minutes


class ChampionLease:
    """The right of this process to change a name's champion; see `champion_lease`."""

    def __init__(self, objects: ObjectStore, name: str, what: str) -> None:
        self._objects = objects
        self._name = name
        self._key = f"{_folder(name)}/{this_process()}-{uuid.uuid4().hex}.json"
        self._record = json.dumps({"what": what}).encode()
        self._ended = threading.Event()

    def take(self) -> Entry | None:
        """Take the lease; returns None, or (with nothing taken) the lease of another process."""
        self._objects.put_bytes(self._key, self._record)
        entries = list(self._objects.entries(_folder(self._name)))
        own = next((entry for entry in entries if entry.key == self._key), None)
        if own is None:
            raise PassingFault("The store does not list an object that was just written to it.", "Try again.")
        others = [entry for entry in entries if entry.key != self._key]
        live = [entry for entry in others if _is_live(entry, own.modified_at)]
        self._objects.delete([entry.key for entry in others if entry not in live])
        if not live:
            return None
        self.release()
        return live[0]

    def check(self) -> None:
        """Raise `PassingFault` if the lease was lost: this process stood still for longer than `TERM`."""
        if not any(entry.key == self._key for entry in self._objects.entries(_folder(self._name))):
            raise PassingFault(
                f"The change of {self._name}'s champion was delayed for too long, and another one may have begun.",
                "Try again.",
                code="champion-lease-lost",
            )

    def release(self) -> None:
        """Give it up; another process may take it."""
        self._objects.delete([self._key])

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew it at an interval, and release it at the end."""
        renewing = threading.Thread(target=self._renew, name=f"lease-{self._name}", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            self._ended.set()
            renewing.join()
            self.release()

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_EVERY_S):
            try:
                self.check()  # a lease that another process removed is lost, and must not appear again
                self._objects.put_bytes(self._key, self._record)
            except PassingFault:
                return
            except (StageFailed, KeyError):  # the store cannot be reached now: the term is ten intervals long
                continue


@contextmanager
def champion_lease(
    objects: ObjectStore, name: str, what: str, on_progress: OnProgress | None = None, *, wait_s: float = WAIT_S
) -> Iterator[ChampionLease]:
    """Hold the lease on a name's champion; `what` says what for, such as `promotion of home@3`.

    Waits at most `wait_s` for another process that holds it, on this machine or another. Raises `StageFailed` then.
    """
    lease = ChampionLease(objects, name, what)
    deadline = time.monotonic() + wait_s
    while other := lease.take():
        doing = _what(objects, other.key) or f"change of {name}'s champion"
        if time.monotonic() >= deadline:
            raise StageFailed(
                f"Another {doing} is running, since or before {other.modified_at:%Y-%m-%d %H:%M:%S} UTC.",
                "Wait until it has ended, and try again. If its machine is gone, the store forgets it "
                f"{TERM.total_seconds() / 60:.0f} minutes after its last sign of life.",
                code="champion-is-changing",
            )
        if on_progress:
            on_progress(0, 1, f"waiting for another {doing}")
        time.sleep(min(random.uniform(0.5, 1.5) * POLL_S, max(deadline - time.monotonic(), 0)))  # noqa: S311
    with lease.renewed():
        yield lease


def champion_is_changing(objects: ObjectStore, name: str) -> bool:
    """Whether a process that has not ended holds the lease on a name's champion."""
    now = datetime.now(UTC)
    return any(_is_live(entry, now) for entry in objects.entries(_folder(name)))


def _is_live(entry: Entry, now: datetime) -> bool:
    return not is_lost(entry.key.rpartition("/")[2].rpartition("-")[0], now - entry.modified_at, TERM)


def _what(objects: ObjectStore, key: str) -> str:
    try:
        return str(json.loads(objects.read_bytes(key))["what"])
    except (KeyError, ValueError, TypeError):  # it was released meanwhile
        return ""


def _folder(name: str) -> str:
    return f"{FOLDER}/{name}"
