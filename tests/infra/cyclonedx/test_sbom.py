"""The bill of materials: valid by CycloneDX's own validator, complete, reproducible, without secrets."""

import json
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from slmops.infra.cyclonedx.sbom import installed_packages, version_sbom
from slmops.infra.storage.manifest import Manifest, Source, StoredFile, StoredVariant
from tests.infra.storage import test_registry

RECORDED_AT = "2026-11-22T10:00:00.123456+00:00"
PACKAGES = {"torch": "2.13.0+cpu", "onnx-ir": "1.0"}
SOURCE = Source(digest="a" * 64, origin="acme/home-0.5b", architecture="Qwen2ForCausalLM", parameters=494_000_000)
VALIDATOR = JsonStrictValidator(SchemaVersion.V1_6)


def variant(precision: str, first: str) -> StoredVariant:
    return StoredVariant(
        precision=precision,
        device="cpu",
        execution_provider="cpu",
        recipe=f"cpu-{precision}",
        recipe_digest="b" * 64,
        files=(
            StoredFile(path="model.onnx", sha256=first * 64, size_bytes=7),
            StoredFile(path="sub/tokenizer.json", sha256="e" * 64, size_bytes=2),
        ),
    )


MANIFEST = Manifest(
    name="home",
    version=3,
    source=SOURCE,
    builder={"olive-ai": "0.13.0"},
    variants=(variant("fp16", "c"), variant("int4", "d")),
    created_at="2026-11-22T09:00:00+00:00",
)


def of_source(**fields: Any) -> dict[str, Any]:
    source = SOURCE.model_copy(update=fields)
    return version_sbom(MANIFEST.model_copy(update={"source": source}), PACKAGES, RECORDED_AT)


def assert_valid(document: dict[str, Any]) -> None:
    assert VALIDATOR.validate_str(json.dumps(document)) is None


