"""`gc` on a full disk, and what killed exports, servers and runs leave behind."""

import asyncio
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from slmops.infra.foundry.model_host import ModelHost
from slmops.infra.foundry.server_client import running_servers
from slmops.infra.process.channel import QUIET_ENVIRONMENT
from slmops.infra.server_settings import ServeSettings
from slmops.infra.settings import Settings
from slmops.infra.storage.archive import export_version
from slmops.infra.storage.holders import name_prefix, this_process
from slmops.infra.storage.opening import open_registry
from slmops.tasks.versions.garbage import collect
from slmops.tasks.workshop import Workshop
from tests.support.versions import store_version


def of_an_ended_process() -> str:
    """The beginning of a temporary name of a process that has ended."""
    code = "from slmops.infra.storage.holders import name_prefix; print(name_prefix())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=True,
        env={**os.environ, **QUIET_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture(scope="module")
def ended() -> str:
    return of_an_ended_process()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits the size of files")
def test_a_full_disk_is_made_room_on(settings: Settings, tmp_path: Path) -> None:
    import resource

    registry = open_registry(settings)
    for number in range(3):
        store_version(registry, tmp_path / str(number), {"model.onnx": b"%d" % number})
    # Files without content can be made, and nothing can be written to them: as on a disk without a free block.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "slmops", "gc", "--keep", "1", "--json"],
        env={**os.environ, **QUIET_ENVIRONMENT, "SLMOPS_HOME": str(settings.home_dir)},
        check=False,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, 0)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"] == ["home@1", "home@2"]
    assert [version.number for version in registry.versions("home")] == [3]
    assert sorted(path.name for path in (settings.home_dir / "store" / "aside").iterdir()) == []
    assert not list((settings.home_dir / "store" / "leases").iterdir())


def test_what_killed_processes_left_goes(ended: str, settings: Settings) -> None:
    own = name_prefix()
    gone = [settings.cache_dir / "serving" / f"{ended}home-1-12345678", settings.cache_dir / "work" / f"{ended}abc"]
    gone.append(settings.cache_dir / "inputs" / f".{ended}{'1' * 32}")
    kept = [settings.cache_dir / "serving" / f"{own}home-1-1", settings.cache_dir / "work" / f"{own}abc"]
    kept += [settings.cache_dir / "inputs" / ("a" * 64), settings.cache_dir / "work" / "of-an-older-release"]
    for folder in (*gone, *kept):
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "weights").write_bytes(b"12345")
    serve = settings.home_dir / "serve"
    serve.mkdir()
    for process, name in ((ended.removesuffix("-"), "1.json"), (this_process(), "2.json")):
        record = {"process": process, "url": "http://127.0.0.1:1", "control_token": "t"}
        (serve / name).write_text(json.dumps(record), "utf-8")
    shop = Workshop(settings, open_registry(settings))
    assert collect(shop, keep=None, dry_run=True).cached_bytes == 15
    assert all(folder.is_dir() for folder in gone)
    assert collect(shop, keep=None, dry_run=False).cached_bytes == 15
    assert not any(folder.exists() for folder in gone)
    assert all(folder.is_dir() for folder in kept)
    assert [path.name for path in serve.iterdir()] == ["2.json"]


def test_the_next_command_removes_the_file_of_a_killed_server(ended: str, tmp_path: Path) -> None:
    path = tmp_path / "serve" / "1.json"
    path.parent.mkdir()
    record = {"process": ended.removesuffix("-"), "url": "http://127.0.0.1:1", "control_token": "t"}
    path.write_text(json.dumps(record), "utf-8")
    assert running_servers(tmp_path) == []
    assert not path.exists()


def test_the_next_export_removes_what_a_killed_one_left(ended: str, settings: Settings, tmp_path: Path) -> None:
    registry = open_registry(settings)
    manifest = store_version(registry, tmp_path / "version")
    target = tmp_path / "archives"
    target.mkdir()
    (target / f".{ended}{'1' * 32}.export").write_bytes(b"half")
    others = [target / f".{name_prefix()}{'2' * 32}.export", target / "mine.export"]
    for path in others:
        path.write_bytes(b"")
    export_version(registry, manifest, target / "home.tar")
    assert sorted(target.iterdir()) == sorted([*others, target / "home.tar"])


def test_the_next_server_removes_the_models_of_a_killed_one(ended: str, tmp_path: Path) -> None:
    class NoModels:
        """A store without a champion."""

        def names(self) -> list[str]:
            return []

    for name in (f"{ended}home-1-1", f"{name_prefix()}home-1-1"):
        (tmp_path / "serving" / name / "model").mkdir(parents=True)
    host = ModelHost(NoModels(), ServeSettings(), tmp_path / "serving", tmp_path / "logs")  # type: ignore[arg-type]
    asyncio.run(host.start())
    assert [path.name for path in (tmp_path / "serving").iterdir()] == [f"{name_prefix()}home-1-1"]
