"""The assets of a run: their keys, which Prefect allows, and which say nothing of a user's folders."""

from pathlib import Path

import pytest

from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.tasks.runs.assets import champion_asset, checkpoint_asset, dataset_asset, version_asset
from tests.support.versions import SOURCE, store_version

DIGEST = "c" * 64


@pytest.mark.parametrize(
    ("origin", "key"),
    [
        ("/home/me/chats.jsonl", f"dataset://sha256/{DIGEST}"),
        ("me/chats", f"dataset://sha256/{DIGEST}"),
        ("s3://chats/of 2026?/[all].jsonl", "s3://chats/of_2026_/_all_.jsonl"),
        ("s3://chats/all/", "s3://chats/all"),
    ],
)
def test_a_dataset_on_s3_has_its_address_and_another_one_the_digest_of_its_rows(origin: str, key: str) -> None:
    asset = dataset_asset(origin, DIGEST)
    assert asset.key == key
    assert asset.properties and asset.properties.name == "dataset cccccccccccc"


def test_a_checkpoint_is_the_same_asset_wherever_it_lies() -> None:
    moved = SOURCE.model_copy(update={"origin": "/elsewhere"})
    assert checkpoint_asset(SOURCE) == checkpoint_asset(moved)


def test_a_version_and_the_champion_lie_in_their_store(tmp_path: Path) -> None:
    registry = ModelRegistry(LocalObjectStore(tmp_path / "a store"))
    version = registry.of(store_version(registry, tmp_path / "files"))
    models = f"{tmp_path.as_uri()}/a_20store/models/home"
    assert version_asset(version).key == f"{models}/1"
    assert champion_asset(version).key == f"{models}/aliases/champion"


def test_no_address_is_too_long_for_prefect() -> None:
    first, second = (dataset_asset(f"s3://chats/{'long' * 200}/{name}", DIGEST) for name in "ab")
    assert len(first.key) < 100
    assert first != second
