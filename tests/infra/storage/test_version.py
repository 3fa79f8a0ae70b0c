"""A version in its registry: its records by kind, its variants, and what is said of a record that is damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.storage.evidence import DEPLOY, SELECTION, DamagedEvidence, Deployed, DeployedVariant, Kind, Selection
from slmops.infra.storage.local import LocalObjectStore
from slmops.infra.storage.registry import ModelRegistry
from slmops.infra.storage.version import Version
from tests.support.errors import coded
from tests.support.versions import FILES, store_version


class Weight(BaseModel):
    """A record with an alias and a tuple, both of which are otherwise on disk."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    schema_number: int = Field(alias="schema")
    grams: tuple[float, ...]


WEIGHT = Kind("weight", Weight)
FACTS = Kind("facts", dict[str, Any])


@pytest.fixture
def version(tmp_path: Path) -> Version:
    registry = ModelRegistry(LocalObjectStore(tmp_path / "store"))
    return registry.of(store_version(registry, tmp_path / "files"))


def test_a_record_is_read_as_what_was_recorded(version: Version) -> None:
    assert version.latest(WEIGHT) is None
    version.record(WEIGHT, Weight(schema_number=1, grams=(1.5,)))
    version.record(WEIGHT, Weight(schema_number=1, grams=(2.5, 3.0)))
    assert version.latest(WEIGHT) == Weight(schema_number=1, grams=(2.5, 3.0))
    assert [record.grams for record in version.all(WEIGHT)] == [(1.5,), (2.5, 3.0)]
    times = [record.at for record in version.records(WEIGHT)]
    assert times == sorted(times)
    version.record(FACTS, {"built": {"on": "Linux"}})
    assert version.latest(FACTS) == {"built": {"on": "Linux"}}


def test_a_record_with_a_key_answers_that_question_alone_and_is_kept_once(version: Version) -> None:
    for grams in ((1.0,), (2.0,)):
        version.record(WEIGHT, Weight(schema_number=1, grams=grams), "0" * 16)
    version.record(WEIGHT, Weight(schema_number=1, grams=(9.0,)), "1" * 16)
    assert version.latest(WEIGHT, "0" * 16) == Weight(schema_number=1, grams=(2.0,))
    assert version.latest(WEIGHT, "2" * 16) is None
    assert len(version.all(WEIGHT)) == 2
    content = json.loads(version.registry.objects.read_bytes(version.evidence_key(f"weight-{'1' * 16}.json")))
    assert content["content"] == {"schema": 1, "grams": [9.0]}
    assert content["manifest"] == version.manifest.digest


def test_an_answer_is_stored_with_its_question(version: Version) -> None:
    answer = Kind("answer", Weight, field="weight")
    for unit in ("g", "oz"):
        version.record(answer, Weight(schema_number=1, grams=(1.0,)), beside={"unit": unit})
    records = version.records(answer)
    assert records[0].content == {"unit": "g", "weight": {"schema": 1, "grams": [1.0]}}
    assert records[0].value == Weight(schema_number=1, grams=(1.0,))
    (imperial,) = version.records(answer, where=lambda content: content["unit"] == "oz")
    assert imperial.content["unit"] == "oz"
    version.record(Kind("answer", dict[str, Any]), {"unit": "lb"})
    assert len(version.all(answer, where=lambda content: content["unit"] != "lb")) == 2
    with pytest.raises(DamagedEvidence):
        version.all(answer)


def test_a_figure_that_is_no_number_is_refused_where_it_is_written(version: Version) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        version.record(FACTS, {"grams": float("nan")})
    assert version.all(FACTS) == []


def test_a_kind_whose_name_begins_another_ones_is_another_kind(version: Version) -> None:
    version.record(Kind("weight-empty", dict[str, Any]), {"grams": 0})
    assert version.all(WEIGHT) == []


def test_a_variant_places_its_files(version: Version, tmp_path: Path) -> None:
    files = {"genai_config.json": b'{"model": {"type": "qwen2"}}', "LICENSE": b"MIT"}
    model = version.registry.of(store_version(version.registry, tmp_path / "model files", files, "away"))
    model.variant("int4").place(tmp_path / "model")
    assert {name: (tmp_path / "model" / name).read_bytes() for name in files} == files
    with pytest.raises(StageFailed, check=coded("genai-config-missing", "home@1 int4")):
        version.variant("int4").place(tmp_path / "no model")
    with pytest.raises(BadInput, check=coded("variant-missing", "'int8'")):
        version.variant("int8")


def test_a_variant_knows_its_version_and_its_address(version: Version) -> None:
    (variant,) = version.variants
    assert (variant.precision, variant.version) == ("int4", version)
    assert variant.uri == f"{version.uri}#int4"
    assert variant.size_bytes == sum(map(len, FILES.values()))


def test_what_was_selected_last_serves(version: Version) -> None:
    version.record(SELECTION, Selection(selected="int4", reason="it is the smallest"))
    assert version.serving == version.variant("int4")
    version.record(SELECTION, Selection(selected=None))
    assert version.serving is None
    with pytest.raises(BadInput, check=coded("version-not-proven", "int4 registered")):
        version.require_serving()


@pytest.mark.parametrize(("status", "serves"), [("registered", True), ("rejected", False), ("failed", False)])
def test_a_deploy_that_was_recorded_later_has_to_have_it_registered(
    version: Version, status: str, serves: bool
) -> None:
    version.record(DEPLOY, Deployed(variants=(DeployedVariant(precision="int4", status="rejected"),)))
    version.record(SELECTION, Selection(selected="int4"))
    assert version.serving is not None  # the run that selects records its deploy at its end
    version.record(DEPLOY, Deployed(variants=(DeployedVariant(precision="int4", status=status),)))
    assert (version.serving is not None) == serves
    version.record(SELECTION, Selection(selected="int8"))
    assert version.serving is None  # the version has no such variant


def _content(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        record = json.loads(data)
        change(record)
        return json.dumps(record).encode()

    return damage


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "not text": lambda data: b"\xff\xfe" + data,
    "no JSON": lambda data: b"<html>502 Bad Gateway</html>",
    "no object": lambda data: b"[]",
    "nothing": lambda data: b"null",
    "nested without end": lambda data: b"[" * 100_000,
    "no content": _content(lambda record: record.pop("content")),
    "content of another type": _content(lambda record: record.update(content=[1])),
    "no time": _content(lambda record: record.pop("recorded_at")),
    "a field is gone": _content(lambda record: record["content"].pop("grams")),
    "a field of another type": _content(lambda record: record["content"].update(grams="heavy")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named_with_the_reason_and_what_to_do(damage: str, version: Version) -> None:
    version.record(WEIGHT, Weight(schema_number=1, grams=(1.0,)), "0" * 16)
    key = version.evidence_key(f"weight-{'0' * 16}.json")
    data = version.registry.objects.read_bytes(key)
    version.registry.objects.put_bytes(key, DAMAGE[damage](data))
    with pytest.raises(DamagedEvidence) as refused:
        version.latest(WEIGHT)
    assert version.registry.objects.uri(key) in refused.value.message
    assert version.reference in refused.value.message
    assert "\n" not in str(refused.value)
    assert "restore it" in refused.value.what_to_do
    assert refused.value.exit_code == 1
