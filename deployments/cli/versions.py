"""The commands for versions: list, show, compare, annotate, sign and delete them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slmops.deployments.cli import completion
from slmops.deployments.cli.options import Json, Reference, VersionReference
from slmops.deployments.cli.output import (
    print_error,
    print_fact,
    print_json,
    print_line,
    print_prose,
    print_table,
    sized,
)
from slmops.deployments.cli.running import load_settings, the_registry, version_of
from slmops.infra.errors import BadInput, PassingFault, StageFailed

if TYPE_CHECKING:
    from slmops.infra.storage.version import Version

SomeModel = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="Name of a model; default: all.", autocompletion=completion.names),
]


def list_models(name: SomeModel = None, as_json: Json = False) -> None:
    """List the versions in the store, or those of one model."""
    from slmops.infra.storage.evidence import DamagedEvidence

    registry = the_registry()
    if name is not None:
        registry.version(name)  # refuses a name without a version
    models: list[dict[str, Any]] = []
    damaged: list[StageFailed] = []
    for model in registry.names() if name is None else [name]:
        try:
            versions = registry.versions(model)
        except PassingFault:  # the store is not reached: neither are the others
            raise
        except StageFailed as error:  # a manifest concerns one model: the others are listed
            damaged.append(error)
            continue
        for version in versions:
            try:
                models.append(_listed(version))
            except DamagedEvidence as error:  # it concerns one version: the others are listed
                damaged.append(error)
    if as_json:
        if damaged:
            raise damaged[0]
        print_json({"models": models})
        return
    rows = [
        {
            "version": f"{model['name']}@{model['version']}",
            "aliases": ", ".join(model["aliases"]) or "-",
            "tags": ", ".join(f"{tag}={value}" for tag, value in model["tags"].items()) or "-",
            "variants": ", ".join(
                f"{variant['precision']} {_status(variant)} ({sized(variant['size_bytes'])})"
                for variant in model["variants"]
            )
            + (", says its origin" if model["says_origin"] else ""),
        }
        for model in models
    ]
    print_table("Models", rows)
    if damaged:
        for other in damaged[1:]:
            print_error(other, as_json=False)
        raise damaged[0]
    if not rows:
        print_line("The store is empty. Start with: slmops deploy CHECKPOINT --name NAME")


def _listed(version: "Version") -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.number,
        "aliases": list(version.aliases),
        "tags": version.tags,
        "created_at": version.manifest.created_at,
        "says_origin": version.says_origin,
        "variants": _variants(version),
    }


def show(reference: Reference, as_json: Json = False) -> None:
    """Show a version: its source, files, evidence, figures and verdicts."""
    from slmops.infra.storage.signatures import is_signed

    version = version_of(reference)
    manifest, signed = version.manifest, is_signed(version)
    if as_json:
        kept = {"aliases": version.aliases, "tags": version.tags, "deploy": _last_deploy(version)}
        notes = [{"at": note.at, "text": note.value.text} for note in version.notes]
        stored = {"signed": signed, "digest": manifest.digest, "uri": version.uri}
        print_json({**manifest.model_dump(), **kept, "says_origin": version.says_origin, "notes": notes, **stored})
        return
    source = manifest.source
    made = " ".join(manifest.created_at.split())
    print_line(f"{version.reference}  {made}  aliases: {', '.join(version.aliases) or '-'}")
    print_fact("source", f"{source.origin} ({source.architecture}, {source.parameters:,} parameters)")
    print_line(f"        sha256 {source.digest}")
    if source.training_run:
        print_fact("training run", source.training_run)
    print_line(f"stored: {version.uri}")
    print_line(f"        sha256 {manifest.digest}, {'signed' if signed else 'not signed'}")
    for tag, value in version.tags.items():
        print_fact("tag", f"{tag}={value}")
    for note in version.notes:
        print_fact(f"note of {note.at[:19]}", note.value.text)
    print_fact("built by", ", ".join(f"{name} {number}" for name, number in manifest.builder.items()))
    files = [
        {"variant": variant.precision, "file": file.path, "size": f"{file.size_bytes:,}", "sha256": file.sha256[:16]}
        for variant in version.variants
        for file in variant.files
    ]
    print_table("Files", files)
    print_table("Variants (says its origin)" if version.says_origin else "Variants", list(_judged(version)))
    for line in _rejections(version):
        print_line(line)
    for text in _warnings(version):
        print_prose(f"warning: {text}")
    if not version.deployed.variants:
        print_line(f"Nothing is judged yet. Judge it: slmops regate {version.reference}")
    if version.report("report.html"):
        print_line(f"report: slmops open {version.reference}")


FIGURES = {
    "ttft_ms": ("TTFT ms", "{:,.0f}"),
    "token_generation_throughput_tps": ("new tok/s", "{:,.1f}"),
    "peak_rss_bytes": ("peak MB", "{:,.0f}"),
    "kl_divergence": ("KL", "{:.3g}"),
    "score": ("score", "{:.1%}"),
}


def _judged(version: "Version") -> Iterator[dict[str, str]]:
    """Yield each variant's status, size and figures."""
    deployed = version.deployed
    for variant in _variants(version):
        judged = deployed.variant(variant["precision"])
        row = {"variant": variant["precision"], "status": _status(variant)}
        row["size MB"] = f"{variant['size_bytes'] / 1e6:,.1f}"
        for metric, (title, form) in FIGURES.items():
            value = judged.metrics.get(metric) if judged else None
            scaled = value / 1e6 if value is not None and metric.endswith("_bytes") else value
            row[title] = "-" if scaled is None else form.format(scaled)
        yield row


