"""The embedded API's database: made by Prefect's own migrations once, and copied from the user's cache after that."""

import os
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import pytest

from slmops.deployments.server import embedded_database
from slmops.deployments.server.embedded_database import make_database

pytestmark = pytest.mark.runtime

TEMPLATE = f"prefect-{version('prefect')}.db"


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache after a first start; read only."""
    folder = tmp_path_factory.mktemp("first")
    assert make_database(folder / "prefect.db", folder / "cache" / "slmops")
    return folder / "cache" / "slmops"


@pytest.fixture
def no_migration(monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration fails here."""
    monkeypatch.setattr(embedded_database, "_migrate", None)


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def content_of(path: Path) -> list[list[str]]:
    """The statements, each as its sorted lines: migrations iterate over sets, and these come in any order."""
    with closing(sqlite3.connect(path)) as database:
        return sorted(
            sorted(line.strip(" \t,") for line in statement.splitlines()) for statement in database.iterdump()
        )


def test_prefect_finds_nothing_to_migrate(templates: Path, no_migration: None, tmp_path: Path) -> None:
    path = tmp_path / "prefect.db"
    assert make_database(path, templates)
    before = content_of(path)
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert content_of(path) == before
    assert names_in(tmp_path) == ["prefect.db"]
    rows = [lines for lines in before if lines[0].startswith("INSERT")]
    assert len(rows) == 1, "a migration writes rows: each home directory would have the same"


def test_the_first_start_leaves_one_file_which_only_its_user_reads(templates: Path) -> None:
    assert names_in(templates) == [TEMPLATE]
    if os.name == "posix":
        for path in (templates / TEMPLATE, templates.parents[1] / "prefect.db"):
            assert path.stat().st_mode & 0o777 == 0o600


def test_an_existing_database_stays(templates: Path, no_migration: None, tmp_path: Path) -> None:
    path = tmp_path / "prefect.db"
    path.write_bytes(b"kept")
    assert not make_database(path, templates)
    assert path.read_bytes() == b"kept"


def test_of_commands_that_start_at_once_one_makes_it(templates: Path, no_migration: None, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as commands:
        made = list(commands.map(lambda _: make_database(tmp_path / "prefect.db", templates), range(8)))
    assert sorted(made) == [False] * 7 + [True]
    assert names_in(tmp_path) == ["prefect.db"]


@pytest.mark.parametrize("content", [b"", b"no database", b"SQLite format 3\0", "cut off"])
def test_a_damaged_template_is_made_again(content: bytes | str, templates: Path, tmp_path: Path) -> None:
    template = tmp_path / "damaged.db"
    whole = (templates / TEMPLATE).read_bytes()
    assert embedded_database._is_whole(templates / TEMPLATE)
    template.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    assert not embedded_database._is_whole(template)


def test_neither_a_damaged_template_nor_one_of_another_prefect_is_taken(templates: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "prefect-3.0.0.db").write_bytes((templates / TEMPLATE).read_bytes())
    (cache / TEMPLATE).write_bytes(b"SQLite format 3\0")
    assert make_database(tmp_path / "prefect.db", cache)
    assert content_of(tmp_path / "prefect.db") == content_of(cache / TEMPLATE) == content_of(templates / TEMPLATE)


def test_where_the_cache_takes_nothing_prefect_migrates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert not make_database(tmp_path / "prefect.db", tmp_path / "file" / "cache")
    assert names_in(tmp_path) == ["file"]
    assert "is not copied" in capfd.readouterr().err
