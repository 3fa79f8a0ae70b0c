"""Scaled rotary embeddings: `yarn`, and `linear` in models that the builder's Llama class builds.

The builder does not round the ends of yarn's ramp; transformers rounds them unless config.json disables it. Its Llama
class supports only `llama3` and silently ignores any other scaling.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Take yarn's frequencies from transformers, and let Llama read the same fields as every other model."""
    base = next(kind for kind in builder.LlamaModel.__mro__ if "make_inv_freq_rescaled_with_ntk" in vars(kind))
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    with ExitStack() as patches:
        if rope_type == "yarn":
            rescale = _rescaling_of(config)
            patches.enter_context(replaced(base, "make_inv_freq_rescaled_with_ntk", rescale))
        if rope_type in ("yarn", "linear"):
            patches.enter_context(replaced(builder.LlamaModel, "make_rope_init", base.make_rope_init))
        yield


def _rescaling_of(config: Untyped) -> Untyped:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")

    def rescale(self: Untyped, inv_freq: Untyped) -> Untyped:
        self.rope_attrs["mscale"] = factor
        return frequencies

    return rescale
