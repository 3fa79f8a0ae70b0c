"""The proof of a checkpoint's family: before the build, a small model of its configuration is built and compared."""

from collections.abc import Collection
from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.infra.files import write_whole
from slmops.infra.olive.architectures import check_family_precisions
from slmops.infra.olive.calls import FamilyProof, ProveFamily, proof_versions
from slmops.infra.process.call import OnProgress
from slmops.infra.process.supervisor import ChildProcess
from slmops.infra.settings import Settings
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.manifest import digest_of
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import workshop


@stage("prove family", run_name="prove-family")
def prove_family(prepared: PreparedCheckpoint, precisions: Collection[str]) -> None:
    """Prove that the checkpoint's configuration is built exactly; an ONNX model needs no proof.

    Raises `BadInput`, before anything is built, if it is not, or not in one of the precisions.
    """
    if prepared.inspection.kind == "genai":
        return
    check_family_precisions(prepared.inspection.architecture, precisions)
    shop = workshop()
    with stage_progress("prove family") as on_progress:
        # The child would import torch for seconds, only to find that it has proven this checkpoint before.
        key = digest_of({"checkpoint": prepared.digest, "versions": proof_versions()})
        proven = shop.settings.user_cache_dir / "families" / f"checkpoint-{key}.json"
        if proven.is_file():
            on_progress(1, 1, "proven before")
            return
        log = f"prove-{prepared.digest[:12]}"
        proof = proof_of(prepared.folder, shop.settings, shop.torch, on_progress, log=log)
        write_whole(proven, proof.model_dump_json(indent=2))


def proof_of(
    folder: Path, settings: Settings, child: ChildProcess, on_progress: OnProgress, *, log: str
) -> FamilyProof:
    """Return the proof of a checkpoint's family; raises `BadInput` if the logits differ from transformers'."""
    with work_folder(settings) as work:
        proof = child.run(
            ProveFamily(
                checkpoint_dir=folder,
                kept_dir=settings.user_cache_dir / "families",
                work_dir=work,
                threads=settings.threads,
            ),
            deadline_s=settings.timeout.build_s,
            log_path=settings.cache_dir / "logs" / f"{log}.log",
            work_dir=work,
            on_progress=on_progress,
        ).value
    if first := proof.first_difference:
        doing = "in generation" if first["generating"] else f"of a prompt of {first['tokens']} tokens"
        raise BadInput(
            f"onnxruntime-genai builds {proof.architecture} differently from transformers: the logits differ first at "
            f"position {first['position']} {doing}, by {proof.distance:.2g} of their standard deviation.",
            "Fine-tune a model of docs/families.md, or set this one's config.json as theirs.",
            code="family-not-exact",
        )
    return proof
