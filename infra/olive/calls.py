"""Calls of child processes that use Olive, and their answers."""

from importlib.metadata import version

from slmops.infra.process.call import Call, Progress
from slmops.infra.records import AbsolutePath, Json, Record


class Built(Record):
    """A finished model folder; the files' names are sorted."""

    files: tuple[str, ...]


class Build(Call[Built]):
    """Build one variant of a checkpoint.

    `olive_config` is complete except for its paths. The finished folder is written to `output_dir`, which must be empty
    or missing; intermediate files are in a separate folder under `cache_dir`, which is removed at the end.
    `calibration` are the token ids of the texts that passes are calibrated on.
    """

    olive_config: Json
    checkpoint_dir: AbsolutePath
    output_dir: AbsolutePath
    cache_dir: AbsolutePath
    threads: int
    calibration: tuple[tuple[int, ...], ...] = ()

    def perform(self, progress: Progress) -> Built:
        """See `slmops.infra.olive.engine.build`."""
        from slmops.infra.olive.engine import build

        return build(self, progress)


class FamilyProof(Record):
    """Whether a configuration is built exactly.

    `distance` is the largest difference of two logits over the standard deviation of the reference's; `lengths` are the
    prompts' in tokens; `first_difference` (tokens, position, distance, generating) is None if it is exact; `known`: the
    result was stored before.
    """

    key: str
    architecture: str
    distance: float
    lengths: tuple[int, ...]
    first_difference: Json | None = None
    known: bool = False


def proof_versions() -> dict[str, str]:
    """Return the versions of the packages that a proof holds for."""
    return {package: version(package) for package in ("onnxruntime", "onnxruntime-genai", "transformers")}


class ProveFamily(Call[FamilyProof]):
    """Prove that a checkpoint's configuration is built exactly; the result is stored in `kept_dir`."""

    checkpoint_dir: AbsolutePath
    kept_dir: AbsolutePath
    work_dir: AbsolutePath
    threads: int

    def perform(self, progress: Progress) -> FamilyProof:
        """See `slmops.infra.olive.family_proof.prove_family`."""
        from slmops.infra.olive.family_proof import prove_family

        return prove_family(self, progress)