def _rejections(version: "Version") -> Iterator[str]:
    """Yield the reason for each rejected or failed variant, and what would help, as the last deploy recorded it."""
    for variant in version.deployed.variants:
        said = variant.model_extra or {}
        reason = said.get("error") or said.get("reason")
        if variant.status != "registered" and reason:
            yield f"{variant.precision}: {reason}"
            if said.get("what_to_do"):
                yield f"  {said['what_to_do']}"


def _warnings(version: "Version") -> list[str]:
    """Return the warnings of the last deploy, such as that it was only a first look."""
    said = (version.deployed.model_extra or {}).get("warnings")
    return [text for text in said if isinstance(text, str)] if isinstance(said, list | tuple) else []


def _last_deploy(version: "Version") -> dict[str, object]:
    """Return the record of the last deploy as it is stored, and the time when it was recorded."""
    from slmops.infra.storage.evidence import DEPLOY

    records = version.records(DEPLOY)
    if not records:
        return {}
    return {**DEPLOY.to_content(records[-1].value), "recorded_at": records[-1].at}


def _variants(version: "Version") -> list[dict[str, Any]]:
    deployed = {variant.precision: variant for variant in version.deployed.variants}
    judged = {precision: (variant.status, list(variant.allowed)) for precision, variant in deployed.items()}
    found = []
    for variant in version.variants:
        status, allowed = judged.get(variant.precision, (None, []))
        found.append(
            {
                "precision": variant.precision,
                "status": status,
                "allowed": allowed,
                "size_bytes": variant.size_bytes,
            }
        )
    return found


def _status(variant: dict[str, Any]) -> str:
    in_spite = f" IN SPITE OF {', '.join(variant['allowed'])}" if variant["allowed"] else ""
    return f"{variant['status'] or 'not judged'}{in_spite}"


