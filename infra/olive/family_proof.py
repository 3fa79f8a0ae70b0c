"""The proof of a family: a checkpoint's configuration, built in fp32, gives transformers' logits at every position.

The checkpoint is cut to a few layers (`slmops.infra.olive.cut_checkpoint`), so that the proof takes seconds. The result
applies to every checkpoint of the same configuration with the same versions of the builder and the runtimes. It is
cached, and `proven_families.json` has the results of known models.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops.infra.errors import BadInput
from slmops.infra.files import write_whole
from slmops.infra.olive.calls import FamilyProof, ProveFamily, proof_versions
from slmops.infra.olive.cut_checkpoint import CutCheckpoint, cut_checkpoint
from slmops.infra.olive.logit_comparison import differences, reference_trials
from slmops.infra.process.call import Progress
from slmops.infra.records import Untyped

SHIPPED = Path(__file__).with_name("proven_families.json")

# Largest distance of two logits over the standard deviation of the reference's. Sound builds of random weights stay
# below 1e-5 in tiny and below 5e-5 in real widths, real weights below 3e-5; a sound fp16 variant is off by 2e-3.
TOLERANCE = 3e-4
# Fields of a config on which no operator of a model depends. Widths of matrices are not listed, because factors are
# computed from some of them.
NOT_OF_THE_FAMILY = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "vocab_size", "num_hidden_layers", "use_cache"),
    *("intermediate_size", "initializer_range", "is_llama_config", "rope_interleaved", "use_mrope"),
    *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout"),
    *("id2label", "label2id", "problem_type", "return_dict", "output_hidden_states", "output_attentions"),
    *("chunk_size_feed_forward", "is_encoder_decoder", "task_specific_params", "pretraining_tp", "auto_map"),
    *("unsloth_version", "unsloth_fixed", "model_name", "max_window_layers", "_sliding_window_pattern"),
    *("sliding_window_pattern", "router_aux_loss_coef", "output_router_logits", "cache_implementation"),
}


def prove_family(call: ProveFamily, progress: Progress) -> FamilyProof:
    """Return whether a checkpoint's configuration is built exactly: from a stored result, or by a trial.

    Raises `BadInput` for a checkpoint that transformers or the builder does not support.
    """
    import torch

    torch.set_num_threads(call.threads)
    progress(0, 4, "cutting the checkpoint to a few layers")
    with TemporaryDirectory(prefix="family-", dir=call.work_dir) as work:
        config = _read_config(call.checkpoint_dir)
        cut = cut_checkpoint(call.checkpoint_dir, config, Path(work) / "cut")
        key = family_key(_read_config(cut.folder), cut.dtype)
        kept = call.kept_dir / f"{_with_versions(key)}.json"
        known = _shipped(key) or (FamilyProof.model_validate_json(kept.read_bytes()) if kept.is_file() else None)
        if known:
            progress(4, 4, "proven before")
            return known.model_copy(update={"known": True})
        proof = _try(cut, key, config.architectures[0], call.threads, Path(work) / "built", progress)
    write_whole(kept, proof.model_dump_json(indent=2))
    return proof


def family_key(cut_config: Untyped, dtype: str) -> str:
    """Return the digest of a cut checkpoint's config, as far as operators depend on it, and of the weights' type."""
    family_config = {
        name: _as_number(value)
        for name, value in cut_config.to_dict().items()
        if name not in NOT_OF_THE_FAMILY and not name.endswith("_token_id")
    }
    text = json.dumps({"config": family_config, "dtype": dtype}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_number(value: object) -> object:
    """Return a value of a config with whole numbers as integers: files write 10000 and 10000.0 alike."""
    if isinstance(value, dict):
        return {key: _as_number(entry) for key, entry in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _with_versions(key: str) -> str:
    return hashlib.sha256(json.dumps([key, proof_versions()]).encode()).hexdigest()


def _shipped(key: str) -> FamilyProof | None:
    known = json.loads(SHIPPED.read_text("utf-8"))
    found = known["proven"].get(key) if known["versions"] == proof_versions() else None
    return (
        FamilyProof(key=key, **{name: found[name] for name in ("architecture", "distance", "lengths")})
        if found
        else None
    )


def _read_config(folder: Path) -> Untyped:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its values come from the checkpoint's author, and any may be wrong
        raise _refused("transformers cannot read config.json", error) from error


def _refused(what: str, error: BaseException) -> BadInput:
    reason = " ".join(str(error).split())[:300] or "without a reason"
    return BadInput(
        f"{what}: {type(error).__name__}: {reason}",
        "Correct config.json, or use a model of docs/families.md.",
        code="family-not-built",
    )


def _try(cut: CutCheckpoint, key: str, architecture: str, threads: int, built: Path, progress: Progress) -> FamilyProof:
    from slmops.infra.olive.genai_builder import make_model

    progress(1, 4, "computing the cut checkpoint's logits in transformers")
    try:
        trials = reference_trials(cut.folder, cut.parameters)
    except Exception as error:  # its config and weights come from the checkpoint's author
        raise _refused(f"transformers cannot run this {architecture}", error) from error
    progress(2, 4, "building it in fp32")
    try:
        built.mkdir()
        make_model(cut.folder, built, {"precision": "fp32"})
        progress(3, 4, f"comparing every position of {', '.join(str(len(trial.tokens)) for trial in trials)} tokens")
        found = list(differences(built, trials, threads))
    except Exception as error:  # the builder or the runtime may fail in any way
        raise _refused(f"onnxruntime-genai cannot build or run this {architecture}", error) from error
    first = next((difference for difference in found if not difference.distance <= TOLERANCE), None)
    progress(4, 4, f"compared at {len(found)} positions")
    return FamilyProof(
        key=key,
        architecture=architecture,
        lengths=tuple(len(trial.tokens) for trial in trials),
        distance=first.distance if first else max(difference.distance for difference in found),
        first_difference=asdict(first) if first else None,
    )
