"""The embedded Prefect API's database. Prefect needs seconds to make an empty one, so it is copied.

The first start with a version of Prefect makes the database by Prefect's own migrations, and keeps a copy in the user's
cache. Starts with other home directories use that copy.
"""

import asyncio
import contextlib
import os
import sqlite3
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops.infra.files import write_whole
from slmops.infra.storage.leftovers import made_aside

_FOR_THE_USER_ALONE = 0o600  # it will hold secrets


def make_database(path: Path, templates: Path) -> bool:
    """Write an empty database for the installed Prefect, unless there is one; returns whether it was written.

    It is a copy of the one in the folder `templates`, which is made where it is missing or damaged. If it cannot be
    written, for example on a full disk, Prefect migrates by itself, and standard error says why.
    """
    if path.exists():
        return False
    template = templates / f"prefect-{version('prefect')}.db"
    try:
        if not _is_whole(template):
            _make_template(template)
        return _copy(template, path)
    except OSError as error:
        sys.stderr.write(f"The database is not copied from {template}: {error}\n")
        return False


def _is_whole(template: Path) -> bool:
    if not template.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{template.absolute().as_uri()}?mode=ro", uri=True)) as database:
            return bool(
                database.execute("PRAGMA quick_check").fetchone() == ("ok",)
                and database.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)
            )
    except sqlite3.DatabaseError:
        return False


def _make_template(template: Path) -> None:
    with TemporaryDirectory() as folder:
        migrated, compact = Path(folder) / "migrated.db", Path(folder) / "compact.db"
        asyncio.run(_migrate(migrated))
        with closing(sqlite3.connect(migrated)) as database:
            database.execute("VACUUM INTO ?", (str(compact),))  # one file without a journal
        write_whole(template, compact.read_bytes(), mode=_FOR_THE_USER_ALONE)


async def _migrate(path: Path) -> None:
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import provide_database_interface, temporary_database_config

    configuration = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{path}")
    with temporary_database_config(configuration):
        database = provide_database_interface()
        await database.create_db()
        await (await database.engine()).dispose()


def _copy(template: Path, path: Path) -> bool:
    with made_aside(path) as aside:
        aside.touch(_FOR_THE_USER_ALONE)
        aside.write_bytes(template.read_bytes())
        with contextlib.suppress(OSError):  # another command was first, or links are impossible
            os.link(aside, path)
            return True
        return False
