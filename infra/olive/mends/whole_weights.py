"""What the builder computes of a weight in the checkpoint's own type, in which bfloat16 loses up to eight bits of it.

Gemma, Nemotron and Qwen3.5 multiply by the norm's weight plus one; Qwen3.5's decay is the exponential of a weight. The
builder also reads a norm's epsilon from `rms_norm_eps` only, and takes 1e-6 for Nemotron's 1e-5.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Have these weights in float32 as soon as they are loaded, and Nemotron's epsilon where it is read."""
    if config.model_type == "nemotron":
        config.rms_norm_eps = config.norm_eps
    base = next(kind for kind in builder.LlamaModel.__mro__ if "load_weights" in vars(kind))
    load = base.load_weights

    def load_whole(self: Untyped, input_path: str) -> Untyped:
        model = load(self, input_path)
        if self.layernorm_attrs["add_offset"] and self.quant_type is None:
            for module in model.modules():
                if "norm" in type(module).__name__.lower():
                    module.float()
                if hasattr(module, "A_log"):
                    module.A_log.data = module.A_log.data.float()
        return model

    with replaced(base, "load_weights", load_whole):
        yield
