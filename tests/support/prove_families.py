"""Prove the configurations of known models, and write what is found beside the product's code.

`python -m tests.support.prove_families`

To be run after a change of the builder's or a runtime's version: what is shipped holds for the versions that it names.
The weights are random: the proof is one of operators, factors and rotation, which a configuration decides.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from slmops.infra.olive.calls import ProveFamily, proof_versions
from slmops.infra.olive.cut_checkpoint import KEPT_TOKENS
from slmops.infra.olive.family_proof import SHIPPED
from tests.support.family_configs import REAL, make_family

# Further sizes of the same families: what differs from the configuration of another size. Mistral 7B v0.2 has the
# configuration of v0.3, but for the vocabulary.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen/Qwen2.5-1.5B-Instruct": ("Qwen/Qwen2.5-0.5B-Instruct", {"hidden_size": 1536, "num_attention_heads": 12}),
    "Qwen/Qwen2.5-3B-Instruct": ("Qwen/Qwen2.5-0.5B-Instruct", {"hidden_size": 2048, "num_attention_heads": 16}),
    "Qwen/Qwen2.5-7B-Instruct": (
        "Qwen/Qwen2.5-0.5B-Instruct",
        {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "Qwen/Qwen3-1.7B": ("Qwen/Qwen3-0.6B", {"hidden_size": 2048}),
    "Qwen/Qwen3-4B": ("Qwen/Qwen3-0.6B", {"hidden_size": 2560, "num_attention_heads": 32}),
    "Qwen/Qwen3-4B-Instruct-2507": (
        "Qwen/Qwen3-0.6B",
        {"hidden_size": 2560, "num_attention_heads": 32, "max_position_embeddings": 262144, "rope_theta": 5000000},
    ),
    "Qwen/Qwen3-8B": (
        "Qwen/Qwen3-0.6B", {"hidden_size": 4096, "num_attention_heads": 32, "tie_word_embeddings": False}
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        "meta-llama/Llama-3.2-1B-Instruct", {"hidden_size": 3072, "num_attention_heads": 24, "head_dim": 128}
    ),
    "HuggingFaceTB/SmolLM2-360M-Instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5},
    ),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 32, "rope_theta": 130000},
    ),
    "google/gemma-3-1b-it": ("google/gemma-3-270m-it", {"hidden_size": 1152}),
    "ibm-granite/granite-3.3-8b-instruct": (
        "ibm-granite/granite-3.3-2b-instruct",
        {"hidden_size": 4096, "attention_multiplier": 0.0078125, "logits_scaling": 16.0},
    ),
}  # fmt: skip
NOT_SHIPPED = ("openai/gpt-oss-20b",)  # its experts are fewer here, and the key has their number


def main() -> None:
    """Prove every model that is not in the file yet, and write what is found; one that is not exact ends the command.

    The file is begun anew where it holds for other versions.
    """
    configs = {name: config for name, config in REAL.items() if name not in NOT_SHIPPED}
    configs |= {name: {**REAL[base], **changes} for name, (base, changes) in SIZES.items()}
    shipped = json.loads(SHIPPED.read_text("utf-8"))
    proven: dict[str, dict[str, Any]] = shipped["proven"] if shipped["versions"] == proof_versions() else {}
    known = {found["model"] for found in proven.values()}
    for name in (name for name in configs if name not in known):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            checkpoint = make_family(work / "checkpoint", {**configs[name], "vocab_size": KEPT_TOKENS})
            call = ProveFamily(checkpoint_dir=checkpoint, kept_dir=work / "kept", work_dir=work, threads=2)
            proof = call.perform(lambda done, total, what: None)
        print(f"{name}: {proof.distance:.1e} over {proof.lengths} tokens", flush=True)
        if proof.first_difference:
            raise SystemExit(f"{name} is not exact: {proof.first_difference}")
        found = {"architecture": proof.architecture, "distance": float(f"{proof.distance:.1e}")}
        proven[proof.key] = {"model": name, **found, "lengths": list(proof.lengths)}
        SHIPPED.write_text(json.dumps({"versions": proof_versions(), "proven": proven}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
