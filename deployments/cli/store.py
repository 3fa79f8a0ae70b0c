"""The commands for the store: push, pull, verify, gc, export, import and ingest."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmops.deployments.cli.options import Json, Reference, VersionReference
from slmops.deployments.cli.output import print_json, print_line, print_note, print_table, sized
from slmops.deployments.cli.running import load_settings, the_registry, version_of
from slmops.deployments.cli.stages import StageDisplay, stage_display
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from slmops.infra.settings import Settings, StoreSettings
    from slmops.infra.storage.copying import CopiedVersion
    from slmops.infra.storage.registry import ModelRegistry
    from slmops.infra.storage.verification import Verification
    from slmops.infra.storage.version import Version

Renumber = Annotated[
    bool, typer.Option("--renumber", help="Take the next free number there if another version has this one.")
]


def push(reference: VersionReference, renumber: Renumber = False, as_json: Json = False) -> None:
    """Copy a version from this machine's own store to the one that SLMOPS_STORE__URI names."""
    from slmops.infra.storage.opening import open_local_registry

    settings = load_settings()
    _copy(reference, open_local_registry(settings), _other_registry(settings), renumber=renumber, as_json=as_json)


def pull(
    reference: Reference,
    renumber: Renumber = False,
    foundry_cache: Annotated[
        Path | None,
        typer.Option(help="Copy the version into this Foundry cache of a device instead, and register it there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a version from the store that SLMOPS_STORE__URI names to this machine's own store, or to a device."""
    from slmops.infra.storage.opening import open_local_registry

    settings = load_settings()
    if foundry_cache is not None:
        _bring(reference, foundry_cache, settings, as_json=as_json)
        return
    _copy(reference, _other_registry(settings), open_local_registry(settings), renumber=renumber, as_json=as_json)


def _bring(reference: str, foundry_cache: Path, settings: "Settings", *, as_json: bool) -> None:
    from dataclasses import asdict

    from slmops.tasks.versions.devices import bring_to_device

    version = version_of(reference)
    if foundry_cache.exists() and not foundry_cache.is_dir():
        raise BadInput(f"{foundry_cache} is a file.", "Name the folder that Foundry Local keeps its models in.")
    with stage_display() as display:
        brought = bring_to_device(
            version,
            foundry_cache.absolute(),
            settings,
            lambda done, total, what: display("pull", done / total if total else 0.0, what),
        )
    if as_json:
        print_json({"name": version.name, "version": version.number, **asdict(brought)})
        return
    instead = f", in place of {', '.join(brought.replaced)}" if brought.replaced else ""
    print_line(f"{brought.model_id} ({brought.precision}) answers from {brought.folder}{instead}.")


def _other_registry(settings: "Settings") -> "ModelRegistry":
    from slmops.infra.storage.opening import open_local_registry, open_registry

    registry = open_registry(settings)
    if registry.objects.uri("models") == open_local_registry(settings).objects.uri("models"):
        raise BadInput(
            "SLMOPS_STORE__URI names no store besides this machine's own.",
            "Set it to s3://bucket/prefix, or to file:///folder of a shared folder.",
        )
    registry.objects.check()
    return registry


def _copy(reference: str, source: "ModelRegistry", target: "ModelRegistry", *, renumber: bool, as_json: bool) -> None:
    from slmops.infra.storage.copying import copy_version

    version = source.find(reference)
    with stage_display() as display:
        copied = copy_version(
            version,
            target,
            renumber=renumber,
            on_progress=lambda done, total, what: display("copy", done / total, what),
            settings=load_settings().store,
        )
    _show_copied(copied, as_json=as_json)


def _show_copied(copied: "CopiedVersion", *, as_json: bool) -> None:
    version = copied.version
    notices = version.registry.objects.notices()
    for text in notices:
        print_note(f"note: {text}")
    if as_json:
        stored = {"name": version.name, "version": version.number, "is_new": copied.is_new}
        moved = {"moved_bytes": copied.moved_bytes, "skipped_bytes": copied.skipped_bytes}
        print_json({**stored, **moved, "uri": version.uri, "notes": list(notices)})
        return
    state = "stored" if copied.is_new else "there already"
    print_line(
        f"{version.reference} {state}: {version.uri} "
        f"({sized(copied.moved_bytes)} moved, {sized(copied.skipped_bytes)} were there)"
    )
    if version.says_origin and "champion" not in version.aliases:
        name = version.reference
        print_line(
            f"Its figures are claims of its origin. Judge it with slmops regate {name}, or slmops promote {name}."
        )


def verify(
    reference: Reference,
    repair: Annotated[bool, typer.Option("--repair", help="Restore damaged files from a local copy.")] = False,
    as_json: Json = False,
) -> None:
    """Read every file of a version in the store, and list what is missing or altered."""
    from dataclasses import asdict

    from slmops.infra.storage.verification import verify_version

    settings = load_settings()
    version = version_of(reference)
    with stage_display() as display:
        found = verify_version(version, lambda done, total, what: display("verify", done / total, what))
        if repair and not found.ok:
            found = _repaired(version, found, settings.home_dir / "store", display)
    signature = _signature_state(version, settings.store)
    ok = found.ok and not signature.startswith("not valid")
    if as_json:
        damage = [{name: value for name, value in asdict(fault).items() if name != "blob"} for fault in found.damage]
        counted = {"files": found.files, "size_bytes": found.size_bytes, "digest": found.manifest_sha256}
        print_json({"reference": version.reference, "ok": ok, **counted, "damage": damage, "signature": signature})
    else:
        print_table(
            "Damage", [{"what": fault.what, "fault": fault.fault, "detail": fault.detail} for fault in found.damage]
        )
        state = "whole" if found.ok else "damaged"
        print_line(
            f"{version.reference} is {state}: {found.files} files, {sized(found.size_bytes)} read, "
            f"{len(found.damage)} damaged; signature: {signature}."
        )
    if not ok:
        raise typer.Exit(1)


def _repaired(version: "Version", found: "Verification", own_store: Path, display: StageDisplay) -> "Verification":
    from slmops.infra.storage.local import LocalObjectStore
    from slmops.infra.storage.verification import repair_version, verify_version

    registry = version.registry
    copies = [store for store in (LocalObjectStore(own_store), registry.cache) if store]
    others = [store for store in copies if store.uri("models") != registry.objects.uri("models")]
    repair_version(version, found, others, lambda done, total, what: display("repair", done / total, what))
    return verify_version(version, lambda done, total, what: display("verify again", done / total, what))


def _signature_state(version: "Version", store: "StoreSettings") -> str:
    from slmops.infra.errors import StageFailed
    from slmops.infra.storage.signatures import check_signature, is_signed

    if not is_signed(version):
        return "none" if not store.require_signature else "not valid: the version is not signed"
    if store.verification_key is None:
        return "not checked (SLMOPS_STORE__VERIFICATION_KEY is not set)"
    try:
        check_signature(version, store)
    except StageFailed as error:
        return f"not valid: {error.message}"
    return "valid"


def gc(
    keep: Annotated[
        int | None, typer.Option(help="Number of newest versions to keep, besides those with an alias.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what nothing needs from the store and from this machine; deploys may run at the same time."""
    from slmops.tasks.versions.garbage import collect
    from slmops.tasks.workshop import Workshop

    registry = the_registry()
    registry.objects.check()
    with stage_display() as display:
        found = collect(
            Workshop(load_settings(), registry),
            keep=keep,
            dry_run=dry_run,
            on_progress=lambda done, total, what: display("collect", done / total if total else 0, what),
        )
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_line(found.summary)
    if found.in_use:
        print_line(f"Kept, because running deploys use them: {', '.join(found.in_use)}.")
    if found.spared_blobs:
        print_line(f"Kept {found.spared_blobs:,} files that running work relies on.")


def export_version(
    reference: Reference, file: Annotated[Path, typer.Argument(help="New .tar file.")], as_json: Json = False
) -> None:
    """Pack a version with its evidence into one file, for machines without a network."""
    from slmops.infra.storage.archive import export_version as export

    version = version_of(reference)
    with stage_display() as display:
        packed = export(
            version.registry, version.manifest, file, lambda done, total, what: display("export", done / total, what)
        )
    if as_json:
        document = {"reference": version.reference, "file": str(packed.file), "size_bytes": packed.size_bytes}
        print_json({**document, "sha256": packed.sha256})
        return
    print_line(f"{version.reference} -> {packed.file} ({sized(packed.size_bytes)}, sha256 {packed.sha256})")


def import_version(
    file: Annotated[Path, typer.Argument(help="File that slmops export wrote.")],
    sha256: Annotated[str | None, typer.Option(help="SHA-256 that the file must have.")] = None,
    renumber: Renumber = False,
    as_json: Json = False,
) -> None:
    """Verify an exported version and unpack it into the store."""
    from slmops.infra.storage.archive import import_version as unpack
    from slmops.infra.storage.manifest import digest_of_file

    settings = load_settings()
    registry = the_registry()
    registry.objects.check()
    if sha256 and file.is_file() and (found := digest_of_file(file)) != sha256.lower():
        raise BadInput(f"{file} has the SHA-256 {found}, not {sha256}.", "Copy the file again.")
    with stage_display() as display:
        copied = unpack(
            file,
            registry,
            settings.cache_dir / "work",
            renumber=renumber,
            on_progress=lambda done, total, what: display("import", done / total, what),
            settings=settings.store,
        )
    _show_copied(copied, as_json=as_json)


def ingest(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint, or an evaluation file.")], as_json: Json = False
) -> None:
    """Put a checkpoint or a file into the store, so that any worker can read it; prints its address."""
    from slmops.infra.storage.inputs import ingest as put_in

    registry = the_registry()
    registry.objects.check()
    with stage_display() as display:
        found = put_in(registry, path.expanduser(), lambda done, total, what: display("ingest", done / total, what))
    if as_json:
        print_json({"address": found.address, "kind": found.kind, "name": found.name, "size_bytes": found.size_bytes})
        return
    print_line(found.address)
