"""What the inspection of a checkpoint finds, for estimates of its deploy."""

from slmops.tasks.checkpoint.inspection import Inspection


def inspection(
    parameters: int = 494_000_000, vocabulary: int = 151_936, hidden: int = 896, **fields: object
) -> Inspection:
    return Inspection.model_validate(
        {
            "kind": "checkpoint",
            "architecture": "Qwen2ForCausalLM",
            "parameters": parameters,
            "dtype": "BF16",
            "size_bytes": 2 * parameters,
            "largest_tensor_elements": vocabulary * hidden,
            "vocabulary_size": vocabulary,
            "hidden_size": hidden,
            "context_length": 32_768,
            **fields,
        }
    )
