"""Phi-3's `longrope`: the builder reads its name from the key `type`, which newer configs write as `rope_type` only."""

from collections.abc import Iterator
from contextlib import contextmanager

from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Set the older key."""
    rope = getattr(config, "rope_parameters", None)
    if config.model_type == "phi3" and isinstance(rope, dict) and rope.get("rope_type") == "longrope":
        rope.setdefault("type", "longrope")
    yield
