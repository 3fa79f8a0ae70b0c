"""The commands on versions: list and show them, what is kept of them, and take them away."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli.options import Json, Reference, VersionReference
from slmops.deployments.cli.output import print_json, print_line, print_table
from slmops.deployments.cli.running import load_settings, the_registry, version_of
from slmops.infra.errors import BadInput

if TYPE_CHECKING:
    from slmops.infra.storage.manifest import Manifest
    from slmops.infra.storage.registry import ModelRegistry


def list_models(as_json: Json = False) -> None:
    """List the versions in the store."""
    registry = the_registry()
    models: list[dict[str, Any]] = []
    for name in registry.names():
        for manifest in registry.versions(name):
            status = _statuses(registry, manifest)
            models.append(
                {
                    "name": name,
                    "version": manifest.version,
                    "aliases": list(registry.aliases_of(manifest)),
                    "tags": registry.tags(manifest),
                    "created_at": manifest.created_at,
                    "says_origin": registry.of(manifest).says_origin,
                    "variants": [
                        {
                            "precision": variant.precision,
                            "status": status.get(variant.precision),
                            "size_bytes": variant.size_bytes,
                        }
                        for variant in manifest.variants
                    ],
                }
            )
    if as_json:
        print_json({"models": models})
        return
    rows = [
        {
            "version": f"{model['name']}@{model['version']}",
            "aliases": ", ".join(model["aliases"]) or "-",
            "tags": ", ".join(f"{tag}={value}" for tag, value in model["tags"].items()) or "-",
            "variants": ", ".join(
                f"{one['precision']} {one['status'] or 'not judged'} ({one['size_bytes'] / 1e6:,.1f} MB)"
                for one in model["variants"]
            )
            + (", says its origin" if model["says_origin"] else ""),
        }
        for model in models
    ]
    print_table("Models", rows)
    if not rows:
        print_line("The store is empty. Start with: slmops deploy CHECKPOINT --name NAME")


def show(reference: Reference, as_json: Json = False) -> None:
    """Show a version: its source, files and evidence."""
    from slmops.infra.storage.signatures import is_signed

    registry, manifest = version_of(reference)
    deployed = registry.latest_evidence(manifest, "deploy") or {}
    says_origin = registry.of(manifest).says_origin
    if as_json:
        kept = {"aliases": registry.aliases_of(manifest), "tags": registry.tags(manifest), "deploy": deployed}
        notes = [{"at": at, "text": text} for at, text in registry.notes(manifest)]
        signed = {"signed": is_signed(registry, manifest), "digest": manifest.digest, "uri": registry.uri(manifest)}
        print_json({**manifest.model_dump(), **kept, "says_origin": says_origin, "notes": notes, **signed})
        return
    print_line(
        f"{manifest.reference}  {manifest.created_at}  aliases: {', '.join(registry.aliases_of(manifest)) or '-'}"
    )
    print_line(
        f"source: {manifest.source.origin} ({manifest.source.architecture}, {manifest.source.parameters:,} parameters)"
    )
    print_line(f"        sha256 {manifest.source.digest}")
    if manifest.source.training_run:
        print_line(f"training run: {manifest.source.training_run}")
    print_line(f"stored: {registry.uri(manifest)}")
    print_line(f"        sha256 {manifest.digest}, {'signed' if is_signed(registry, manifest) else 'not signed'}")
    for tag, value in registry.tags(manifest).items():
        print_line(f"tag: {tag}={value}")
    for at, text in registry.notes(manifest):
        print_line(f"note of {at[:19]}: {text}")
    print_line("built by: " + ", ".join(f"{name} {number}" for name, number in manifest.builder.items()))
    files = [
        {"variant": variant.precision, "file": file.path, "size": f"{file.size_bytes:,}", "sha256": file.sha256[:16]}
        for variant in manifest.variants
        for file in variant.files
    ]
    print_table("Files", files)
    statuses = [
        {"variant": precision, "status": status or "not judged"}
        for precision, status in _statuses(registry, manifest).items()
    ]
    print_table("Variants (says its origin)" if says_origin else "Variants", statuses)


def _statuses(registry: "ModelRegistry", manifest: "Manifest") -> dict[str, str | None]:
    deployed = registry.latest_evidence(manifest, "deploy") or {"variants": []}
    found = {one["precision"]: one["status"] for one in deployed["variants"]}
    return {variant.precision: found.get(variant.precision) for variant in manifest.variants}


def logs(reference: Reference) -> None:
    """Print the build logs of a version."""
    registry, manifest = version_of(reference)
    for record in registry.evidence(manifest, "build"):
        print_line(
            f"== {record['precision']}: built in {record['wall_s']:.1f} s, peak {record['peak_rss_bytes'] / 1e9:.2f} GB"
        )
        print_line(record["log"].rstrip() or "(no output)")


def delete(
    reference: VersionReference,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Unregister a version and remove it from the store; its number is never used again. Or remove an input."""
    from slmops.infra.storage.garbage import delete_version
    from slmops.infra.storage.inputs import is_input_address

    settings = load_settings()
    if is_input_address(reference):
        _delete_input(reference, yes=yes)
        return
    registry, manifest = version_of(reference)
    if "@" not in reference:
        raise BadInput(f"{reference!r} names no version.", f"Write, for example, {manifest.reference}.")
    if not yes and not typer.confirm(f"Delete {manifest.reference} and unregister it?", err=True):
        raise typer.Exit(1)
    from slmops.tasks.foundry.registration import unregister_version

    unregister_version(manifest, settings)
    freed = delete_version(registry.of(manifest))
    print_line(f"Deleted {manifest.reference}; {(freed or 0) / 1e6:,.1f} MB freed.")


