"""The builder supports Qwen3.5 and Ministral 3 only as multi-modal models, of which it builds the text part.

A text model is passed to it under the multi-modal name, and its weights are loaded as a text model.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from slmops.infra.olive.mends.patching import replaced
from slmops.infra.records import Untyped


@contextmanager
def mended(builder: Untyped, config: Untyped) -> Iterator[None]:
    """Rename the architecture, and keep the builder from loading a multi-modal model."""
    architecture = config.architectures[0]
    with ExitStack() as patches:
        if architecture == "Qwen3_5ForCausalLM":
            config.architectures = ["Qwen3_5ForConditionalGeneration"]
            config.mtp_num_hidden_layers = 0  # the drafting head is not part of the text model
        if architecture == "Ministral3ForCausalLM":
            config.architectures = ["Mistral3ForConditionalGeneration"]
            config.max_position_embeddings = context_length(config)
            patches.enter_context(replaced(builder.Mistral3TextModel, "load_weights", _load_text_model))
        yield


def context_length(config: Untyped) -> int:
    """Return the number of positions for which a built model is correct.

    Ministral 3 scales its queries by their position after the original length, which the builder does not.
    """
    length: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    return min(length, original) if original and rope.get("llama_4_scaling_beta") else length


def _load_text_model(self: Untyped, input_path: str) -> Untyped:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(input_path, local_files_only=True, trust_remote_code=False)
