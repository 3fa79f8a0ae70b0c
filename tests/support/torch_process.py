"""Child processes that stay: what imports torch takes seconds to start, and its tests only milliseconds to run."""

from typing import Any

from slmops.infra.process.call import Call, ChildResult
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.transformers.calls import RenderConversations


class LastingProcess(ChildProcess):
    """A process that stays for the calls of all tests, whichever call says that it is the last."""

    def close(self) -> None:
        """Stay for the next call."""

    def run(self, call: Call[Any], **options: Any) -> ChildResult[Any]:
        """Perform a call; the process ends by one that crashes only, and starts anew for the next."""
        return super().run(call, **{**options, "is_last": False})


# They start at their first call and end with this process.
TORCH_PROCESS = LastingProcess({"MALLOC_ARENA_MAX": "1"})
STAYING = {
    "slmops.infra.olive.calls": TORCH_PROCESS,
    "slmops.infra.transformers.calls": TORCH_PROCESS,
    "slmops.infra.genai.calls": LastingProcess(),
}
RENDERING = LastingProcess()  # its process can import torch no more


class ProcessThatStays(ChildProcess):
    """A process for calls, which performs those of the runtimes that can open several models in one that stays.

    Foundry Local cannot: it is opened once a process.
    """

    def run(self, call: Call[Any], **options: Any) -> ChildResult[Any]:
        """Perform a call."""
        staying = RENDERING if isinstance(call, RenderConversations) else STAYING.get(type(call).__module__)
        return staying.run(call, **options) if staying else super().run(call, **options)
