"""The embedded server's answers."""

import asyncio
import socket

from slmops.deployments.server.embedded import loopback_listener


def test_an_answer_is_sent_without_waiting_for_the_client_to_acknowledge_its_header() -> None:
    with_delay = []

    async def answer_one() -> None:
        answered = asyncio.Event()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            with_delay.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0)
            writer.close()
            answered.set()

        listener = loopback_listener()
        async with await asyncio.start_server(answer, sock=listener):
            with socket.create_connection(listener.getsockname()):
                await answered.wait()

    asyncio.run(answer_one())
    assert with_delay == [False]
