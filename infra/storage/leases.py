"""Leases: they coordinate deploys, pushes and garbage collections on any store without a lock.

A writer names the blobs that it relies on in a lease, and only then checks whether they exist. A collector writes its
own lease, and only then reads the writers' leases. The later of the two sees the other: a writer waits until the
collector has finished, and a collector spares the named blobs. The store must list everything that was written before,
as S3 does since 2020. All times are the store's own, so no machine's clock matters.
"""

import json
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from slmops.infra.errors import PassingFault
from slmops.infra.storage.holders import is_lost, this_process
from slmops.infra.storage.objects import Blob, ObjectStore

FOLDER = "leases"
WRITE = "write"
COLLECT = "collect"

# A lease that outlived its process is ignored after this time. A writer renews its lease whenever it stores something
# and before it makes a version. The time between a deploy's first store and its commit must fit into this time.
WRITE_LEASE = timedelta(hours=24)
# A collector renews its own lease between its short steps. It stops if it could not renew it for half of this time.
COLLECT_LEASE = timedelta(minutes=5)
TERMS = {WRITE: WRITE_LEASE, COLLECT: COLLECT_LEASE}
RENEW_AFTER_S = 30.0
POLL_S = 0.5


class WriteLease:
    """The blobs that this process relies on: those that it stored for a version not yet made, and versions in use."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._key = _new_key(WRITE)
        self._blobs: set[str] = set()

    def claim(self, blobs: Iterable[Blob]) -> None:
        """Rely on more blobs, and renew earlier claims: none of them is collected until `release`.

        Blobs that exist after this call stay; missing ones must be stored. Waits for collectors that started before the
        claim; a later collector reads the claim. Raises `PassingFault` when one of them does not end.
        """
        self._blobs.update(blob.sha256 for blob in blobs)
        at_work = self._put_and_see_collectors()
        deadline = time.monotonic() + 2 * COLLECT_LEASE.total_seconds()
        while at_work:
            if time.monotonic() > deadline:
                raise PassingFault("A garbage collection is running in the store and does not end.", "Try again.")
            time.sleep(POLL_S)
            at_work &= self._put_and_see_collectors()

    def _put_and_see_collectors(self) -> set[str]:
        self._objects.put_bytes(self._key, json.dumps(sorted(self._blobs)).encode())
        return {key for kind, key in _leases(self._objects, self._key).live if kind == COLLECT}

    def release(self) -> None:
        """Give up all claims."""
        if self._blobs:
            self._objects.delete([self._key])
            self._blobs.clear()


class Collector:
    """One collection of garbage: `spared` are the blobs (SHA-256) that writers rely on, `now` is the store's time."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._key = _new_key(COLLECT)
        self._renewed_at: float | None = None
        self.spared: set[str] = set()
        self.now = datetime.now(UTC)

    def begin(self) -> None:
        """Make writers wait, and read what they rely on. Leases that outlived their processes are removed."""
        self.renew()
        leases = _leases(self._objects, self._key)
        self.now = leases.now
        for kind, key in leases.live:
            if kind == WRITE:
                self.spared |= _blobs_of(self._objects, key)
        self._objects.delete(leases.stale)

    def renew(self) -> None:
        """Renew the lease; call it before each step that removes anything.

        Raises `PassingFault` if this process was delayed so long that writers may no longer wait for it.
        """
        now = time.monotonic()
        held_up_s = 0.0 if self._renewed_at is None else now - self._renewed_at
        if held_up_s > COLLECT_LEASE.total_seconds() / 2:
            raise PassingFault(
                "The garbage collection was delayed for too long and stopped.",
                "Run it again.",
                code="collector-delayed",
            )
        if self._renewed_at is None or held_up_s > RENEW_AFTER_S:
            self._objects.put_bytes(self._key, b"")  # a full disk, which a collection is to help, takes an empty file
            self._renewed_at = now

    def end(self) -> None:
        """Let writers continue."""
        self._objects.delete([self._key])


@contextmanager
def collecting(objects: ObjectStore) -> Iterator[Collector]:
    """Hold a collector's lease."""
    collector = Collector(objects)
    try:
        collector.begin()
        yield collector
    finally:
        collector.end()


def _new_key(kind: str) -> str:
    return f"{FOLDER}/{kind}-{this_process()}-{uuid.uuid4().hex}.json"


@dataclass(frozen=True)
class _Leases:
    now: datetime
    live: tuple[tuple[str, str], ...]  # (kind, key)
    stale: tuple[str, ...]


def _leases(objects: ObjectStore, own: str) -> _Leases:
    """Return the other leases. This process's own lease was just written, so it gives the store's time."""
    entries = list(objects.entries(FOLDER))
    now = next((entry.modified_at for entry in entries if entry.key == own), None)
    if now is None:
        raise PassingFault("The store does not list an object that was just written to it.", "Try again.")
    live, stale = [], []
    for entry in entries:
        kind, _, rest = entry.key.removeprefix(f"{FOLDER}/").partition("-")
        if entry.key == own:
            continue
        if is_lost(rest.rpartition("-")[0], now - entry.modified_at, TERMS.get(kind, WRITE_LEASE)):
            stale.append(entry.key)
        else:
            live.append((kind, entry.key))
    return _Leases(now, tuple(live), tuple(stale))


def _blobs_of(objects: ObjectStore, key: str) -> set[str]:
    try:
        return set(json.loads(objects.read_bytes(key)))
    except KeyError:  # its writer has added its version, which is read after this
        return set()
