"""Which checkpoints can be built correctly, according to config.json."""

from slmops.infra.errors import BadInput
from slmops.infra.records import Json

# Proven: a build in fp32 agrees with transformers at every position (tests/infra/olive/test_engine.py).
# Of the others that onnxruntime-genai 0.18's builder knows, Gemma 2 is off by about 1 % of the logits' spread, and
# Gemma 3 does not build from a config.json of today's transformers.
SUPPORTED_ARCHITECTURES = (
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)

# Of the builder's other rotary embeddings, `linear` gives a silently wrong model, `yarn` and `longrope` do not build,
# and `dynamic` changes only beyond the trained length, where it is not proven.
SUPPORTED_ROPE_TYPES = ("default", "llama3")
PARTIAL_ROTARY_ARCHITECTURES = ("Phi3ForCausalLM",)


def check_architecture(config: Json) -> None:
    """Raise `BadInput` unless a checkpoint with this config.json (parsed) can be built correctly.

    The message names what was found: the architecture, the rotary embedding or the quantization.
    """
    supported = f"Supported are: {', '.join(SUPPORTED_ARCHITECTURES)}."
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        fault = f"config.json names no architecture (architectures: {architectures!r})."
        raise BadInput(fault, supported, code="architecture-not-named")
    if architectures[0] not in SUPPORTED_ARCHITECTURES:
        raise BadInput(
            f"The architecture {architectures[0]} is not supported.", supported, code="architecture-not-supported"
        )
    if config.get("quantization_config"):
        method = _value(config["quantization_config"], "quant_method") or "of an unknown kind"
        raise BadInput(
            f"The checkpoint is already quantized ({method}).",
            "Give the checkpoint in floating point; slmops makes the quantized variants from it.",
            code="checkpoint-quantized",
        )
    _check_rope(architectures[0], config)


def _check_rope(architecture: str, config: Json) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = _value(rope, "rope_type") or _value(rope, "type") or "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise BadInput(
            f"The rotary embedding of type {rope_type} in config.json is not supported for {architecture}.",
            f"Supported are: {', '.join(SUPPORTED_ROPE_TYPES)}.",
            code="rope-not-supported",
        )
    share = _value(rope, "partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if share != 1 and architecture not in PARTIAL_ROTARY_ARCHITECTURES:
        raise BadInput(
            f"A partial rotary embedding (partial_rotary_factor {share}) is not supported for {architecture}.",
            f"It is for {', '.join(PARTIAL_ROTARY_ARCHITECTURES)}.",
            code="rope-not-supported",
        )


def _value(section: object, key: str) -> object:
    return section.get(key) if isinstance(section, dict) else None
