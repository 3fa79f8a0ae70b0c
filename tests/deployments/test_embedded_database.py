"""The embedded API's ready-made database is what Prefect's own migrations make."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from slmops.deployments.server import embedded_database
from slmops.deployments.server.embedded_database import make_database
from tests.prefect_schema import SCHEMA_FILE, migrated_schema


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def statements(schema: str) -> list[list[str]]:
    """The statements, each as its sorted lines: migrations iterate over sets, and constraints come in any order."""
    return [sorted(line.strip(" \t,") for line in one.splitlines()) for one in schema.split(";\n")]


def test_the_schema_is_what_prefect_makes(tmp_path: Path) -> None:
    """When this fails after an upgrade of Prefect: python -m tests.prefect_schema."""
    assert statements(migrated_schema(tmp_path)) == statements(SCHEMA_FILE.read_text("utf-8"))


def test_prefect_finds_nothing_to_migrate(tmp_path: Path) -> None:
    assert make_database(tmp_path / "prefect.db")
    assert statements(migrated_schema(tmp_path)) == statements(SCHEMA_FILE.read_text("utf-8"))
    assert names_in(tmp_path) == ["prefect.db"]


def test_a_database_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "prefect.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE kept (id)")
    assert not make_database(path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("kept",)]


def test_of_commands_that_start_at_once_one_makes_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as commands:
        made = list(commands.map(lambda _: make_database(tmp_path / "prefect.db"), range(8)))
    assert sorted(made) == [False] * 7 + [True]
    assert names_in(tmp_path) == ["prefect.db"]


def test_another_prefect_migrates_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_database, "version", lambda name: "3.8.80")
    assert not make_database(tmp_path / "prefect.db")
    assert names_in(tmp_path) == []
