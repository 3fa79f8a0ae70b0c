"""The embedded Prefect API's database, ready-made: migrating a new one takes Prefect 10 s of computing.

`prefect_schema.sql` holds what these migrations lead to, for the version of Prefect in its first line; with any other
version Prefect migrates by itself. `python -m tests.prefect_schema` writes it anew, and a test compares it with what
Prefect makes.
"""

import contextlib
import os
import sqlite3
import uuid
from contextlib import closing
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path


def make_database(path: Path) -> bool:
    """Write an empty database for the installed Prefect, unless there is one; returns whether it was written."""
    if path.exists():
        return False
    schema = files("slmops.deployments.server").joinpath("prefect_schema.sql").read_text("utf-8")
    if not schema.startswith(first_line(version("prefect"))):
        return False
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with closing(sqlite3.connect(aside)) as database:
            database.executescript(schema)
        with contextlib.suppress(OSError):  # another command was first, or no links here: then Prefect migrates
            os.link(aside, path)
            return True
        return False
    finally:
        aside.unlink(missing_ok=True)


def first_line(prefect_version: str) -> str:
    """Return the line that a schema for a version of Prefect starts with."""
    return f"-- Prefect {prefect_version}\n"
