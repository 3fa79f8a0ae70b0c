"""Bodies of requests from clients, which are read up to a limit and until a deadline."""

import asyncio

from starlette.requests import Request


class TooLarge(Exception):
    """A request's body is larger than the limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request has more than {limit_bytes:,} bytes.")


class TooSlow(Exception):
    """A request's body did not arrive before the deadline."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(f"The request's body did not arrive within {deadline_s:g} s.")


async def bounded_body(request: Request, limit_bytes: int, deadline_s: float) -> bytes:
    """Return a request's body; raises `TooLarge` as soon as the limit is exceeded, and `TooSlow`."""
    body = bytearray()
    try:
        async with asyncio.timeout(deadline_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit_bytes:
                    raise TooLarge(limit_bytes)
    except TimeoutError:
        raise TooSlow(deadline_s) from None
    return bytes(body)
