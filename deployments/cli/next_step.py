"""What to do next in this home, for `slmops` without a command."""

from typing import TYPE_CHECKING

from slmops.deployments.cli.running import the_registry
from slmops.infra.errors import SlmopsError

if TYPE_CHECKING:
    from slmops.infra.storage.registry import ModelRegistry


def next_step() -> str:
    """Return a sentence with a command that fits what the store has."""
    try:
        return _fitting(the_registry())
    except (SlmopsError, OSError):
        return "The store cannot be read; this says why: slmops check"


def _fitting(registry: "ModelRegistry") -> str:
    names = registry.names()
    if not names:
        return "The store is empty. Begin with: slmops demo, or: slmops deploy ./my-model --name NAME"
    for name in names:
        aliases = registry.aliases(name)
        champion, candidate = aliases.get("champion"), aliases.get("candidate")
        if champion is None:
            return f"{name} has no champion yet. See why: slmops show {name}"
        if candidate is not None and candidate > champion:
            return f"{name}@{candidate} is a candidate. Compare: slmops diff {name}@{champion} {name}@{candidate}"
    return f"Talk to a model: slmops chat {names[0]}. Serve all: slmops serve"
