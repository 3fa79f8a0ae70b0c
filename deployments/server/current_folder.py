"""Prefect must read no settings in the current directory, which may be a foreign checkpoint.

By default, Prefect reads `.env`, `prefect.toml` and `pyproject.toml` there. Such a file can name the server that
receives the run's data, or a logging configuration, which can call any function.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "prefect.settings.base"  # has the class that all of Prefect's settings derive from


def read_no_settings_here() -> None:
    """Make Prefect take its settings from the environment only; call this before Prefect is imported."""
    if _MODULE not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds one module as usual, and changes it after it is loaded. Importing Prefect here would cost a second."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _empty_files(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _empty_files(module: ModuleType) -> None:
    settings = module.PrefectBaseSettings
    sources_of = settings.settings_customise_sources.__func__

    def settings_customise_sources(cls: type, /, *given: object, **named: object) -> tuple[Any, ...]:
        sources: tuple[Any, ...] = sources_of(cls, *given, **named)
        for source in sources:  # all of them stay: pydantic warns of one that is left out
            if isinstance(source, module.FilteredDotEnvSettingsSource):
                source.env_vars = {}
            elif isinstance(source, module.PrefectTomlConfigSettingsSource | module.PyprojectTomlConfigSettingsSource):
                source.toml_data = {}
        return sources

    settings.settings_customise_sources = classmethod(settings_customise_sources)
