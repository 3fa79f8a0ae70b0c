"""SmolLM3 has layers without rotary embedding.

The builder only moves the rotation out of these layers' attention operator, and fails on the input that it has already
removed; the checkpoint's layers have no rotation at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Do not change layers without rotation."""
    base = builder.SmolLM3Model.make_attention_qk_rope

    def rotate(self: Untyped, layer_id: int, **kwargs: object) -> tuple[str, str]:
        if not self.no_rope_layers[layer_id]:
            return "", ""
        caches: tuple[str, str] = base(self, layer_id, **kwargs)
        return caches

    with replaced(builder.SmolLM3Model, "make_attention_qk_rope", rotate):
        yield
