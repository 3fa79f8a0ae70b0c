"""Import Olive's engine without the parts that no build of slmops uses, because every build waits for the import.

`import olive` also imports all commands of Olive's command line, and Olive's evaluators import torchmetrics, which
brings scipy.signal and matplotlib: together half of that import's time. No evaluator runs in a build, because
tasks/build/olive_config.py ignores those of an Olive configuration. tests/infra/olive/test_engine.py fails when Olive
no longer imports them.
"""

import importlib
import importlib.util
import logging
import sys
from types import ModuleType
from typing import Any


class _NeverUsed(ModuleType):
    """Replaces a library whose names Olive puts into a table at its import."""

    def __getattr__(self, name: str) -> "_NeverUsed":
        if name.startswith("__"):  # Python itself reads these names of a module
            raise AttributeError(name)
        return _NeverUsed(f"{self.__name__}.{name}")


def import_olive_workflows() -> Any:
    """Return the module `olive.workflows`. In this process `import olive` gives a package without its Python API."""
    if "olive" in sys.modules:
        return importlib.import_module("olive.workflows")
    spec = importlib.util.find_spec("olive")
    assert spec
    olive: Any = importlib.util.module_from_spec(spec)
    sys.modules["olive"] = olive
    olive.__version__ = importlib.import_module("olive.version").__version__  # Olive writes its version into models
    _log_as_olive_does()
    stand_in = sys.modules.setdefault("torchmetrics", _NeverUsed("torchmetrics"))
    try:
        return importlib.import_module("olive.workflows")
    finally:
        if isinstance(stand_in, _NeverUsed):
            del sys.modules["torchmetrics"]


def _log_as_olive_does() -> None:
    logger = logging.getLogger("olive")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [%(filename)s:%(lineno)d] %(message)s"))
    logger.addHandler(handler)
