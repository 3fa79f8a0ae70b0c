"""A statement that SQLite's lock refuses, in the way in which Prefect's server calls SQLite, and an event's handler."""

import asyncio
import gc
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
from prefect.server.utilities.messaging import Message, memory
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from slmops.deployments.server.sqlite_cursors import (
    PAUSE_S,
    SPREAD,
    close_cursors_of_failed_statements,
    wait_before_events_are_tried_again,
)

INSERT = text("INSERT INTO rows VALUES (1)")


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiosqlite.Cursor, "_execute", aiosqlite.Cursor._execute)  # puts it back
    close_cursors_of_failed_statements()


@asynccontextmanager
async def two_writers(path: Path) -> AsyncIterator[tuple[AsyncConnection, AsyncConnection]]:
    """Two connections; the first one has SQLite's lock, and the second one does not wait for it."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{path}", connect_args={"timeout": 0})
    async with engine.connect() as first, engine.connect() as second:
        await first.execute(text("CREATE TABLE rows (number INTEGER)"))
        await first.commit()
        await first.execute(INSERT)
        yield first, second
    await engine.dispose()


async def open_cursors(path: Path) -> list[sqlite3.Cursor]:
    """The cursors of a connection that are open after one of its statements failed."""
    async with two_writers(path) as (_, second):
        driver: Any = (await second.get_raw_connection()).driver_connection
        with pytest.raises(OperationalError, match="database is locked"):
            await second.execute(INSERT)
        await second.rollback()
        found = [one for one in gc.get_objects() if type(one) is sqlite3.Cursor and one.connection is driver._conn]
        return [cursor for cursor in found if not is_closed(cursor)]


def is_closed(cursor: sqlite3.Cursor) -> bool:
    try:
        cursor.fetchone()
    except sqlite3.ProgrammingError as error:
        return "closed cursor" in str(error)
    return False


def test_the_cursor_of_a_failed_statement_is_closed(mended: None, tmp_path: Path) -> None:
    assert asyncio.run(open_cursors(tmp_path / "database")) == []


def test_the_mend_is_needed(tmp_path: Path) -> None:
    assert asyncio.run(open_cursors(tmp_path / "database")), "sqlite_cursors.py can go"


async def wait_for_the_lock(path: Path) -> None:
    """Wait in one connection for the lock of another, after a failed statement whose error is garbage."""
    async with two_writers(path) as (first, second):
        try:
            await second.execute(INSERT)
        except OperationalError as error:
            garbage: list[object] = [error]
            garbage.append(garbage)
        await second.rollback()
        await second.execute(text("PRAGMA busy_timeout = 20000"))
        waiting = asyncio.create_task(second.execute(INSERT))
        await asyncio.sleep(0.2)  # its thread has begun to wait, where the machine is not busy
        del garbage
        gc.collect()
        await first.commit()
        await waiting


def test_the_event_loop_does_not_wait_for_the_lock_that_its_own_request_has(mended: None, tmp_path: Path) -> None:
    asyncio.run(wait_for_the_lock(tmp_path / "database"))


# A little less than the three waits take at least. Prefect alone ends its tries within milliseconds.
LOCKED_S = 0.9 * (1 + 2 + 4) * PAUSE_S * SPREAD[0]


async def handled_while_locked() -> bool:
    """Publish an event while SQLite is locked for a moment, and tell whether it was handled in the end."""
    consumer = memory.Consumer("of this test", concurrency=1)
    is_free, ended = asyncio.Event(), asyncio.Event()

    async def insert(message: Message) -> None:
        asyncio.get_running_loop().call_later(LOCKED_S, is_free.set)
        if not is_free.is_set():
            raise sqlite3.OperationalError("database is locked")
        ended.set()

    async def drop(message: memory.MemoryMessage) -> None:
        ended.set()

    consumer.subscription.send_to_dead_letter_queue = drop  # type: ignore[method-assign]
    await consumer.topic.publish(memory.MemoryMessage(b"", {}))
    running = asyncio.create_task(consumer.run(insert))
    await ended.wait()
    running.cancel()
    await consumer.cleanup()
    return is_free.is_set()


def test_an_event_is_tried_again_when_the_lock_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asyncio.run(handled_while_locked()), "wait_before_events_are_tried_again can go"
    monkeypatch.setattr(memory.Subscription, "retry", memory.Subscription.retry)  # puts it back
    wait_before_events_are_tried_again()
    assert asyncio.run(handled_while_locked())