def components(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every component that has a reference, by it, at any depth; fails when two have the same."""
    found, waiting = {}, [document["metadata"]["component"], *document["components"]]
    while waiting:
        component = waiting.pop()
        assert found.setdefault(component["bom-ref"], component) is component
        waiting += component.get("components", [])
    return found


def sha256(component: dict[str, Any]) -> str:
    (one,) = component["hashes"]
    assert one["alg"] == "SHA-256"
    return str(one["content"])


def properties(component: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in component["properties"]}


class TestVersionSbom:
    def test_it_is_a_valid_document_of_the_version(self) -> None:
        document = version_sbom(MANIFEST, PACKAGES, RECORDED_AT)
        assert_valid(document)
        assert (document["bomFormat"], document["specVersion"], document["version"]) == ("CycloneDX", "1.6", 1)
        assert document["metadata"]["timestamp"] == RECORDED_AT
        version = document["metadata"]["component"]
        assert (version["type"], version["name"], version["version"]) == ("machine-learning-model", "home", "3")
        assert (version["bom-ref"], sha256(version)) == ("home@3", MANIFEST.digest)
        assert properties(version) == {
            "slmops:identity": MANIFEST.identity,
            "slmops:source_digest": "a" * 64,
            "slmops:created_at": "2026-11-22T09:00:00+00:00",
            "slmops:builder:olive-ai": "0.13.0",
        }

    def test_the_validator_finds_what_is_wrong(self) -> None:
        document = version_sbom(MANIFEST, PACKAGES, RECORDED_AT)
        document["components"][0]["type"] = "model"
        assert VALIDATOR.validate_str(json.dumps(document)) is not None

    def test_every_variant_and_file_is_listed(self) -> None:
        found = components(version_sbom(MANIFEST, PACKAGES, RECORDED_AT))
        for variant in MANIFEST.variants:
            component = found[f"home@3/{variant.precision}"]
            assert (component["type"], component["name"]) == ("machine-learning-model", f"home@3/{variant.precision}")
            assert properties(component) == {
                "slmops:precision": variant.precision,
                "slmops:execution_provider": "cpu",
                "slmops:device": "cpu",
                "slmops:recipe": f"cpu-{variant.precision}",
                "slmops:recipe_digest": "b" * 64,
                "slmops:digest": variant.digest,
                "slmops:size_bytes": "9",
            }
            files = {(file["type"], file["name"], sha256(file)) for file in component["components"]}
            assert files == {("file", file.path, file.sha256) for file in variant.files}
            assert found[f"home@3/{variant.precision}/model.onnx"]["properties"] == [
                {"name": "slmops:size_bytes", "value": "7"}
            ]

    def test_the_source_is_a_component_and_the_versions_ancestor(self) -> None:
        document = of_source(training_run="https://mlflow.example/runs/7")
        source = components(document)["source:" + "a" * 64]
        assert (source["type"], source["name"], sha256(source)) == (
            "machine-learning-model",
            "acme/home-0.5b",
            "a" * 64,
        )
        assert properties(source) == {
            "slmops:architecture": "Qwen2ForCausalLM",
            "slmops:parameters": "494000000",
            "slmops:training_run": "https://mlflow.example/runs/7",
        }
        (ancestor,) = document["metadata"]["component"]["pedigree"]["ancestors"]
        assert ancestor == {key: value for key, value in source.items() if key != "bom-ref"}

    def test_packages_are_libraries_with_canonical_names(self) -> None:
        found = components(version_sbom(MANIFEST, {"Torch": "2.13.0+cpu", "onnx_ir": "1.0"}, RECORDED_AT))
        torch, onnx_ir = found["pkg:pypi/torch@2.13.0%2Bcpu"], found["pkg:pypi/onnx-ir@1.0"]
        assert (torch["type"], torch["name"], torch["version"]) == ("library", "torch", "2.13.0+cpu")
        assert (torch["purl"], onnx_ir["purl"]) == ("pkg:pypi/torch@2.13.0%2Bcpu", "pkg:pypi/onnx-ir@1.0")
        assert onnx_ir["name"] == "onnx-ir"

    def test_who_depends_on_whom(self) -> None:
        document = version_sbom(MANIFEST, PACKAGES, RECORDED_AT)
        graph = {dependency["ref"]: set(dependency.get("dependsOn", [])) for dependency in document["dependencies"]}
        stack = {"pkg:pypi/torch@2.13.0%2Bcpu", "pkg:pypi/onnx-ir@1.0"}
        source = "source:" + "a" * 64
        assert graph == {
            "home@3": {"home@3/fp16", "home@3/int4"},
            "home@3/fp16": {source, *stack},
            "home@3/int4": {source, *stack},
            source: set(),
            **{package: set() for package in stack},
        }

    def test_the_same_input_gives_the_same_document(self) -> None:
        document = version_sbom(MANIFEST, PACKAGES, RECORDED_AT)
        shuffled = MANIFEST.model_copy(update={"variants": MANIFEST.variants[::-1]})
        assert json.dumps(version_sbom(MANIFEST, dict(reversed(PACKAGES.items())), RECORDED_AT)) == json.dumps(document)
        assert version_sbom(shuffled, PACKAGES, RECORDED_AT)["components"] == document["components"]
        later = version_sbom(MANIFEST, PACKAGES, "2027-01-01T00:00:00Z")
        assert later["serialNumber"] == document["serialNumber"]
        assert later["metadata"]["timestamp"] == "2027-01-01T00:00:00+00:00"
        other = version_sbom(MANIFEST.model_copy(update={"version": 4}), PACKAGES, RECORDED_AT)
        assert other["serialNumber"] != document["serialNumber"]

    @pytest.fixture
    def far_east(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A local time nine hours ahead of UTC, where the system lets a process choose."""
        choose = getattr(time, "tzset", lambda: None)
        with monkeypatch.context() as patch:
            patch.setenv("TZ", "JST-9")
            choose()
            yield
        choose()

    @pytest.mark.usefixtures("far_east")
    def test_a_time_without_a_zone_is_in_utc(self) -> None:
        document = version_sbom(MANIFEST, PACKAGES, "2026-11-22T10:00:00")
        assert document["metadata"]["timestamp"] == "2026-11-22T10:00:00+00:00"
        assert_valid(document)
        with pytest.raises(ValueError, match="isoformat"):
            version_sbom(MANIFEST, PACKAGES, "yesterday")

    @pytest.mark.parametrize(
        ("origin", "shown"),
        [
            ("https://user:secret@example.com/m?x=1", "https://example.com/m?x=1"),
            ("https://secret@example.com:8443/a/b", "https://example.com:8443/a/b"),
            ("https://user:se@cret@example.com/m", "https://example.com/m"),
            ("s3+https://user:secret@example.com", "s3+https://example.com"),
            ("https://example.com/user:pass@host/m", "https://example.com/user:pass@host/m"),
            ("s3://bucket/home@3", "s3://bucket/home@3"),
            ("owner/name", "owner/name"),
            ("/data/user:pass@host/model", "/data/user:pass@host/model"),
            ("./a@b", "./a@b"),
            ("C:\\models\\a:b@c", "C:\\models\\a:b@c"),
            ("C://models@home/m", "C://models@home/m"),
        ],
    )
    def test_credentials_are_left_out_and_paths_kept(self, origin: str, shown: str) -> None:
        document = of_source(origin=origin, training_run=origin)
        source = components(document)["source:" + "a" * 64]
        assert (source["name"], properties(source)["slmops:training_run"]) == (shown, shown)
        assert document["metadata"]["component"]["pedigree"]["ancestors"][0]["name"] == shown
        assert "secret" not in json.dumps(document)
        assert_valid(document)

    @pytest.mark.filterwarnings("ignore:The Component this BOM is describing")
    @settings(deadline=None)
    @given(
        test_registry.TestManifest.manifests,
        st.dictionaries(
            st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True).map(canonicalize_name),
            st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,2}(rc1|\.dev3)?(\+[a-z0-9]{1,5})?", fullmatch=True),
            max_size=4,
        ),
    )
    def test_every_manifest_gives_a_valid_and_complete_document(
        self, manifest: Manifest, packages: dict[str, str]
    ) -> None:
        document = version_sbom(manifest, packages, RECORDED_AT)
        assert_valid(document)
        assert document == version_sbom(manifest, packages, RECORDED_AT)
        found = components(document)
        for variant in manifest.variants:
            for file in variant.files:
                component = found[f"{manifest.reference}/{variant.precision}/{file.path}"]
                assert (component["name"], sha256(component)) == (file.path, file.sha256)
        files = sum(len(variant.files) for variant in manifest.variants)
        assert len(found) == 2 + len(manifest.variants) + files + len(packages)
        assert {
            name: found[f"pkg:pypi/{name}@{number.replace('+', '%2B')}"]["version"] for name, number in packages.items()
        } == packages


