"""Garbage collections of a process whose objects are imported modules for the most part."""

import atexit
import gc


def spare_imports() -> None:
    """Have this process collect garbage more rarely than by default, and not at its exit.

    Imports allocate much and free little: collecting would add a tenth to their time. At its exit the interpreter
    would look at all their objects, for half a second where Prefect is among them.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
