"""What must hold after whatever happened to a process, a disk or a clock: one check of a store, one of a machine."""

import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from slmops.infra.foundry.interruption import interruptions
from slmops.infra.foundry.server_client import running_servers
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.verification import verify_version
from slmops.tasks.foundry.registration import registered_models

ENDS_WITHIN_S = 120.0
FOLLOWS_WITHIN_S = 30.0


def check_store(registry: ModelRegistry, kept: Iterable[str] = (), only: str | None = None) -> None:
    """Every visible version is whole, every alias points to one, and no reference in `kept` was lost.

    With `only`, the content of other names is not read.
    """
    found = list(registry.all_versions())
    for version in found:
        damage = verify_version(version).damage if only in (None, version.name) else ()
        assert not damage, (version.reference, damage)
    for name in registry.names():
        numbers = {version.number for version in registry.versions(name)}
        assert set(registry.aliases(name).values()) <= numbers, (name, registry.aliases(name), numbers)
    lost = set(kept) - {version.reference for version in found}
    assert not lost, lost


def check_machine(home: Path) -> list[str]:
    """The alias, Foundry Local and the running servers have the same version of a name, or the next command says so.

    Running servers that follow the store get `FOLLOWS_WITHIN_S`. Returns what the next command says.
    """
    settings = Settings(home=home)
    registry = open_registry(settings)
    check_store(registry)
    told = list(interruptions(home, registry))
    registered = registered_models(settings)
    for name in registry.names():
        champion = registry.alias(name, CHAMPION)
        others = {model.version for model in registered if model.name == name} - {champion}
        says_so = any(f"promotion of {name}@" in sentence for sentence in told)
        assert not others or says_so, (name, champion, others, told)
        deadline = time.monotonic() + FOLLOWS_WITHIN_S
        while served := {server.serves(name) for server in running_servers(home)} - {None, champion}:
            assert time.monotonic() < deadline, (name, champion, served, told)
            time.sleep(0.1)
    return told


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes that were started with a home directory below a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLMOPS_HOME", "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def check_no_orphan(folder: Path, known: Iterable[int] = ()) -> None:
    """No process of a home below `folder` goes on, except those `known` by their number and their children."""
    parents = [psutil.Process(pid) for pid in known]
    spared = {process.pid for parent in parents for process in (parent, *parent.children(recursive=True))}
    orphans = [process for process in processes_of(folder) if process.pid not in spared]
    _, alive = psutil.wait_procs(orphans, timeout=ENDS_WITHIN_S)
    assert not alive, [process.cmdline() for process in alive]
