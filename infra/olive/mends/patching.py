"""Replace an attribute of a class or module temporarily."""

from collections.abc import Iterator
from contextlib import contextmanager

from slmops.infra.records import Untyped


@contextmanager
def replaced(owner: Untyped, name: str, value: Untyped) -> Iterator[None]:
    """Set `owner.NAME` to a value in this context, and restore the former value at its end."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
