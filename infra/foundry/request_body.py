"""Bodies of requests from unknown clients, which are read up to a limit."""

from starlette.requests import Request


class TooLarge(Exception):
    """A request's body is larger than the limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The request has more than {limit_bytes:,} bytes.")


async def bounded_body(request: Request, limit_bytes: int) -> bytes:
    """Return a request's body; raises `TooLarge` as soon as the limit is exceeded."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            raise TooLarge(limit_bytes)
    return bytes(body)
