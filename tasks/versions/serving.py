"""The served models: a name's champion and other versions, from the store or from this machine's copy of it."""

import json
import logging
from pathlib import Path
from typing import Any

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput, SlmopsError
from slmops.infra.files import write_whole
from slmops.infra.foundry.abilities import abilities_of
from slmops.infra.foundry.model_folder import INFERENCE_MODEL
from slmops.infra.foundry.served_model import PlacedModel, ServedVersion
from slmops.infra.records import Json
from slmops.infra.settings import Settings
from slmops.infra.storage.champion_lease import champion_is_changing
from slmops.infra.storage.manifest import Manifest
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.infra.storage.signatures import check_signature
from slmops.tasks.exams.constraint import RESPONSE_FORMAT, ResponseFormat
from slmops.tasks.foundry.ids import champion_model_id
from slmops.tasks.foundry.prompt_template import describe_model, inference_model

LOG = logging.getLogger("slmops.serve")


class StoredModels:
    """The `ModelSource` of a store.

    A version that was served can be served again while the store cannot be reached: its manifest and the number of the
    champion are kept under the home directory, its files in the store's cache. The log then says so.
    """

    def __init__(self, registry: ModelRegistry, settings: Settings) -> None:
        self._registry = registry
        self._settings = settings
        self._kept = settings.cache_dir / "serve"
        self._outage: str | None = None

    def names(self) -> list[str]:
        """Return the names that have a champion."""
        try:
            return [name for name in self._registry.names() if self._registry.alias(name, CHAMPION)]
        except SlmopsError as error:
            kept = sorted(path.stem for path in self._kept.glob("*.json")) if self._kept.is_dir() else []
            if not kept:
                raise
            self._notice(error)
            return kept

    def champion(self, name: str) -> ServedVersion:
        """See `ModelSource.champion`."""
        try:
            number = self._registry.alias(name, CHAMPION)
        except SlmopsError as error:
            kept = self._read(name)
            if kept is None:
                raise
            self._notice(error)
            return ServedVersion(name, kept["champion"], kept["versions"][str(kept["champion"])]["precision"])
        self._outage = None
        if number is None:
            raise BadInput(f"{name} has no champion.", "Deploy a version of it; slmops list shows the names.")
        served = self.version(name, number)
        self._keep(name, number, None, None)
        return served

    def is_changing(self, name: str) -> bool:
        """See `ModelSource.is_changing`."""
        return champion_is_changing(self._registry.objects, name)

    def version(self, name: str, version: int) -> ServedVersion:
        """See `ModelSource.version`."""
        try:
            found = self._registry.version(name, version)
            precision = found.require_serving().precision
        except BadInput:
            raise
        except SlmopsError:
            kept = (self._read(name) or {"versions": {}})["versions"].get(str(version))
            if kept is None:
                raise
            return ServedVersion(name, version, kept["precision"])
        response_format = found.latest(RESPONSE_FORMAT)
        self._keep(name, None, found.manifest, precision, response_format)
        return ServedVersion(name, version, precision)

    def place(self, served: ServedVersion, folder: Path) -> PlacedModel:
        """See `ModelSource.place`; every file's SHA-256 is compared with the manifest's."""
        variant = self._registry.of(self._manifest(served)).variant(served.precision)
        if self._settings.store.require_signature:
            check_signature(variant.version, self._settings.store)
        variant.place(folder)
        variant.check_unaltered(folder)
        template, defaults = describe_model(folder)
        described = inference_model(
            champion_model_id(served.name, served.version), served.version, "", template, defaults
        )
        # Replace the file instead of writing into it, because it may be a hard link to the store's own file.
        write_whole(folder / INFERENCE_MODEL, json.dumps(described, ensure_ascii=False))
        added = read_json(folder / "tokenizer.json").get("added_tokens", [])
        tokens = tuple(str(token["content"]) for token in added if token.get("special"))
        abilities = abilities_of(folder, template.prompt)
        size_bytes = sum(file.size_bytes for file in variant.files)
        return PlacedModel(size_bytes, tokens, abilities, self._response_schema(served))

    def _response_schema(self, served: ServedVersion) -> Json | None:
        try:
            found = self._registry.version(served.name, served.version).latest(RESPONSE_FORMAT)
        except BadInput:
            raise
        except SlmopsError:
            kept = (self._read(served.name) or {"versions": {}})["versions"].get(str(served.version), {})
            schema: Json | None = kept.get("response_schema")
            return schema
        return found.json_schema if found else None

    def _manifest(self, served: ServedVersion) -> Manifest:
        try:
            return self._registry.version(served.name, served.version).manifest
        except BadInput:
            raise
        except SlmopsError:
            kept = (self._read(served.name) or {"versions": {}})["versions"].get(str(served.version))
            if kept is None:
                raise
            return Manifest.model_validate(kept["manifest"])

    def _notice(self, error: SlmopsError) -> None:
        if error.message != self._outage:  # log it once per outage, because the store is read often
            LOG.warning("%s This machine serves from its local copy.", error.message)
        self._outage = error.message

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            kept: dict[str, Any] = json.loads((self._kept / f"{name}.json").read_bytes())
            _ = kept["versions"][str(kept["champion"])]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return kept

    def _keep(
        self,
        name: str,
        champion: int | None,
        manifest: Manifest | None,
        precision: str | None,
        response_format: ResponseFormat | None = None,
    ) -> None:
        path = self._kept / f"{name}.json"
        try:
            kept = json.loads(path.read_bytes())
        except (OSError, ValueError):
            kept = {"champion": None, "versions": {}}
        before = json.dumps(kept)
        if champion is not None:
            kept["champion"] = champion
        if manifest is not None:
            kept["versions"][str(manifest.version)] = {
                "precision": precision,
                "manifest": manifest.model_dump(mode="json"),
                **({"response_schema": response_format.json_schema} if response_format else {}),
            }
        if json.dumps(kept) == before:
            return
        write_whole(path, json.dumps(kept))
