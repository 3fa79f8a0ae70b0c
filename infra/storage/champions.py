"""The history of a name's champions: which version, since when, set by whom, and why.

Each change is one object, `models/NAME/history/000007.json`. Conditional writes number it, so the order does not depend
on any machine's clock. A change is written before the alias. If the process ends in between, the change has no effect:
each change names the version that was champion before it, and a change without effect is not part of that chain.
"""

import getpass
import itertools
import json
from dataclasses import dataclass
from typing import Any

from slmops.infra.errors import StageFailed
from slmops.infra.storage.manifest import now
from slmops.infra.storage.objects import ObjectStore


@dataclass(frozen=True)
class ChampionChange:
    """From `since` (UTC, ISO 8601) on `version` was the champion in place of `former`; None: there was no champion.

    `by` is the operating system's name of the user. `rolled_back` distinguishes a return to an earlier state from a
    promotion.
    """

    version: int | None
    former: int | None
    since: str
    by: str
    reason: str
    rolled_back: bool


def next_change(objects: ObjectStore, name: str) -> int:
    """Return the number of the next change in a name's history."""
    return max((_number(entry.key) for entry in objects.entries(_folder(name))), default=0) + 1


def record_change(
    objects: ObjectStore,
    name: str,
    version: int | None,
    former: int | None,
    reason: str,
    *,
    rolled_back: bool,
    place: int | None = None,
) -> bool:
    """Append a change that is about to be made. With `place`, its number must be that one: False if it is taken."""
    record = {
        **{"version": version, "former": former, "since": now(), "by": _user()},
        **{"reason": reason, "rolled_back": rolled_back},
    }
    data = (json.dumps(record, indent=2, sort_keys=True) + "\n").encode()
    places = itertools.count(next_change(objects, name)) if place is None else (place,)
    return any(objects.put_bytes_if_absent(f"{_folder(name)}/{number:06}.json", data) for number in places)


def champion_changes(objects: ObjectStore, name: str, champion: int | None) -> list[ChampionChange]:
    """Return the changes that led to the present champion, newest first, without those that had no effect."""
    keys = sorted((entry.key for entry in objects.entries(_folder(name))), key=_number, reverse=True)
    changes: list[ChampionChange] = []
    for change in (_read(objects, key) for key in keys):
        if change.version == champion:
            changes.append(change)
            champion = change.former
    return changes


def champion_before(changes: list[ChampionChange]) -> int | None:
    """Return the version that a rollback goes back to, or None.

    After a rollback the earlier state is the present one: its predecessor is the same as before, never the version that
    was rolled back from.
    """
    at: int | None = 0 if changes else None
    while at is not None and changes[at].rolled_back:
        restored = changes[at].version
        at = next((index for index in range(at + 1, len(changes)) if changes[index].version == restored), None)
    return None if at is None else changes[at].former


def _folder(name: str) -> str:
    return f"models/{name}/history"


def _number(key: str) -> int:
    stem = key.rpartition("/")[2].removesuffix(".json")
    return int(stem) if stem.isdecimal() else 0


def _read(objects: ObjectStore, key: str) -> ChampionChange:
    try:
        record: dict[str, Any] = json.loads(objects.read_bytes(key))
        return ChampionChange(**{name: record[name] for name in ChampionChange.__dataclass_fields__})
    except (ValueError, TypeError, KeyError):
        raise StageFailed(
            f"The history's record {objects.uri(key)} is not valid.",
            "It was altered: restore it, or remove the file.",
            code="history-damaged",
        ) from None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, ImportError, OSError):  # the user of a container may have no name
        return "unknown"
