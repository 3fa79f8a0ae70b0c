"""Values that the builder computes from weights in the checkpoint's dtype; in bfloat16 they lose up to eight bits.

Gemma, Nemotron and Qwen3.5 multiply by the norm's weight plus one; Qwen3.5's decay is the exponential of a weight. The
builder also reads a norm's epsilon from `rms_norm_eps` only, and uses 1e-6 instead of Nemotron's 1e-5.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Convert these weights to float32 after loading, and provide Nemotron's epsilon under the key that is read."""
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
