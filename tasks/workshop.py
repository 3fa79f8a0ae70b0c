"""The workshop: a run's settings, registry and child process, available in every stage without parameters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from typing import ParamSpec, TypeVar

from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import Settings, load_settings
from slmops.infra.storage.opening import open_registry
from slmops.infra.storage.registry import ModelRegistry

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Workshop:
    """A run's settings, registry, and the child process for all work that imports torch.

    With `torch_child` None, each call has its own process.
    """

    settings: Settings
    registry: ModelRegistry
    torch_child: ChildProcess | None = None

    @property
    def torch(self) -> ChildProcess:
        """The process for work that imports torch, in a workshop that has one."""
        assert self.torch_child, "this workshop has no torch process"
        return self.torch_child

    def end_torch(self) -> None:
        """End the process for work that imports torch, which keeps half a gigabyte; the next such work starts one."""
        if self.torch_child:
            self.torch_child.close()

    @property
    def build_pool(self) -> str | None:
        """The work pool whose workers build; None: variants are built here."""
        return self.settings.worker.pool

    @property
    def measure_pool(self) -> str | None:
        """The work pool whose workers measure; None: variants are measured here."""
        return self.build_pool and (self.settings.worker.measure_pool or self.build_pool)


_current: ContextVar[Workshop] = ContextVar("workshop")


def workshop() -> Workshop:
    """Return the workshop of the current run; raises `LookupError` outside of a run."""
    return _current.get()


@contextmanager
def working_in(shop: Workshop) -> Iterator[Workshop]:
    """Make `workshop` return this one in this thread and in the stages that the thread calls."""
    token = _current.set(shop)
    try:
        yield shop
    finally:
        _current.reset(token)


@contextmanager
def working_by(settings: Settings) -> Iterator[Workshop]:
    """Work by other settings within this context."""
    with working_in(replace(workshop(), settings=settings)) as shop:
        yield shop


@contextmanager
def working_with(registry: ModelRegistry) -> Iterator[Workshop]:
    """Work with another registry within this context."""
    with working_in(replace(workshop(), registry=registry)) as shop:
        yield shop


def in_workshop(flow_function: Callable[P, R]) -> Callable[P, R]:
    """Open a workshop for each run of a flow's function, by the settings of its process's environment.

    A run raises `BadInput` for settings that are not valid. A context manager as decorator would not work, because it
    holds a generator, and Prefect pickles the flows that it serves.
    """

    @wraps(flow_function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        settings = load_settings()
        with torch_process(settings) as child, working_in(Workshop(settings, open_registry(settings), child)):
            return flow_function(*args, **kwargs)

    return inside


def torch_process(settings: Settings) -> ChildProcess:
    """Return a process, as a context manager, for a run's work that imports torch: builds, references, templates.

    It starts at its first call.
    """
    environment = {
        # matplotlib, which some of Olive's passes import, keeps a cache of fonts in the user's home otherwise.
        "MPLCONFIGDIR": str(settings.cache_dir / "matplotlib"),
        # With one arena per writing thread, glibc would keep 50 MB more after every build.
        "MALLOC_ARENA_MAX": "1",
    }
    return ChildProcess(environment)
