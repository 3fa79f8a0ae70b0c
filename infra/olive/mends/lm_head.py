"""The builder takes every linear layer with as many outputs as the vocabulary has tokens for lm_head."""

from collections.abc import Iterator
from contextlib import contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Take the model's own lm_head for it."""
    base = next(kind for kind in builder.LlamaModel.__mro__ if "has_lm_head" in vars(kind))
    looks_like_it = base.has_lm_head

    def is_lm_head(self: Untyped, module: Untyped) -> bool:
        own = getattr(self.weights, "lm_head", None)
        return bool(looks_like_it(self, module)) if own is None else module is own

    with replaced(base, "has_lm_head", is_lm_head):
        yield
