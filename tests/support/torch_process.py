"""A child process that stays: what imports torch takes seconds to start, and its tests only milliseconds to run."""

from typing import Any

from slmops.infra.process.call import Call, ChildResult
from slmops.infra.process.supervisor import ChildProcess


class LastingProcess(ChildProcess):
    """A process that stays for the calls of all tests, whichever call says that it is the last."""

    def __exit__(self, *error: object) -> None:
        """Stay for the next call."""

    def run(self, call: Call[Any], **options: Any) -> ChildResult[Any]:
        """Perform a call; the process ends by one that fails only, and starts anew for the next."""
        return super().run(call, **{**options, "is_last": False})


# It starts at its first call and ends with this process.
TORCH_PROCESS = LastingProcess({"MALLOC_ARENA_MAX": "1"})
IMPORT_TORCH = ("slmops.infra.olive.", "slmops.infra.transformers.")


class TorchStays(ChildProcess):
    """A process for calls, of which those that import torch are performed in the one that stays."""

    def run(self, call: Call[Any], **options: Any) -> ChildResult[Any]:
        """Perform a call."""
        if call.target().startswith(IMPORT_TORCH):
            return TORCH_PROCESS.run(call, **options)
        return super().run(call, **options)
