"""Prefect's server on SQLite, without the standstill and the lost events that a failed statement leaves behind.

SQLAlchemy leaves the cursor of a failed statement open, and Python's garbage collector closes it later, in the thread
of the event loop. If its connection waits for SQLite's lock just then, so does the event loop, also with the request
that has the lock: the server answers nothing until SQLite gives up the wait, after 60 s. On a busy machine statements
fail often, because Prefect's transactions read before they write. Here such a cursor is closed in its connection's
thread, at once. Where the statement was an automation's, Prefect tries the event three times more, all within some
milliseconds, in which the lock is as busy, and then drops it, with the notice or the deploy that it stood for. Here it
waits before each try.

tests/deployments/server/test_sqlite_cursors.py tells when SQLAlchemy or aiosqlite and Prefect do both, and this module
can go.
"""

import asyncio
import random
from typing import TYPE_CHECKING, Any

from slmops.infra.process.garbage import spare_imports

if TYPE_CHECKING:
    from prefect.server.utilities.messaging.memory import MemoryMessage

# Before an event's first further try; each later one waits twice as long. Chance parts handlers that collided.
PAUSE_S = 0.25
SPREAD = (0.5, 1.5)


def mend_server_on_sqlite() -> None:
    """Mend Prefect's server in this process, before it runs."""
    close_cursors_of_failed_statements()
    wait_before_events_are_tried_again()


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


def wait_before_events_are_tried_again() -> None:
    """Have Prefect's event handlers, in this process, wait before they try an event again."""
    from prefect.server.utilities.messaging.memory import Subscription

    retry = Subscription.retry

    async def wait_and_retry(self: Subscription, message: "MemoryMessage") -> None:
        await asyncio.sleep(PAUSE_S * 2**message.retry_count * random.uniform(*SPREAD))  # noqa: S311
        await retry(self, message)

    Subscription.retry = wait_and_retry  # type: ignore[method-assign]


def main() -> None:
    """Run Prefect's command line: `python -m slmops.deployments.server.sqlite_cursors server start`."""
    spare_imports()
    from prefect.cli import app

    mend_server_on_sqlite()
    app()


if __name__ == "__main__":
    main()
