"""The workshop: what a run works with, at hand in every stage without being handed on."""

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
    """What a run works with: the settings, the registry, and the process for all of it that imports torch.

    `torch_child` None is a process of its own for each call.
    """

    settings: Settings
    registry: ModelRegistry
    torch_child: ChildProcess | None = None

    @property
    def torch(self) -> ChildProcess:
        """The process for what imports torch, where there must be one."""
        assert self.torch_child, "this workshop has no torch process"
        return self.torch_child

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
    """Return the workshop of the run that calls this; raises `LookupError` outside of one."""
    return _current.get()


@contextmanager
def working_in(shop: Workshop) -> Iterator[Workshop]:
    """Have `workshop` return this one, in this thread and in the stages that it calls."""
    token = _current.set(shop)
    try:
        yield shop
    finally:
        _current.reset(token)


@contextmanager
def working_with(registry: ModelRegistry) -> Iterator[Workshop]:
    """Work with another registry for a while."""
    with working_in(replace(workshop(), registry=registry)) as shop:
        yield shop


def in_workshop(flow_function: Callable[P, R]) -> Callable[P, R]:
    """Open a workshop for each run of a flow's function, by the settings of its process's environment.

    A run raises `BadInput` for settings that are not valid. A context manager that decorates would not do: it holds a
    generator, and Prefect pickles a flow that it serves.
    """

    @wraps(flow_function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        settings = load_settings()
        with torch_process(settings) as child, working_in(Workshop(settings, open_registry(settings), child)):
            return flow_function(*args, **kwargs)

    return inside


def torch_process(settings: Settings) -> ChildProcess:
    """Return a process, as a context manager, for all of a run that imports torch: builds, references, templates.

    It starts at its first call.
    """
    environment = {
        # matplotlib, which some of Olive's passes import, keeps a cache of fonts in the user's home otherwise.
        "MPLCONFIGDIR": str(settings.cache_dir / "matplotlib"),
        # With an arena for each thread that writes a model, glibc kept 50 MB more after every build.
        "MALLOC_ARENA_MAX": "1",
    }
    return ChildProcess(environment)
