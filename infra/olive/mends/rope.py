"""Rotary embeddings that are stretched: `yarn`, and `linear` in Llama and its kin.

The builder leaves the ends of yarn's ramp unrounded, where transformers rounds them unless config.json says otherwise.
Its Llama knows `llama3` alone and silently leaves every other stretching out.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Take yarn's frequencies from transformers, and have Llama read what every other model reads."""
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
