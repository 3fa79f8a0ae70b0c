"""Memory that a process has freed: its garbage collections, and what it gives back to the system."""

import atexit
import contextlib
import ctypes
import gc
from collections.abc import Iterator


def spare_imports() -> None:
    """Have this process collect garbage more rarely than by default, and not at its exit.

    Imports allocate much and free little: collecting would add a tenth to their time. At its exit the interpreter
    would look at all their objects, for half a second where Prefect is among them.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Collect no garbage within, where a process imports most of what it needs, nor look at that in later collections.

    That is done once in a process: a second time would keep the garbage of what it did before, too.
    """
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def give_memory_back() -> None:
    """Give freed memory back to the system, which glibc keeps; other allocators do not have the function."""
    with contextlib.suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
