"""All or nothing: the steps of a champion's change are undone when a later step fails."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from slmops.infra.errors import SlmopsError, StageFailed
from slmops.infra.foundry.server_client import RunningServer
from slmops.infra.storage.registry import CHAMPION
from slmops.tasks.versions.change import Change


@dataclass
class Undo:
    """The steps that restore everything; each is added before the change that it undoes."""

    steps: list[tuple[str, Callable[[], object]]] = field(default_factory=list)

    def add(self, what: str, step: Callable[[], object]) -> None:
        """Add a step. It may run even if its change was made only in part, or not at all."""
        self.steps.append((what, step))

    def run(self) -> list[str]:
        """Restore everything, the last change first, and return what could not be restored.

        A step that fails does not prevent the others.
        """
        unrestored = []
        while self.steps:
            what, step = self.steps.pop()
            try:
                step()
            except Exception as error:
                unrestored.append(f"{what} ({_as_slmops_error(error).message.rstrip('.')})")
        return unrestored


@contextmanager
def all_or_nothing(change: Change, settled: Callable[[str], object] | None = None) -> Iterator[Undo]:
    """Undo all changes if a step fails or the run is cancelled. The error then names the present champion.

    `settled` is called with the name at the end, unless something could not be restored.
    """
    undo = Undo()
    unrestored: Sequence[str] = ()
    try:
        yield undo
    except Exception as error:
        known = _as_slmops_error(error)
        unrestored = undo.run()
        raise type(known)(*_refusal(change, known, unrestored), known.code) from error
    except BaseException:  # Ctrl-C, a cancelled run
        unrestored = undo.run()
        raise
    finally:
        if settled and not unrestored:
            settled(change.name)


def _as_slmops_error(error: Exception) -> SlmopsError:
    return error if isinstance(error, SlmopsError) else StageFailed(f"{type(error).__name__}: {error}.")


def _refusal(change: Change, error: SlmopsError, unrestored: Sequence[str]) -> tuple[str, str]:
    standing = f"{change.name}@{change.former} still is the champion" if change.former else "There still is no champion"
    message = f"{change.version.reference} was not promoted: {error.message} {standing}."
    if not unrestored:
        return message, error.what_to_do
    again = f"slmops promote {change.name}@{change.former}" if change.former else "slmops unregister"
    return f"{message} Not restored: {'; '.join(unrestored)}.", f"Restore it with {again}. {error.what_to_do}".strip()


def restore_alias(change: Change) -> None:
    """Make the former version the champion again, if this change had replaced it."""
    name, version, registry = change.name, change.version.number, change.version.registry
    if change.former != version and registry.alias(name, CHAMPION) == version:
        reason = f"the promotion of {change.version.reference} did not complete"
        if change.former is None:
            registry.remove_alias(name, CHAMPION, reason)
        else:
            registry.set_alias(name, CHAMPION, change.former, reason, rolled_back=True)


def hand_back(server: RunningServer, change: Change, version: int) -> None:
    """Make a server serve the previous version; raises `StageFailed` if it then serves another one."""
    try:
        registry = change.version.registry
        former = registry.version(change.name, version)
        server.hand_over(change.name, version, former.require_serving().precision)
    except SlmopsError:
        if server.serves(change.name) != version:  # a server that refused the new version still serves the former one
            raise
