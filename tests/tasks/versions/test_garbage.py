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


KILLED_AS_IT_WRITES = """
import os, signal, sys
from pathlib import Path
from slmops.infra.files import write_whole

os.fsync = lambda _: os.kill(os.getpid(), signal.SIGTERM)
write_whole(Path(sys.argv[1]), "12345")
"""


def test_what_killed_writers_left_anywhere_in_the_home_goes(ended: str, settings: Settings) -> None:
    home, unique, elsewhere = settings.home_dir, "1" * 32, "0123456789abcdef~1~1-"
    subprocess.run([sys.executable, "-P", "-c", KILLED_AS_IT_WRITES, home / "reports" / "a.html"], check=False)
    (killed,) = (home / "reports").iterdir()
    assert killed.read_bytes() == b"12345"
    gone = [home / "prefect" / f".{ended}{unique}.part", settings.cache_dir / f".{unique}.part"]
    gone.append(home / "serve" / f".{elsewhere}{unique}.part")
    kept = [home / name for name in (f".{name_prefix()}{unique}.part", f".{elsewhere}{unique}.part", ".mine.part")]
    kept.append(home / f".{unique}.part")
    for path in (*gone, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"12345")
    for path in (*gone[1:], kept[0], kept[2]):  # of nobody, of another machine, of this process, and of the user
        os.utime(path, (0, 0))
    half_fetched = settings.cache_dir / "s3" / f".{ended}{unique}.aside"
    (half_fetched / "files").mkdir(parents=True)
    shop = Workshop(settings, open_registry(settings))
    assert collect(shop, keep=None, dry_run=True).cached_bytes == 20
    assert collect(shop, keep=None, dry_run=False).cached_bytes == 20
    assert not any(path.exists() for path in (killed, half_fetched, *gone))
    assert all(path.exists() for path in kept)


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
