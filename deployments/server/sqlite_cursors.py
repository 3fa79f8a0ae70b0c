"""Prefect's server on SQLite, without the standstill of a minute that a failed statement leaves behind.

SQLAlchemy leaves the cursor of a failed statement open, and Python's garbage collector closes it later, in the thread
of the event loop. If its connection waits for SQLite's lock just then, so does the event loop, also with the request
that has the lock: the server answers nothing until SQLite gives up the wait, after 60 s. On a busy machine statements
fail often, because Prefect's transactions read before they write. Here such a cursor is closed in its connection's
thread, at once.

tests/deployments/server/test_sqlite_cursors.py tells when SQLAlchemy or aiosqlite does it, and this module can go.
"""

from typing import Any

from slmops.infra.process.garbage import spare_imports


def close_cursors_of_failed_statements() -> None:
    """Have aiosqlite, in this process, close the cursor of each statement that fails or is cancelled."""
    from aiosqlite import Cursor

    execute: Any = Cursor._execute

    async def execute_or_close(self: Cursor, fn: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await execute(self, fn, *args, **kwargs)
        except BaseException:
            self._conn._tx.put_nowait((None, self._cursor.close))  # before the connection's next statement
            raise

    Cursor._execute = execute_or_close  # type: ignore[method-assign]


def main() -> None:
    """Run Prefect's command line: `python -m slmops.deployments.server.sqlite_cursors server start`."""
    spare_imports()
    from prefect.cli import app

    close_cursors_of_failed_statements()
    app()


if __name__ == "__main__":
    main()