def delete(
    reference: VersionReference,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Unregister a version and remove it from the store, or remove an input. A number is never used again."""
    from slmops.infra.storage.garbage import delete_version
    from slmops.infra.storage.inputs import is_input_address

    settings = load_settings()
    if is_input_address(reference):
        _delete_input(reference, yes=yes)
        return
    version = version_of(reference)
    if "@" not in reference:
        raise BadInput(f"{reference!r} names no version.", f"Write, for example, {version.reference}.")
    if not yes:
        _confirm(f"Delete {version.reference} and unregister it?")
    from slmops.tasks.foundry.registration import unregister_version

    unregister_version(version, settings)
    freed = delete_version(version)
    print_line(f"Deleted {version.reference}; {sized(freed or 0)} freed.")


def _delete_input(address: str, *, yes: bool) -> None:
    from slmops.infra.storage.inputs import delete_input, read_input

    registry = the_registry()
    found = read_input(registry, address)
    if not yes:
        _confirm(f"Delete {address} ({found.name}) from the store?")
    delete_input(registry, address)
    print_line(f"Deleted {address} ({found.name}); slmops gc frees its bytes.")


def _confirm(question: str) -> None:
    """Ask, and end the command unless the answer is yes; raises `BadInput` where there is no answer."""
    try:
        if not typer.confirm(question, err=True):
            raise typer.Exit(1)
    except typer.Abort:
        raise BadInput(
            "Nothing was deleted: the question was not answered.",
            "Answer y or n, or give --yes where nobody can answer.",
            code="not-confirmed",
        ) from None


def unregister(reference: Reference) -> None:
    """Unregister a version from Foundry Local; it stays in the store."""
    settings = load_settings()
    version = version_of(reference)
    from slmops.tasks.foundry.registration import unregister_version

    removed = unregister_version(version, settings)
    print_line(f"Unregistered {', '.join(removed) or 'nothing: ' + version.reference + ' was not registered'}.")


def chat(reference: Reference) -> None:
    """Talk to a registered model through Foundry Local; an empty line ends the chat."""
    settings = load_settings()
    version = version_of(reference)
    from slmops.deployments.cli.chat import chat_with

    chat_with(version, settings)


def diff(
    first: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    second: Annotated[str, typer.Argument(metavar="NAME@VERSION")],
    as_json: Json = False,
) -> None:
    """List the differences between two versions: source, builder, recipes, files and figures."""
    from slmops.infra.storage.comparing import compare_versions

    registry = the_registry()
    found = compare_versions(registry.find(first), registry.find(second))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    rows = [
        {"what": difference.what, found.first: difference.first, found.second: difference.second}
        for difference in found.differences
    ]
    print_table(f"{found.first} and {found.second}", rows)
    print_line(
        f"{'The same content' if found.same_content else 'Other content'}: {found.shared_bytes / 1e6:,.1f} of "
        f"{found.size_bytes / 1e6:,.1f} MB of {found.second} are in {found.first} too."
    )


def sign(reference: VersionReference) -> None:
    """Sign a version with the key of SLMOPS_STORE__SIGNING_KEY; the signature is stored with it."""
    from slmops.infra.storage.signatures import sign_version

    version = version_of(reference)
    sign_version(version, load_settings().store)
    print_line(f"{version.reference} is signed (sha256 {version.manifest.digest}).")


def sbom(reference: Reference) -> None:
    """Print the bill of materials of a version and of its build environment (CycloneDX, JSON)."""
    from slmops.infra.storage.evidence import SBOM

    version = version_of(reference)
    bill = version.latest(SBOM)
    if bill is None:
        raise BadInput(f"{version.reference} has no bill of materials.", "Deploy its checkpoint again to make one.")
    print_json(bill)


def alias(
    reference: Reference,
    name: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as `staging`; spelled like a model name.")],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    reason: Annotated[str, typer.Option(help="Reason; kept with the alias.")] = "set by hand",
) -> None:
    """Point an alias of your own to a version: NAME@ALIAS names it from then on."""
    version = version_of(reference)
    if name == "champion":
        raise BadInput(
            "The champion is what Foundry Local serves; an alias alone cannot change that.",
            f"Promote it: slmops promote {version.reference}.",
        )
    if remove:
        version.registry.remove_alias(version.name, name)
        print_line(f"{version.name} has no alias {name} now.")
        return
    version.registry.set_alias(version.name, name, version.number, reason)
    print_line(f"{version.name}@{name} is {version.reference}.")


def tag(
    reference: Reference,
    tags: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="KEY= removes a tag.")],
) -> None:
    """Set, change or remove tags of a version."""
    version = version_of(reference)
    pairs = [text.partition("=") for text in tags]
    bad = next((text for text, (key, mark, _) in zip(tags, pairs, strict=True) if not key or not mark), None)
    if bad is not None:
        raise BadInput(f"The tag {bad!r} is not KEY=VALUE.", "Write, for example, team=kitchen.")
    for key, _, value in pairs:
        version.set_tag(key, value or None)
    shown = ", ".join(f"{key}={value}" for key, value in version.tags.items())
    print_line(f"{version.reference}: {shown or 'no tags'}")


def note(reference: Reference, text: Annotated[str, typer.Argument(help="Text of the note.")]) -> None:
    """Write a note on a version; slmops show prints them."""
    version = version_of(reference)
    if not text.strip():
        raise BadInput("The note is empty.", "Give the text of the note.")
    version.add_note(text)
    print_line(f"Noted on {version.reference}.")
