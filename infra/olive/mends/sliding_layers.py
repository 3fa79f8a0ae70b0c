"""Mistral and Phi-3 have only `sliding_window`: every layer uses sliding attention.

The builder treats layers without a type as full attention, and the model is wrong beyond the window.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Set the missing `layer_types`."""
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    yield
