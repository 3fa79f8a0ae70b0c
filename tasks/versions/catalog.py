"""The catalog's entries: every version in the store, with its variants that passed."""

import json
import logging
import threading
import time

from slmops.infra.errors import BadInput, PassingFault
from slmops.infra.foundry.abilities import Abilities, abilities_of_template
from slmops.infra.foundry.catalog import CatalogModel
from slmops.infra.foundry.model_folder import GENAI_CONFIG
from slmops.infra.genai.served_files import CHAT_TEMPLATE, TOKENIZER_CONFIG
from slmops.infra.storage.evidence import LICENSE
from slmops.infra.storage.model_files import blob_of
from slmops.infra.storage.objects import Entry
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.build.olive_config import OLIVE_PROVIDERS
from slmops.tasks.foundry.ids import champion_model_id, foundry_model_id

LISTING_AGE_S = 2.0

_logger = logging.getLogger(__name__)


class StoreCatalog:
    """The models of a store for its catalog; safe for several threads.

    It lists the store at most once per `listing_age_s`, so one listing of the store is enough for all pages that the
    runtime requests. It reads only versions whose evidence has changed.
    """

    def __init__(self, registry: ModelRegistry, listing_age_s: float = LISTING_AGE_S) -> None:
        self._registry = registry
        self._listing_age_s = listing_age_s
        self._lock = threading.Lock()
        self._listed_at: float | None = None
        self._versions: dict[tuple[str, int], tuple[tuple[Entry, ...], list[CatalogModel]]] = {}
        self._faults: set[str] = set()

    def models(self) -> list[CatalogModel]:
        """Return the models of every version; see `version_models`.

        A version that cannot be read is logged once and left out; the others are listed. Raises `StageFailed` or
        `BadInput` while the store cannot be reached.
        """
        with self._lock:
            if self._listed_at is None or time.monotonic() - self._listed_at >= self._listing_age_s:
                self._read()
                self._listed_at = time.monotonic()
            return [model for _, models in self._versions.values() for model in models]

    def _read(self) -> None:
        found: dict[tuple[str, int], tuple[tuple[Entry, ...], list[CatalogModel]]] = {}
        for key, entries in self._registry.version_entries().items():
            known = self._versions.get(key)
            if known and known[0] == entries:
                found[key] = known
                continue
            try:
                version = self._registry.version(*key)
                # Whether copied evidence counts depends on the champion, which may change without a change of this
                # version.
                stored = () if version.says_origin else entries
                found[key] = stored, version_models(version)
            except PassingFault:
                raise
            except Exception as error:  # a manifest or evidence was altered
                fault = f"{key[0]}@{key[1]} is not in the catalog: {error}"
                if fault not in self._faults:
                    _logger.warning("%s", fault)
                self._faults.add(fault)
        self._versions = found


def version_models(version: Version) -> list[CatalogModel]:
    """Return a version's models: the variant that may serve under the plain name, and all variants under their own ids.

    The latter are those that its last deploy registered. A verdict that was copied with the version counts only for the
    champion.
    """
    if version.says_origin and CHAMPION not in version.aliases:
        return []
    status = {variant.precision: variant.status for variant in version.deployed.variants}
    serving = version.serving
    models = []
    for variant in version.variants:
        if status.get(variant.precision) != "registered":
            continue
        context_length, abilities = _context_length(variant), _abilities(variant)
        model_id = foundry_model_id(version.name, variant.precision, variant.device, version.number)
        models.append(_model(model_id, f"{version.name}-{variant.precision}", variant, context_length, abilities))
        if variant == serving:
            plain_id = champion_model_id(version.name, version.number)
            models.append(_model(plain_id, version.name, variant, context_length, abilities))
    return models


def _model(
    model_id: str, alias: str, variant: Variant, context_length: int | None, abilities: Abilities
) -> CatalogModel:
    marks = abilities.simple_marks
    return CatalogModel(
        name=model_id.rpartition(":")[0],
        version=variant.version.number,
        alias=alias,
        device=variant.device,
        execution_provider=_provider(variant.execution_provider),
        size_bytes=variant.size_bytes,
        display_name=f"{variant.version.name} {variant.precision}",
        created_at=variant.version.manifest.created_at,
        context_length=context_length,
        capabilities=abilities.capabilities,
        reasoning=(marks.start, marks.end) if marks else None,
        tool_call=abilities.call_marks,
        license=known.name if (known := variant.version.latest(LICENSE)) else None,
    )


def _provider(name: str) -> str:
    return OLIVE_PROVIDERS[name][0] if name in OLIVE_PROVIDERS else name


def _context_length(variant: Variant) -> int | None:
    """Return the context length in genai_config.json; None if it cannot be read: a client sees why at loading."""
    config = _stored_json(variant, GENAI_CONFIG)
    model = config.get("model") if isinstance(config, dict) else None
    length = model.get("context_length") if isinstance(model, dict) else None
    return length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else None


def _abilities(variant: Variant) -> Abilities:
    """Return what the chat template shows; nothing if it cannot be read."""
    written = _stored_text(variant, CHAT_TEMPLATE)
    settings = _stored_json(variant, TOKENIZER_CONFIG) if written is None else None
    template = written or (settings.get("chat_template") if isinstance(settings, dict) else None)
    try:
        return abilities_of_template(template if isinstance(template, str) else "", {})
    except BadInput:
        return Abilities()


def _stored_json(variant: Variant, path: str) -> object:
    try:
        return json.loads(_stored_text(variant, path) or "null")
    except ValueError:
        return None


def _stored_text(variant: Variant, path: str) -> str | None:
    file = next((file for file in variant.files if file.path == path), None)
    try:
        return variant.version.registry.objects.read_bytes(blob_of(file).key).decode() if file else None
    except (KeyError, ValueError):
        return None