def _delete_input(address: str, *, yes: bool) -> None:
    from slmops.infra.storage.inputs import delete_input, read_input

    registry = the_registry()
    found = read_input(registry, address)
    if not yes and not typer.confirm(f"Delete {address} ({found.name}) from the store?", err=True):
        raise typer.Exit(1)
    delete_input(registry, address)
    print_line(f"Deleted {address} ({found.name}); slmops gc frees its bytes.")


def unregister(reference: Reference) -> None:
    """Take a version out of Foundry Local; it stays in the store."""
    settings = load_settings()
    _, manifest = version_of(reference)
    from slmops.tasks.foundry.registration import unregister_version

    removed = unregister_version(manifest, settings)
    print_line(f"Unregistered {', '.join(removed) or 'nothing: ' + manifest.reference + ' was not registered'}.")


def chat(reference: Reference) -> None:
    """Talk to a registered model through Foundry Local; an empty line ends the chat."""
    settings = load_settings()
    registry, manifest = version_of(reference)
    from slmops.deployments.cli.chat import chat_with

    chat_with(registry, manifest, settings)


def diff(
    first: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    second: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    as_json: Json = False,
) -> None:
    """Tell what sets two versions apart: source, builder, recipes, files and figures."""
    from slmops.infra.storage.comparing import compare_versions

    registry = the_registry()
    found = compare_versions(registry.find(first), registry.find(second), registry)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    rows = [{"what": one.what, found.first: one.first, found.second: one.second} for one in found.differences]
    print_table(f"{found.first} and {found.second}", rows)
    print_line(
        f"{'The same content' if found.same_content else 'Other content'}: {found.shared_bytes / 1e6:,.1f} of "
        f"{found.size_bytes / 1e6:,.1f} MB of {found.second} are in {found.first} too."
    )


def sign(reference: VersionReference) -> None:
    """Sign a version with the key of SLMOPS_STORE__SIGNING_KEY; its signature is kept beside it."""
    from slmops.infra.storage.signatures import sign_version

    registry, manifest = version_of(reference)
    sign_version(registry, manifest, load_settings().store)
    print_line(f"{manifest.reference} is signed (sha256 {manifest.digest}).")


def sbom(reference: Reference) -> None:
    """Print the bill of materials of a version and what it was built with (CycloneDX, JSON)."""
    registry, manifest = version_of(reference)
    recorded = registry.latest_evidence(manifest, "sbom")
    if recorded is None:
        raise BadInput(f"{manifest.reference} has no bill of materials.", "Deploy its checkpoint again: it gets one.")
    recorded.pop("recorded_at")
    print_json(recorded)


def alias(
    reference: Reference,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as `staging`; spelled like a model name.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the alias away.")] = False,
    reason: Annotated[str, typer.Option(help="Why; kept with the alias.")] = "set by hand",
) -> None:
    """Point an alias of your own to a version: NAME@ALIAS names it from then on."""
    registry, manifest = version_of(reference)
    if name == "champion":
        raise BadInput(
            "The champion is what Foundry Local serves; an alias alone cannot change that.",
            f"Promote it: slmops promote {manifest.reference}.",
        )
    if remove:
        registry.remove_alias(manifest.name, name)
        print_line(f"{manifest.name} has no alias {name} now.")
        return
    registry.set_alias(manifest.name, name, manifest.version, reason)
    print_line(f"{manifest.name}@{name} is {manifest.reference}.")


def tag(
    reference: Reference,
    tags: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="KEY= takes a tag away.")],
) -> None:
    """Give a version tags, change them or take them away."""
    registry, manifest = version_of(reference)
    pairs = [text.partition("=") for text in tags]
    bad = next((text for text, (key, mark, _) in zip(tags, pairs, strict=True) if not key or not mark), None)
    if bad is not None:
        raise BadInput(f"The tag {bad!r} is not KEY=VALUE.", "Write, for example, team=kitchen.")
    for key, _, value in pairs:
        registry.set_tag(manifest, key, value or None)
    shown = ", ".join(f"{key}={value}" for key, value in registry.tags(manifest).items())
    print_line(f"{manifest.reference}: {shown or 'no tags'}")


def note(reference: Reference, text: Annotated[str, typer.Argument(help="What is to be remembered of it.")]) -> None:
    """Write a note on a version; slmops show prints them."""
    registry, manifest = version_of(reference)
    if not text.strip():
        raise BadInput("The note is empty.", "Write what is to be remembered.")
    registry.add_note(manifest, text)
    print_line(f"Noted on {manifest.reference}.")
