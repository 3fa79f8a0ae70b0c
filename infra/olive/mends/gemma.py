"""Gemma's embedding is multiplied by the square root of its width, and Gemma 3 has two rotary embeddings.

The builder rounds the square root to two decimals. It reads the two rotary embeddings from keys that transformers 5
does not write, and scales both of them, although only that of the full-attention layers is scaled (4B and up).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Set the exact factor, the keys that the builder reads, and the scaling of each rotary embedding."""
    if config.model_type not in ("gemma", "gemma2", "gemma3_text"):
        yield
        return
    with ExitStack() as patches:
        patches.enter_context(replaced(builder.GemmaModel, "__init__", _with_exact_factor(builder.GemmaModel)))
        if config.model_type == "gemma3_text":
            _flatten_rope(config)
            rotary = _with_unstretched_local_caches(builder.Gemma3Model)
            patches.enter_context(replaced(builder.Gemma3Model, "make_rotary_embedding_caches_from_scratch", rotary))
        yield


def _with_exact_factor(model_class: Untyped) -> Untyped:
    initialize = model_class.__init__

    def __init__(self: Untyped, *arguments: Untyped) -> None:  # noqa: N807
        initialize(self, *arguments)
        self.embed_attrs["scale"] = float(self.hidden_size**0.5)

    return __init__


def _flatten_rope(config: Untyped) -> None:
    by_kind = config.rope_parameters
    config.rope_theta = by_kind["full_attention"]["rope_theta"]
    config.rope_local_base_freq = by_kind["sliding_attention"]["rope_theta"]
    config.rope_parameters = dict(by_kind["full_attention"])


def _with_unstretched_local_caches(model_class: Untyped) -> Untyped:
    make = model_class.make_rotary_embedding_caches_from_scratch

    def make_caches(self: Untyped) -> Untyped:
        if hasattr(self, "cos_cache_local_name"):  # set after the global caches are made and before the local ones
            self.rope_attrs["rescale_factors"] = 1
        return make(self)

    return make_caches