class TestInstalledPackages:
    def test_what_olive_needs_is_found_in_the_installed_versions(self) -> None:
        found = installed_packages(["olive-ai"])
        assert {"olive-ai", "onnx", "torch", "numpy", "transformers"} <= set(found)
        # A dependency of a dependency: Olive does not ask for it itself.
        assert "sympy" in found
        asked = {Requirement(text).name for text in metadata.requires("olive-ai") or []}
        assert "sympy" not in asked
        assert found == {name: metadata.version(name) for name in found}
        assert list(found) == sorted(canonicalize_name(name) for name in found)
        assert "pytest" not in found

    def test_a_stack_gives_a_valid_document(self) -> None:
        packages = installed_packages(["olive-ai", "onnxruntime-genai", "transformers"])
        assert_valid(version_sbom(MANIFEST, packages, RECORDED_AT))

    @pytest.fixture
    def site(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder on the path with made-up distributions, which need each other in several ways."""
        requirements = {
            "Demo_Root": [
                "demo.leaf >= 1; python_version >= '3'",
                "demo-never; python_version < '3'",
                "demo-extra; extra == 'More_Things'",
                "demo-missing",
                "demo-server[fast]",
            ],
            "demo.leaf": ["demo-root"],
            "demo-never": [],
            "demo-extra": ["demo-missing; extra == 'x'"],
            "demo-server": ["demo-fast[fast,deep]; extra == 'fast'", "demo-slow; extra == 'slow'", "demo-root[deep]"],
            "demo-fast": ["demo-server", "demo-deep; extra == 'deep'"],
            "demo-slow": [],
            "demo-deep": [],
        }
        for number, (name, required) in enumerate(requirements.items(), 1):
            folder = tmp_path / f"{canonicalize_name(name).replace('-', '_')}-{number}.0.dist-info"
            folder.mkdir()
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {number}.0"]
            lines += [f"Requires-Dist: {requirement}" for requirement in required]
            (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(tmp_path)
        return tmp_path

    @pytest.mark.usefixtures("site")
    def test_markers_and_extras_decide_and_names_are_canonical(self) -> None:
        found = {"demo-root": "1.0", "demo-leaf": "2.0", "demo-server": "5.0", "demo-fast": "6.0", "demo-deep": "8.0"}
        assert installed_packages(["demo.root"]) == installed_packages(["demo_leaf"]) == dict(sorted(found.items()))
        assert installed_packages(["Demo-Root[more-things]"]) == dict(sorted({**found, "demo-extra": "4.0"}.items()))

    @pytest.mark.usefixtures("site")
    def test_an_extra_that_is_required_later_is_followed_too(self) -> None:
        for roots in (["demo-server[slow]", "demo-server"], ["demo-server", "demo-server[slow]"]):
            assert installed_packages(roots)["demo-slow"] == "7.0"
        assert "demo-slow" not in installed_packages(["demo-server"])

    def test_what_is_not_installed_is_left_out(self) -> None:
        assert installed_packages(["no-such-distribution"]) == {}
        assert installed_packages([]) == {}
