"""Changes of a champion that a killed process left half done on this machine.

A change keeps `SLMOPS_HOME/promotions/NAME.json` from its first step to its last:
`{"process": slmops.infra.storage.holders.this_process(), "version": 3}`. If its process has ended, Foundry Local and
the running servers may be on another version than the alias, which decides.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from slmops.infra.errors import SlmopsError
from slmops.infra.files import write_whole
from slmops.infra.storage.holders import has_ended, this_process
from slmops.infra.storage.registry import CHAMPION, ModelRegistry

FOLDER = "promotions"


def mark_change(home: Path, name: str, version: int) -> None:
    """Note that this process begins to change a name's champion on this machine."""
    write_whole(_path(home, name), json.dumps({"process": this_process(), "version": version}))


def clear_mark(home: Path, name: str) -> None:
    """Note that a name's champion is the same everywhere on this machine."""
    _path(home, name).unlink(missing_ok=True)


def has_marks(home: Path) -> bool:
    """Whether a change of a champion is under way, or was interrupted."""
    return any((home / FOLDER).glob("*.json"))


def interruptions(home: Path, registry: ModelRegistry) -> Iterator[str]:
    """Yield a sentence for each change whose process has ended before its last step: what is wrong and what to do."""
    for path in sorted((home / FOLDER).glob("*.json")):
        name = path.stem
        try:
            record = json.loads(path.read_bytes())
            process, version = str(record["process"]), int(record["version"])
        except (OSError, ValueError, TypeError, KeyError):  # it was removed meanwhile, or is no mark
            continue
        if not has_ended(process):
            continue
        try:
            champion = registry.alias(name, CHAMPION)
        except SlmopsError:  # the store cannot be read now: its own command says so
            continue
        if champion == version:  # the alias is changed last, so all was done
            clear_mark(home, name)
            continue
        standing = f"{name}@{champion} is the champion" if champion else f"{name} has no champion"
        yield (
            f"The promotion of {name}@{version} was interrupted: {standing}, but Foundry Local and running servers "
            f"may have {name}@{version}. Put it right with slmops promote {name}@{champion or version}."
        )


def _path(home: Path, name: str) -> Path:
    return home / FOLDER / f"{name}.json"
