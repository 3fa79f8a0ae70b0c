"""Write `deployments/server/prefect_schema.sql` for the installed Prefect: `python -m tests.prefect_schema`."""

import os
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

from slmops.deployments.server.embedded_database import first_line

SCHEMA_FILE = Path(__file__).resolve().parents[1] / "deployments" / "server" / "prefect_schema.sql"


def migrated_schema(folder: Path) -> str:
    """Have Prefect migrate a new database in a folder, and return its content as SQL."""
    environment = {**os.environ, "PREFECT_HOME": str(folder), "DO_NOT_TRACK": "1"}
    environment.pop("PREFECT_SERVER_DATABASE_CONNECTION_URL", None)
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    with closing(sqlite3.connect(folder / "prefect.db")) as database:
        made = database.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY type <> 'table', name")
        statements = [statement for (statement,) in made]
        ((revision,),) = database.execute("SELECT version_num FROM alembic_version")
        rows = sum(database.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0] for name in _tables(database))
    assert rows == 1, "migrations write rows now: the schema alone is not enough"
    statements.append(f"INSERT INTO alembic_version VALUES ('{revision}')")
    lines = ["BEGIN;", *(f"{statement};" for statement in statements), "COMMIT;"]
    lines = [line.rstrip() for line in "\n".join(lines).splitlines()]
    return first_line(version("prefect")) + "\n".join(lines) + "\n"


def _tables(database: sqlite3.Connection) -> list[str]:
    return [name for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        SCHEMA_FILE.write_text(migrated_schema(Path(name)), "utf-8")
