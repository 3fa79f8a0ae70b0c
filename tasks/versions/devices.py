"""Bring a version to a device: into a Foundry cache there, registered and proven."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from slmops.infra.errors import SlmopsError, StageFailed
from slmops.infra.foundry.calls import Prove, Register, Unregister
from slmops.infra.foundry.model_folder import model_folder, remove_model_folder, write_model_folder
from slmops.infra.process.call import OnProgress
from slmops.infra.settings import FoundrySettings, Settings
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.signatures import check_signature
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.exams.answers import last_evaluation_set
from slmops.tasks.foundry.ids import champion_model_id
from slmops.tasks.foundry.prompt_template import describe_model, inference_model
from slmops.tasks.foundry.proof import last_proof
from slmops.tasks.foundry.registration import ask_foundry, metadata_of, registered_models

# Its folder, `models/custom/NAME-champion/v3`, is separate from those that deploys on the same machine register.
ROLE = "champion"
FALLBACK_MESSAGES = [{"role": "user", "content": "Hello"}]
FALLBACK_TOKENS = 8


@dataclass(frozen=True)
class BroughtModel:
    """A version on a device: its Foundry id, its folder, its answer, and the ids that it replaced."""

    model_id: str
    precision: str
    folder: str
    answer: str
    replaced: tuple[str, ...]


def bring_to_device(version: Version, foundry_cache: Path, settings: Settings, on_progress: OnProgress) -> BroughtModel:
    """Write a version's selected variant into a Foundry cache as `NAME:VERSION`, register it and let it answer.

    The SDK's local catalog and Foundry's scan of the cache then list it under that id. Other versions of the name are
    removed from the cache after this one has given the answer of its recorded proof (any answer if there is none).

    Raises `BadInput` for a version that did not pass the gate; `StageFailed`, with the cache unchanged, for one that is
    altered, does not load, or gives another answer.
    """
    variant = version.require_serving()
    model_id = champion_model_id(version.name, version.number)
    there = settings.model_copy(update={"foundry": FoundrySettings(cache_dir=foundry_cache)})
    before = [model.model_id for model in registered_models(there) if model.name == version.name]
    with work_folder(settings) as work:
        variant.place(work / "model", on_progress)
        if settings.store.require_signature:
            check_signature(version, settings.store)
        variant.check_unaltered(work / "model")
        template, defaults = describe_model(work / "model")
        description = version.deployed.description
        folder = write_model_folder(
            there.foundry_dir,
            version.name,
            ROLE,
            version.number,
            sources={file.path: work / "model" / file.path for file in variant.files},
            inference_model=inference_model(model_id, version.number, description, template, defaults),
            model_card=f"# {version.reference}\n\n{description}\n",
        )
    with _taken_back(version, model_id, before, there):
        metadata = metadata_of(variant, description, folder)
        call = Register(cache_dir=there.foundry_dir, folder=folder, model_id=model_id, metadata=metadata)
        ask_foundry(call, there, on_progress)
        answer = _answered(variant, model_id, there, on_progress)
    replaced = _replace(version, model_id, there)
    return BroughtModel(model_id, variant.precision, str(folder), answer, replaced)


@contextlib.contextmanager
def _taken_back(version: Version, model_id: str, before: list[str], there: Settings) -> Iterator[None]:
    """Remove a new model from the cache again if it fails."""
    try:
        yield
    except BaseException:
        if model_id not in before:
            with contextlib.suppress(SlmopsError):
                ask_foundry(Unregister(cache_dir=there.foundry_dir, model_id=model_id), there)
            remove_model_folder(there.foundry_dir, version.name, ROLE, version.number)
        raise


def _answered(variant: Variant, model_id: str, there: Settings, on_progress: OnProgress) -> str:
    evaluation = last_evaluation_set(variant.version)
    proof = last_proof(variant, evaluation.proof_row) if evaluation else None
    messages = FALLBACK_MESSAGES
    if evaluation and proof:
        messages = [message.model_dump() for message in evaluation.proof_row.messages]
    tokens = proof.completion_tokens if proof else FALLBACK_TOKENS
    call = Prove(cache_dir=there.foundry_dir, model_id=model_id, messages=messages, max_new_tokens=tokens)
    answer = ask_foundry(call, there, on_progress).answer
    if proof and not proof.has_answer(answer):
        raise StageFailed(
            f"{model_id} answers {answer!r} there; the recorded answer is {proof.answer!r}.",
            "Check whether both machines have the same package versions: slmops check.",
        )
    return answer


def _replace(version: Version, model_id: str, there: Settings) -> tuple[str, ...]:
    """Remove the name's other versions, which this command brought, from the cache; returns their ids."""
    own = model_folder(there.foundry_dir, version.name, ROLE, version.number).parent
    removed = []
    for model in registered_models(there):
        ours = Path(model.folder).parent == own
        if model.name == version.name and model.model_id != model_id and ours:
            ask_foundry(Unregister(cache_dir=there.foundry_dir, model_id=model.model_id), there)
            remove_model_folder(there.foundry_dir, version.name, ROLE, model.version)
            removed.append(model.model_id)
    return tuple(removed)
