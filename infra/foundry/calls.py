"""Calls of child processes that use Foundry Local, and their answers.

`cache_dir` is Foundry's cache; everything that the runtime writes is below it.
"""

from typing import Generic, Literal

from pydantic import Field

from slmops.infra.process.call import Call, Progress, R
from slmops.infra.process.endurance import Endure
from slmops.infra.records import AbsolutePath, Record
from slmops.infra.reference.answers import Message


class OnCatalog(Call[R], Generic[R]):
    """A call on a Foundry cache's local catalog."""

    cache_dir: AbsolutePath


class Registered(Record):
    """A registered model; `changed` is false if the id was registered with this folder already."""

    model_id: str
    alias: str
    folder: str
    changed: bool


class Register(OnCatalog[Registered]):
    """Register a model folder. The keys of `metadata` are the SDK's (`display_name`, `description`, `license`, ...)."""

    folder: AbsolutePath
    model_id: str
    metadata: dict[str, str | int] = Field(default_factory=dict)

    def perform(self, progress: Progress) -> Registered:
        """See `slmops.infra.foundry.runtime.register`."""
        from slmops.infra.foundry.runtime import register

        return register(self, progress)


class Unregistered(Record):
    """The id of an unregistered model; `changed` is false if it was not registered before."""

    model_id: str
    changed: bool


class Unregister(OnCatalog[Unregistered]):
    """Take a model out of the local catalog; its folder stays."""

    model_id: str

    def perform(self, progress: Progress) -> Unregistered:
        """See `slmops.infra.foundry.runtime.unregister`."""
        from slmops.infra.foundry.runtime import unregister

        return unregister(self, progress)


class CatalogModel(Record):
    """A model of the local catalog."""

    model_id: str
    alias: str
    name: str
    version: int
    folder: str
    folder_exists: bool
    context_length: int | None


class ListModels(OnCatalog[tuple[CatalogModel, ...]]):
    """List the local catalog, sorted by name and version."""

    def perform(self, progress: Progress) -> tuple[CatalogModel, ...]:
        """See `slmops.infra.foundry.runtime.list_models`."""
        from slmops.infra.foundry.runtime import list_models

        return list_models(self, progress)


class ProvenAnswer(Record):
    """A registered model's greedy answer; `reasoning` is the text between think tags, which `answer` leaves out."""

    model_id: str
    alias: str
    folder: str
    load_ms: float
    answer: str
    reasoning: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    e2e_latency_ms: float


class Prove(OnCatalog[ProvenAnswer]):
    """Find a model by its id, load it and let it answer one conversation, greedily."""

    model_id: str
    messages: tuple[Message, ...]
    max_new_tokens: int

    def perform(self, progress: Progress) -> ProvenAnswer:
        """See `slmops.infra.foundry.runtime.prove`."""
        from slmops.infra.foundry.runtime import prove

        return prove(self, progress)


class RuntimeVersions(Record):
    """The native runtime; the SDK loads onnxruntime and onnxruntime-genai from the installed packages.

    `required` are the exact versions that it was released with. In `installed`, None means that a package is missing.
    """

    sdk: str
    native: str
    required: dict[str, str]
    installed: dict[str, str | None]


class DescribeRuntime(Call[RuntimeVersions]):
    """Load the native runtime and return the versions of its parts."""

    def perform(self, progress: Progress) -> RuntimeVersions:
        """See `slmops.infra.foundry.runtime.runtime_versions`."""
        from slmops.infra.foundry.runtime import runtime_versions

        return runtime_versions()


class CountedPrompt(Record):
    """How many tokens a conversation's prompt has, or the `error` that prevented it.

    `moments` are the local times, ISO 8601, right before and after.
    """

    prompt_tokens: int | None = None
    error: str | None = None
    moments: tuple[str, str]


class CountedPrompts(Record):
    """The prompts that Foundry Local renders from conversations."""

    conversations: dict[str, CountedPrompt]
    versions: dict[str, str]


class CountPrompts(OnCatalog[CountedPrompts]):
    """Count the tokens of conversations' prompts with an unregistered model folder.

    `cache_dir` is empty, and is deleted afterwards.
    """

    model_dir: AbsolutePath
    conversations: dict[str, tuple[Message, ...]]

    def perform(self, progress: Progress) -> CountedPrompts:
        """See `slmops.infra.foundry.templates.count`."""
        from slmops.infra.foundry.templates import count

        return count(self, progress)


class EndureInFoundry(Endure):
    """Load an unregistered model folder, then run the soak and the edge inputs; the journal has the results."""

    def perform(self, progress: Progress) -> None:
        """See `slmops.infra.foundry.endurance.endure`."""
        from slmops.infra.foundry.endurance import endure

        endure(self, progress)
