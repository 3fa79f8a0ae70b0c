"""Exercise: a variant in long use and on difficult input, in each runtime that may serve it."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from tasks.statistics import Estimate

Runtime = Literal["genai", "foundry"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MemoryGrowth(_Record):
    """Resident memory after each request of a soak, in bytes, and the growth fitted behind the warm-up."""

    rss_bytes: tuple[int, ...]
    warmup_requests: int
    bytes_per_request: Estimate


class EdgeInputOutcome(_Record):
    """What became of one difficult input: an answer, a clean error, or a dead process.

    `detail` is the beginning of the answer or the error. `alive` says whether the runtime answered an ordinary request
    afterwards as it did before. `control_tokens` says whether control tokens that a user typed reached the model as
    such; None for other inputs.
    """

    name: str
    outcome: Literal["answered", "refused", "crashed"]
    detail: str
    prompt_tokens: int | None
    alive: bool
    control_tokens: bool | None = None

    @property
    def handled(self) -> bool:
        """Whether the input ended as it should."""
        return self.outcome != "crashed" and self.alive


class Exercise(_Record):
    """A variant's soak and edge inputs in one runtime; `memory` is None when the soak did not end."""

    runtime: Runtime
    memory: MemoryGrowth | None
    edge_inputs: tuple[EdgeInputOutcome, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    wall_s: FiniteFloat
