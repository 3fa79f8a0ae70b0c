"""The progress of a long pass, reported from within Olive, which has no progress reports."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from slmops.infra.process.call import Progress

_listener: ContextVar[Progress | None] = ContextVar("listener", default=None)


def report_step(share: float, what: str) -> None:
    """Report that a share of the work, 0 to 1, is done; nothing happens without a listener."""
    listener = _listener.get()
    if listener:
        listener(share, 2, what)  # the first half of a build: see `slmops.infra.olive.engine.build`


@contextmanager
def listening_to_steps(listener: Progress) -> Iterator[None]:
    """Pass reports to a listener."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
