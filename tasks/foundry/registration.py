"""Registration: variants and champions in Foundry Local, and their removal."""

from collections.abc import Sequence
from pathlib import Path

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.foundry.abilities import abilities_of
from slmops.infra.foundry.calls import CatalogModel, ListModels, OnCatalog, Register, Unregister
from slmops.infra.foundry.model_folder import GENAI_CONFIG, remove_model_folder, write_model_folder
from slmops.infra.process.call import OnProgress, R
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.records import Record
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import LICENSE
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.signatures import check_signature
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.foundry.ids import champion_model_id, folder_of, model_id_of
from slmops.tasks.foundry.prompt_template import describe_model, inference_model
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage


class Registration(Record):
    """A variant in Foundry Local: its id, whether this call registered it, and the notes on its prompt template."""

    model_id: str
    changed: bool
    notes: tuple[str, ...] = ()


@stage("register variant", run_name="register-{variant.precision}")
def register_variant(variant: Variant, description: str, card: str, settings: Settings) -> Registration:
    """Write a variant's folder, with its model card, into Foundry's cache and register it.

    If it is already registered, only the card changes.
    """
    version, model_id = variant.version, model_id_of(variant)
    with stage_progress(f"register {variant.precision}") as on_progress, work_folder(settings) as work:
        variant.place(work / "model", on_progress)
        if settings.store.require_signature:
            check_signature(version, settings.store)
            variant.check_unaltered(work / "model")
        template, defaults = describe_model(work / "model")
        folder = write_model_folder(
            settings.foundry_dir,
            version.name,
            variant.precision,
            version.number,
            sources={file.path: work / "model" / file.path for file in variant.files},
            inference_model=inference_model(model_id, version.number, description, template, defaults),
            model_card=card,
        )
        call = Register(
            cache_dir=settings.foundry_dir,
            folder=folder,
            model_id=model_id,
            metadata=metadata_of(variant, description, folder),
        )
        changed = ask_foundry(call, settings, on_progress).changed
        on_progress(1, 1, "registered" if changed else "registered before")
    return Registration(model_id=model_id, changed=changed, notes=template.notes)


@stage("register champion", run_name="register-champion")
def register_champion(variant: Variant, settings: Settings) -> str:
    """Register a version's selected variant as `NAME:VERSION`, in place of the former champion's; returns that id."""
    set_champion_ids(variant.version.name, [variant], settings)
    return champion_model_id(variant.version.name, variant.version.number)


def set_champion_ids(name: str, champions: Sequence[Variant], settings: Settings) -> None:
    """Register these variants as `NAME:VERSION`, and unregister other versions under the plain name."""
    registered = registered_models(settings)
    folders = {model.model_id: model.folder for model in registered if model.folder_exists}
    for variant in champions:
        folder = folder_of(variant, settings)
        model_id = champion_model_id(name, variant.version.number)
        if folders.get(model_id) == str(folder.absolute()):
            continue
        metadata = metadata_of(variant, "", folder)
        call = Register(cache_dir=settings.foundry_dir, folder=folder, model_id=model_id, metadata=metadata)
        ask_foundry(call, settings)
    kept = {champion_model_id(name, variant.version.number) for variant in champions}
    for model in registered:
        if model.name == name and model.model_id not in kept:
            ask_foundry(Unregister(cache_dir=settings.foundry_dir, model_id=model.model_id), settings)


def metadata_of(variant: Variant, description: str, folder: Path) -> dict[str, str | int]:
    """Return what Foundry reads of a registered model; it reads the context's length from the folder itself.

    The whole context may be an answer. A folder that lacks its files is for the registration itself to refuse.
    """
    shown: dict[str, str | int] = {
        "display_name": f"{variant.version.name} {variant.precision}",
        **({"description": description} if description else {}),
    }
    if (folder / GENAI_CONFIG).is_file():
        shown["max_output_tokens"] = int(read_json(folder / GENAI_CONFIG)["model"]["context_length"])
    known = variant.version.latest(LICENSE)
    return shown | ({"license": known.name} if known else {}) | abilities_of(folder).properties


def unregister_variant(variant: Variant, settings: Settings) -> list[str]:
    """Unregister a variant under all its ids, and remove it from Foundry's cache; returns those ids."""
    folder = folder_of(variant, settings)
    ids = [model.model_id for model in registered_models(settings) if model.folder == str(folder)]
    for model_id in ids:
        ask_foundry(Unregister(cache_dir=settings.foundry_dir, model_id=model_id), settings)
    remove_model_folder(settings.foundry_dir, variant.version.name, variant.precision, variant.version.number)
    return ids


def unregister_version(version: Version, settings: Settings) -> list[str]:
    """Unregister all variants of a version; returns the ids that were registered."""
    return [model_id for variant in version.variants for model_id in unregister_variant(variant, settings)]


def registered_models(settings: Settings) -> tuple[CatalogModel, ...]:
    """Return Foundry's local catalog."""
    return ask_foundry(ListModels(cache_dir=settings.foundry_dir), settings)


def ask_foundry(call: OnCatalog[R], settings: Settings, on_progress: OnProgress | None = None) -> R:
    """Perform a call on a Foundry cache, in a process of its own."""
    with work_folder(settings) as work:
        return run_in_child(
            call,
            deadline_s=settings.timeout.foundry_s,
            log_path=settings.cache_dir / "logs" / f"foundry-{type(call).__name__.lower()}.log",
            work_dir=work,
            on_progress=on_progress,
        ).value
