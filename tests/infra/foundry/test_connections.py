import asyncio
import errno
import logging

import pytest

from slmops.infra.foundry.connections import RareReports


def test_an_error_of_every_attempt_to_accept_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(RareReports())
        for _ in range(100):
            error = OSError(errno.EMFILE, "Too many open files")
            loop.call_exception_handler({"message": "socket.accept() out of system resource", "exception": error})
        loop.call_exception_handler({"message": "another error"})

    with caplog.at_level(logging.ERROR, "slmops.serve"):
        asyncio.run(fail())
    assert [record.message for record in caplog.records] == ["socket.accept() out of system resource", "another error"]
