"""Recipes, and the reading of a user's own Olive file."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.errors import BadInput
from infra.olive.options import BUILDER_OPTIONS, olive_pass_types
from tasks.build import KNOWN_KEYS, RECIPES_DIR, Recipe, load_recipe, olive_run_config, read_olive_config

OLD_FORM: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "/somewhere/else", "task": "text-generation"},
    "systems": {
        "local_system": {
            "type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
        }
    },
    "passes": {
        "builder": {
            "type": "ModelBuilder",
            "config": {"precision": "int4", "quantization_config": {"block_size": 128, "is_symmetric": False}},
        }
    },
    "host": "local_system",
    "target": "local_system",
    "cache_dir": "/cache",
    "output_dir": "/out",
}
FLAT_FORM: dict[str, Any] = {
    **OLD_FORM,
    "passes": {
        "builder": {
            "type": "modelbuilder",
            "precision": "int4",
            "int4_block_size": 128,
            "int4_is_symmetric": False,
        }
    },
}
PROVIDERS = ("cpu", "cuda", "dml", "webgpu")


def _read(directory: Path, config: Any) -> Recipe:
    path = directory / "olive.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return read_olive_config(path)


def _with_builder(**entry: Any) -> dict[str, Any]:
    return {**FLAT_FORM, "passes": {"builder": {"type": "ModelBuilder", **entry}}}


def _with_system(**system: Any) -> dict[str, Any]:
    return {**FLAT_FORM, "systems": {"local_system": system}}


def test_every_recipe_file_is_what_its_name_says() -> None:
    files = sorted(RECIPES_DIR.glob("*.json"))
    assert {"cpu-fp16.json", "cpu-int8.json", "cpu-int4.json"} <= {path.name for path in files}
    for path in files:
        provider, precision = path.stem.split("-")
        recipe = load_recipe(precision, provider)
        assert (recipe.precision, recipe.execution_provider) == (precision, provider)
        builder = recipe.passes["builder"]
        assert (builder["precision"], builder["execution_provider"]) == (precision, provider)
        assert set(builder) - {"type"} <= set(BUILDER_OPTIONS)


def test_digests_tell_all_recipes_apart_and_ignore_the_warnings() -> None:
    recipes = [load_recipe(*reversed(path.stem.split("-"))) for path in RECIPES_DIR.glob("*.json")]
    assert len({recipe.digest for recipe in recipes}) == len(recipes)
    recipe = load_recipe("fp16")
    assert recipe.warnings
    assert recipe.model_copy(update={"warnings": ()}).digest == recipe.digest
    assert len(recipe.digest) == 64


def test_the_digest_follows_the_order_of_passes_and_not_that_of_keys() -> None:
    builder = {"type": "ModelBuilder", "precision": "int4", "block_size": 32}
    first, second = {"type": "OnnxPeepholeOptimizer"}, {"type": "OnnxIODataTypeConverter"}

    def digest(passes: dict[str, Any]) -> str:
        return Recipe(precision="int4", execution_provider="cpu", passes=passes).digest

    assert digest({"b": builder, "x": first, "y": second}) != digest({"b": builder, "y": second, "x": first})
    assert digest({"b": builder}) == digest({"b": dict(reversed(builder.items()))})


@pytest.mark.parametrize(
    ("precision", "provider", "found", "known"),
    [
        ("int2", "cpu", "'int2'", "fp16, int4, int8"),
        ("int4", "npu", "'npu'", "cpu, cuda, dml, webgpu"),
        ("int8", "dml", "no int8 for dml", "fp16, int4"),
        ("../int4", "cpu", "'../int4'", "fp16"),
    ],
)
def test_an_unknown_recipe_lists_those_known(precision: str, provider: str, found: str, known: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load_recipe(precision, provider)
    assert found in refusal.value.message
    assert known in refusal.value.what_to_do


def test_a_run_configuration_is_a_copy_that_olive_may_write_into() -> None:
    recipe = load_recipe("int4")
    config = olive_run_config(recipe)
    config["passes"]["builder"]["precision"] = "changed"
    assert recipe == load_recipe("int4")
    assert config["systems"]["local_system"]["accelerators"][0]["execution_providers"] == ["CPUExecutionProvider"]


@pytest.mark.parametrize("config", [OLD_FORM, FLAT_FORM, {**OLD_FORM, "engine": {"cache_dir": "x"}}])
def test_both_forms_read_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    recipe = _read(tmp_path, config)
    assert recipe.precision == "int4"
    assert recipe.execution_provider == "cpu"
    assert recipe.passes == {
        "builder": {
            "type": "ModelBuilder",
            "execution_provider": "cpu",
            "precision": "int4",
            "block_size": 128,
            "is_symmetric": False,
        }
    }
    assert "/somewhere/else" not in json.dumps(olive_run_config(recipe))


def test_the_least_file_is_enough(tmp_path: Path) -> None:
    recipe = _read(tmp_path, {"passes": {"builder": {"type": "ModelBuilder", "precision": "fp16"}}})
    assert recipe.precision == "fp16"
    assert recipe.warnings == load_recipe("fp16").warnings


def test_the_provider_is_read_from_the_target(tmp_path: Path) -> None:
    accelerators = [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}]
    assert _read(tmp_path, _with_system(type="LocalSystem", accelerators=accelerators)).execution_provider == "cuda"
    nested = _with_system(type="LocalSystem", config={"accelerators": accelerators})
    assert _read(tmp_path, nested).passes["builder"]["execution_provider"] == "cuda"


def test_further_passes_and_their_data_are_kept_in_order(tmp_path: Path) -> None:
    passes = {
        **FLAT_FORM["passes"],
        "second": {"type": "OnnxPeepholeOptimizer"},
        "third": [{"type": "onnxiodatatypeconverter", "name_pattern": "logits"}],
    }
    recipe = _read(tmp_path, {**FLAT_FORM, "passes": passes, "data_configs": [{"name": "d"}]})
    assert [entry["type"] for entry in recipe.passes.values()] == [
        "ModelBuilder",
        "OnnxPeepholeOptimizer",
        "OnnxIODataTypeConverter",
    ]
    assert olive_run_config(recipe)["data_configs"] == [{"name": "d"}]


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "broken JSON": ("{", ["not valid JSON"]),
    "a list": ([], ["it is a list"]),
    "no passes": ({}, ["no passes"]),
    "unknown top-level key": ({**FLAT_FORM, "pases": {}, "evaluators": {}}, ["'pases'", "'evaluators'"]),
    "unknown pass": (
        {**FLAT_FORM, "passes": {**FLAT_FORM["passes"], "x": {"type": "Magic"}}},
        ["'x'", "unknown type 'Magic'"],
    ),
    "pass without type": ({**FLAT_FORM, "passes": {"x": {}}}, ["'x'", "object with a type"]),
    "unknown builder key": (_with_builder(precision="int4", blok_size=32), ["'blok_size'", "'builder'"]),
    "unknown nested key": (
        _with_builder(config={"precision": "int4", "quantization_config": {"blocksize": 32}}),
        ["'blocksize'"],
    ),
    "unknown extra option": (_with_builder(precision="int4", extra_options={"exclude_lm_head": True}), ["exclude_lm"]),
    "no precision": (_with_builder(int4_block_size=32), ["names no precision"]),
    "unknown precision": (_with_builder(precision="int3"), ["precision 'int3'"]),
    "bad value": (_with_builder(precision="int4", int4_block_size=33), ["int4_block_size 33"]),
    "bad type": (_with_builder(precision="int4", is_symmetric="no"), ["is_symmetric 'no'"]),
    "given twice": (_with_builder(precision="int4", int4_block_size=32, block_size=64), ["block_size twice"]),
    "builder not first": (
        {**FLAT_FORM, "passes": {"x": {"type": "OnnxPeepholeOptimizer"}, **FLAT_FORM["passes"]}},
        ["must be the first"],
    ),
    "two builders": ({**FLAT_FORM, "passes": {**FLAT_FORM["passes"], "x": OLD_FORM["passes"]["builder"]}}, ["exactly"]),
    "code of the model": (
        {**FLAT_FORM, "input_model": {"type": "HfModel", "load_kwargs": {"trust_remote_code": True}}},
        ["'load_kwargs'"],
    ),
    "another kind of model": ({**FLAT_FORM, "input_model": {"type": "OnnxModel"}}, ["'OnnxModel'"]),
    "another task": ({**FLAT_FORM, "input_model": {"type": "HfModel", "task": "fill-mask"}}, ["'fill-mask'"]),
    "another system": (_with_system(type="Docker"), ["'Docker'"]),
    "undefined target": ({**FLAT_FORM, "target": "gpu"}, ["'gpu'"]),
    "unknown provider": (
        _with_system(type="LocalSystem", accelerators=[{"execution_providers": ["QNNExecutionProvider"]}]),
        ["QNNExecutionProvider"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_named_in_one_sentence(case: str, tmp_path: Path) -> None:
    config, named = REFUSED[case]
    with pytest.raises(BadInput) as refusal:
        _read(tmp_path, config)
    assert all(name in refusal.value.message for name in named), refusal.value.message
    assert "\n" not in refusal.value.message


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    config = {**_with_builder(precision="int5", colour="red"), "shape": 1}
    with pytest.raises(BadInput, match="shape") as refusal:
        _read(tmp_path, config)
    assert "'colour'" in refusal.value.message
    assert "'int5'" in refusal.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"missing\.json cannot be read"):
        read_olive_config(tmp_path / "missing.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
LIKELY_KEYS = st.sampled_from(sorted(KNOWN_KEYS | {"builder", "type", "config", "precision", "accelerators"}))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.dictionaries(LIKELY_KEYS, JSON | st.dictionaries(LIKELY_KEYS, JSON, max_size=3), max_size=5))
def test_any_json_gives_a_recipe_or_a_bad_input(config: dict[str, Any], tmp_path: Path) -> None:
    for candidate in (config, {**FLAT_FORM, **config}):
        try:
            recipe = _read(tmp_path, candidate)
        except BadInput:
            continue
        assert recipe.precision in {"fp16", "int8", "int4"}


@given(key=st.text(min_size=1, max_size=20))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_unknown_key_of_the_builder_passes_unnoticed(key: str, tmp_path: Path) -> None:
    if key in BUILDER_OPTIONS or key in {"config", "quantization_config", "type"} or key.startswith("int4_"):
        return
    with pytest.raises(BadInput) as refusal:
        _read(tmp_path, _with_builder(precision="int4", **{key: 1}))
    assert repr(key) in refusal.value.message


def test_olives_own_pass_names_are_known() -> None:
    assert {"ModelBuilder", "OnnxPeepholeOptimizer", "OnnxBlockWiseRtnQuantization"} <= olive_pass_types()
