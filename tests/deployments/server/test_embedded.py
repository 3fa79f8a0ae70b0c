"""The embedded server's start, and its answers."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

from slmops.deployments.server.embedded import LOOPBACK
from slmops.deployments.server.listening import listen


def test_an_answer_is_sent_without_waiting_for_the_client_to_acknowledge_its_header() -> None:
    with_delay = []

    async def answer_one() -> None:
        answered = asyncio.Event()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            with_delay.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0)
            writer.close()
            answered.set()

        listener = listen(LOOPBACK, 0)
        async with await asyncio.start_server(answer, sock=listener):
            with socket.create_connection(listener.getsockname()):
                await answered.wait()

    asyncio.run(answer_one())
    assert with_delay == [False]


def test_what_the_server_has_imported_is_left_out_of_the_collection_with_which_prefect_makes_its_api(
    tmp_path: Path,
) -> None:
    program = """
import gc, sys
gc.collect = lambda: print("left out:", gc.get_freeze_count(), file=sys.stderr, flush=True)
from slmops.deployments.server.embedded import main
main()
"""
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=pipe, stderr=pipe, text=True
    ) as server:
        assert server.stdin
        assert server.stderr
        try:
            left_out = next(line for line in server.stderr if line.startswith("left out:"))
        finally:
            server.stdin.close()  # which ends it
    assert int(left_out.partition(":")[2]) > 100_000
