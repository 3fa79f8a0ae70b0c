"""Template parity: the same conversation is the same tokens in transformers, in genai and in Foundry Local."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParityMismatch(_Record):
    """A conversation that a runtime renders or counts otherwise than transformers with the checkpoint's tokenizer."""

    conversation: str
    runtime: Literal["genai", "foundry"]
    expected: str
    found: str
    expected_tokens: int
    found_tokens: int


class TemplateParity(_Record):
    """The comparison over a set of conversations; `notes` are what is told but is no reason to reject.

    `broken_control_tokens` are tokens of the checkpoint's vocabulary that a runtime does not know as that one token.
    """

    conversations: int
    mismatches: tuple[ParityMismatch, ...]
    broken_control_tokens: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether all runtimes agree."""
        return not self.mismatches and not self.broken_control_tokens
