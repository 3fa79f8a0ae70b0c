"""What the catalog lists of a store, and how little of the store it reads for that."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import PassingFault
from slmops.infra.foundry.catalog import CatalogModel
from slmops.infra.storage.copying import copy_version
from slmops.infra.storage.evidence import SELECTION, Selection
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.manifest import Manifest, Source, StoredVariant
from slmops.infra.storage.registry import CHAMPION, ModelRegistry
from slmops.tasks.versions.catalog import StoreCatalog, version_models
from tests.support.genai_models import EMPTY_GRAPH
from tests.support.stores import StoreCase
from tests.support.versions import add_evidence

GENAI_CONFIG = json.dumps({"model": {"context_length": 2048}}).encode()


@pytest.fixture
def registry(store: StoreCase, tmp_path: Path) -> ModelRegistry:
    return store.registry(tmp_path / "home")


@pytest.fixture
def local(tmp_path: Path) -> ModelRegistry:
    return ModelRegistry(LocalObjectStore(tmp_path / "store"))


def commit(registry: ModelRegistry, tmp_path: Path, name: str, content: str, config: bytes = GENAI_CONFIG) -> Manifest:
    """Store a version with an fp16 and an int4 variant."""
    variants = []
    for precision in ("fp16", "int4"):
        folder = tmp_path / f"{name}-{content}-{precision}"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(EMPTY_GRAPH)
        (folder / "NOTICE").write_text(f"{content} {precision}")
        (folder / "genai_config.json").write_bytes(config)
        (folder / "chat_template.jinja").write_text("{{ tools }}<tool_call>{% set a = content.split('</think>') %}")
        variants.append(
            StoredVariant(
                precision=precision,
                device="gpu" if precision == "fp16" else "cpu",
                execution_provider="webgpu" if precision == "fp16" else "cpu",
                recipe=precision,
                recipe_digest="b" * 64,
                files=registry.add_files(folder),
            )
        )
    source = Source(digest="a" * 64, origin="x", architecture="Qwen2ForCausalLM", parameters=1)
    manifest, _ = registry.commit(name, source, {"olive-ai": content}, variants)
    registry.release_files()
    return manifest


def record_deploy(registry: ModelRegistry, manifest: Manifest, selected: str | None, **status: str) -> None:
    variants = [{"precision": precision, "status": one} for precision, one in status.items()]
    registry.of(manifest).record(SELECTION, Selection(selected=selected))
    add_evidence(registry, manifest, "deploy", {"variants": variants, "selected": selected})


def ids(models: list[CatalogModel]) -> list[str]:
    return sorted(model.model_id for model in models)


def test_registered_variants_are_listed_and_the_selected_one_under_the_plain_name(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    both, one, none, unjudged = (commit(registry, tmp_path, "home", content) for content in "abcd")
    other = commit(registry, tmp_path, "garden", "a")
    record_deploy(registry, both, "int4", fp16="registered", int4="registered")
    record_deploy(registry, one, "fp16", fp16="registered", int4="rejected")
    record_deploy(registry, none, None, fp16="rejected", int4="failed")
    record_deploy(registry, other, None, int4="registered")  # over the budget: it passed, and nothing was selected
    models = StoreCatalog(registry).models()
    assert ids(models) == [
        "garden-int4-generic-cpu:1",
        "home-fp16-generic-gpu:1",
        "home-fp16-generic-gpu:2",
        "home-int4-generic-cpu:1",
        "home:1",
        "home:2",
    ]
    assert version_models(registry.of(unjudged)) == []
    by_id = {model.model_id: model for model in models}
    assert by_id["home:2"] == CatalogModel(
        name="home",
        version=2,
        alias="home",
        device="gpu",
        execution_provider="WebGpuExecutionProvider",
        size_bytes=one.variant("fp16").size_bytes,
        display_name="home fp16",
        created_at=one.created_at,
        context_length=2048,
        capabilities=("tool-calling", "reasoning"),
        reasoning=("<think>", "</think>"),
        tool_call=("<tool_call>", "</tool_call>"),
    )
    int4 = by_id["home-int4-generic-cpu:1"]
    assert (int4.alias, int4.device, int4.execution_provider) == ("home-int4", "cpu", "CPUExecutionProvider")


def test_copied_verdicts_are_listed_only_for_the_champion(local: ModelRegistry, tmp_path: Path) -> None:
    there = ModelRegistry(LocalObjectStore(tmp_path / "there"))
    manifest = commit(there, tmp_path, "home", "a")
    record_deploy(there, manifest, "int4", fp16="rejected", int4="registered")
    copy_version(there.of(manifest), local)
    catalog = StoreCatalog(local, listing_age_s=0)
    assert catalog.models() == []
    local.set_alias("home", CHAMPION, 1, "promoted by hand")
    assert ids(catalog.models()) == ["home-int4-generic-cpu:1", "home:1"]
    local.remove_alias("home", CHAMPION)
    assert catalog.models() == []
    record_deploy(local, manifest, "int4", fp16="rejected", int4="registered")
    assert ids(catalog.models()) == ["home-int4-generic-cpu:1", "home:1"]


def test_only_versions_on_which_something_was_stored_are_read_again(
    local: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = [commit(local, tmp_path, "home", str(number)) for number in range(5)]
    for manifest in versions:
        record_deploy(local, manifest, "int4", int4="registered")
    reads: Counter[str] = Counter()
    read_bytes = local.objects.read_bytes

    def counting(key: str) -> bytes:
        reads[key.split("/")[2] if key.startswith("models/") else "blob"] += 1
        return read_bytes(key)

    monkeypatch.setattr(local.objects, "read_bytes", counting)
    catalog = StoreCatalog(local, listing_age_s=0)
    assert len(catalog.models()) == 10
    assert set(reads) == {"1", "2", "3", "4", "5", "blob"}
    reads.clear()
    assert len(catalog.models()) == 10
    assert reads == {}
    record_deploy(local, versions[2], None, int4="rejected")
    local.mark_deleted(versions[4])
    assert ids(catalog.models()) == sorted(
        f"{name}:{number}" for name in ("home", "home-int4-generic-cpu") for number in (1, 2, 4)
    )
    assert set(reads) == {"3"}


def test_the_store_is_listed_once_for_the_pages_of_one_listing(
    local: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_deploy(local, commit(local, tmp_path, "home", "a"), "int4", int4="registered")
    listings = []
    entries = local.version_entries
    monkeypatch.setattr(local, "version_entries", lambda: listings.append(1) or entries())
    catalog = StoreCatalog(local, listing_age_s=60)
    for _ in range(3):
        assert ids(catalog.models()) == ["home-int4-generic-cpu:1", "home:1"]
    assert len(listings) == 1


@pytest.mark.parametrize("damage", ["manifest", "evidence"])
def test_a_version_that_cannot_be_read_hides_no_other(
    local: ModelRegistry, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for content in ("a", "b"):
        record_deploy(local, commit(local, tmp_path, "home", content), "int4", int4="registered")
    keys = [entry.key for entry in local.objects.entries("models/home/1")]
    key = next(key for key in keys if damage in key)
    data = local.objects.read_bytes(key)
    local.objects.put_bytes(key, b"{")
    catalog = StoreCatalog(local, listing_age_s=0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert ids(catalog.models()) == ["home-int4-generic-cpu:2", "home:2"]
    assert [record.message[:27] for record in caplog.records] == ["home@1 is not in the catalo"]
    local.objects.put_bytes(key, data)
    assert len(catalog.models()) == 4


@pytest.mark.parametrize("config", [b"{", b"[]", b"{}", b'{"model": []}', b'{"model": {"context_length": "x"}}'])
def test_a_context_length_that_cannot_be_read_is_left_out(local: ModelRegistry, tmp_path: Path, config: bytes) -> None:
    manifest = commit(local, tmp_path, "home", "a", config)
    record_deploy(local, manifest, "int4", int4="registered")
    assert [model.context_length for model in version_models(local.of(manifest))] == [None, None]
    assert "textContextWindow" not in json.dumps(version_models(local.of(manifest))[0].entry())


def test_an_unreachable_store_is_reported_and_its_models_are_listed_when_it_is_back(
    local: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_deploy(local, commit(local, tmp_path, "home", "a"), "int4", int4="registered")
    catalog = StoreCatalog(local, listing_age_s=60)

    def fail(*_: Any) -> Any:
        raise PassingFault("The store does not answer.", "Try again.")

    for name in ("entries", "read_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(local.objects, name, fail)
            with pytest.raises(PassingFault):
                catalog.models()
    assert len(catalog.models()) == 2
