"""Recipes, and the reading of a user's own Olive file."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from slmops.infra.errors import BadInput
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.olive.calls import Build
from slmops.infra.olive.engine import build
from slmops.infra.olive.options import BUILDER_OPTIONS, EXTRA_OPTIONS, olive_pass_types
from slmops.tasks.build.olive_config import KNOWN_KEYS, olive_run_config, ordered_recipe, read_olive_config
from slmops.tasks.build.planning import plan_recipes, plan_search
from slmops.tasks.build.recipes import RECIPES_DIR, Recipe, known_recipes, load_recipe
from slmops.tasks.plan import parse_request
from slmops.tasks.request.deploy_request import DeployRequest
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.genai_models import logits_of

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


def _all_recipes() -> list[Recipe]:
    return [
        load_recipe(name, provider)
        for provider in PROVIDERS
        for precision in ("fp16", "int8", "int4")
        for name in known_recipes(precision, provider)
    ]


def test_every_recipe_file_matches_its_name() -> None:
    files = sorted(RECIPES_DIR.glob("*.json"))
    assert {"cpu-fp16.json", "cpu-int8.json", "cpu-int4.json", "cpu-int4-block128.json"} <= {
        path.name for path in files
    }
    recipes = _all_recipes()
    assert sorted(recipe.id for recipe in recipes) == sorted(path.stem for path in files)
    for recipe in recipes:
        provider, precision, *_ = recipe.id.split("-")
        assert (recipe.precision, recipe.execution_provider) == (precision, provider)
        assert recipe.name == recipe.id.removeprefix(f"{provider}-")
        builder = recipe.passes["builder"]
        assert (builder["precision"], builder["execution_provider"]) == (precision, provider)
        assert set(builder) - {"type"} <= set(BUILDER_OPTIONS)
        assert set(builder.get("extra_options", {})) <= EXTRA_OPTIONS


def test_an_own_recipe_is_also_a_valid_olive_configuration(tmp_path: Path) -> None:
    for recipe in _all_recipes():
        config = olive_run_config(recipe)
        del config["passes"]["builder"]["execution_provider"]  # the file's systems say it
        read = _read(tmp_path, config)
        assert (read.digest, read.id) == (recipe.digest, "olive-config")
        assert read.name == recipe.precision


def test_digests_distinguish_all_recipes_and_ignore_id_and_warnings() -> None:
    recipes = _all_recipes()
    assert len({recipe.digest for recipe in recipes}) == len(recipes)
    assert [(recipe.name, recipe.same_as) for recipe in recipes if recipe.same_as] == [(SAME, "int4-rtn")]
    recipe = load_recipe("fp16")
    assert recipe.warnings
    assert recipe.model_copy(update={"warnings": (), "id": "another"}).digest == recipe.digest
    assert len(recipe.digest) == 64


# Versions in users' stores are known by these: another digest would make another version of the same model.
DIGESTS = {
    "fp16": "63df83869d74e804929103829bee6bb7573545795e0df925a938ec9eb993cc00",
    "int8": "9b1364fbb145baebc8cba3b5b3b10667e7fca50bba732ddf1a94941210f4184d",
    "int4-rtn": "024483c3c00c3d59e520f530faec19b350263bce79523e5d2fbf1ccf7e06c24a",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_a_recipe_is_the_one_that_versions_were_built_by(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.digest, recipe.id) == (DIGESTS[name], f"cpu-{name}")


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
        ("int4-block64", "cpu", "'int4-block64'", "int4, int4-asymmetric, int4-block128"),
        ("int4-block128", "dml", "'int4-block128' for dml", "int4"),
        ("int4-/../../cpu-fp16", "cpu", "'int4-/../../cpu-fp16'", "int4"),
        ("int4-", "cpu", "'int4-'", "int4"),
    ],
)
def test_an_unknown_recipe_lists_those_known(precision: str, provider: str, found: str, known: str) -> None:
    with pytest.raises(BadInput) as refusal:
        load_recipe(precision, provider)
    assert found in refusal.value.message
    assert known in refusal.value.what_to_do


def test_the_default_is_first_of_the_known() -> None:
    assert known_recipes("int4")[0] == "int4"
    assert {"int4-block128", "int4-asymmetric", "int4-pruned-head", "int4-k-quant"} < set(known_recipes("int4"))
    assert known_recipes("int4", "dml") == ("int4",)
    assert known_recipes("int8", "dml") == known_recipes("int3") == ()


def _request(**parameters: Any) -> DeployRequest:
    return parse_request({"checkpoint": "here", "name": "home", **parameters})


def test_a_named_recipe_takes_the_place_of_its_precisions_default() -> None:
    request = _request(recipes=["int4-block128", "int4-block128"])
    assert [recipe.id for recipe in plan_recipes(request)] == ["cpu-fp16", "cpu-int8", "cpu-int4-block128"]
    assert [recipe.id for recipe in plan_recipes(_request())] == ["cpu-fp16", "cpu-int8", "cpu-int4"]


@pytest.mark.parametrize(
    ("parameters", "found", "known"),
    [
        ({"recipes": ["int4-none"]}, "'int4-none'", "int4-block128"),
        ({"recipes": ["cpu-int4"]}, "'cpu'", "int4"),
        ({"recipes": ["int4-block128"], "precisions": ["int8"]}, "not requested", "int8, int8-block128"),
        ({"recipes": ["int4-block128", "int4-k-quant"]}, "'int4-block128' and 'int4-k-quant'", "int4-asymmetric"),
        ({"recipes": ["int4-k-quant"], "device": "gpu", "execution_provider": "cuda"}, "for cuda", "int4"),
    ],
)
@pytest.mark.parametrize("plan", [plan_recipes, plan_search])
def test_a_recipe_that_cannot_be_used_is_refused(
    plan: Callable[[DeployRequest], list[Recipe]], parameters: dict[str, Any], found: str, known: str
) -> None:
    with pytest.raises(BadInput) as refusal:
        plan(_request(**parameters))
    assert found in refusal.value.message
    assert known in refusal.value.what_to_do


@pytest.mark.parametrize("parameters", [{"recipes": ["int4-block128"]}, {"search": True}])
def test_an_olive_configuration_leaves_nothing_to_name_or_search(parameters: dict[str, Any]) -> None:
    with pytest.raises(BadInput, check=coded("recipe-beside-olive-config")):
        _request(olive_config_file="olive.json", **parameters)


SAME = "int4-pruned-head"  # the model of int4-rtn, since every model for the CPU has such a head


def test_a_search_has_every_recipe_but_of_a_precision_whose_recipe_is_named() -> None:
    names = [recipe.name for recipe in plan_search(_request(search=True))]
    assert names == ["fp16", *known_recipes("int8"), *(name for name in known_recipes("int4") if name != SAME)]
    pinned = _request(search=True, recipes=["int4-k-quant"], precisions=["int4", "int8"])
    assert [recipe.name for recipe in plan_search(pinned)] == ["int4-k-quant", *known_recipes("int8")]
    with pytest.raises(BadInput, check=coded("recipe-missing", "int8", "dml")):
        plan_search(_request(search=True, device="gpu", execution_provider="dml"))


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
    "unknown top-level key": ({**FLAT_FORM, "pases": {}, "search": {}}, ["'pases'", "'search'"]),
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
    "a pass of ONNX models before the builder": (
        {**FLAT_FORM, "passes": {"x": {"type": "OnnxPeepholeOptimizer"}, **FLAT_FORM["passes"]}},
        ["'x'", "OnnxPeepholeOptimizer comes before ModelBuilder", "Gptq"],
    ),
    "no builder": ({**FLAT_FORM, "passes": {"g": {"type": "gptq"}}}, ["exactly one", "found 0"]),
    "two builders": ({**FLAT_FORM, "passes": {**FLAT_FORM["passes"], "x": OLD_FORM["passes"]["builder"]}}, ["exactly"]),
    "code of the model": (
        {**FLAT_FORM, "input_model": {"type": "HfModel", "load_kwargs": {"trust_remote_code": True}}},
        ["'trust_remote_code'"],
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
    with pytest.raises(BadInput, check=coded("olive-config-not-valid", "shape")) as refusal:
        _read(tmp_path, config)
    assert "'colour'" in refusal.value.message
    assert "'int5'" in refusal.value.message


def test_the_marks_of_windows_editors_are_no_part_of_it(tmp_path: Path) -> None:
    path, config = tmp_path / "olive.json", json.dumps(_with_builder(precision="int4"), indent=2)
    path.write_bytes(b"\xef\xbb\xbf" + config.replace("\n", "\r\n").encode())
    assert read_olive_config(path) == _read(tmp_path, config)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, check=coded("olive-config-unreadable", "missing.json")):
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


class Built:
    """A recipe built from a tiny checkpoint: its graph, its weights, and what the runtime makes of a prompt."""

    PROMPT = tuple((7 * i * i + 13 * i) % 470 for i in range(40))

    def __init__(self, recipe: Recipe, checkpoint: Path, folder: Path) -> None:
        call = Build(
            olive_config=olive_run_config(recipe),
            calibration=CALIBRATION if recipe.is_calibrated else (),
            checkpoint_dir=checkpoint,
            output_dir=folder / "model",
            cache_dir=folder / "cache",
            threads=2,
        )
        build(call, lambda done, total, what: None)
        graph = onnx.load(folder / "model" / "model.onnx").graph
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.nodes = {node.name: node for node in graph.node if node.op_type == "MatMulNBits"}
        self.lookup = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
        self.folder = folder / "model"
        self.logits = logits_of(self.folder, self.PROMPT)

    def attribute(self, name: str) -> dict[str, int]:
        """Name of each matrix multiplication -> its value of an attribute."""
        return {
            node.name.removesuffix("_Q4").removesuffix("_Q8").replace("MatMulNBits", "MatMul"): attribute.i
            for node in self.nodes.values()
            for attribute in node.attribute
            if attribute.name == name
        }

    @property
    def asymmetric(self) -> set[bool]:
        """Whether the matrix multiplications have zero points."""
        return {len(node.input) > 3 and bool(node.input[3]) for node in self.nodes.values()}

    def weight_of(self, name: str) -> np.ndarray:
        """The packed weights of a matrix multiplication."""
        return self.weights[next(node for key, node in self.nodes.items() if key.startswith(name)).input[1]]


CALIBRATION = tuple(tuple((7 * i * i + 11 * i + row) % 470 for i in range(40)) for row in range(4))
HEAD = "/lm_head/MatMul"
DOWN = "/model/layers.0/mlp/down_proj/MatMul"
GATE = "/model/layers.0/mlp/gate_proj/MatMul"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """Build a recipe by its name, once; embedding and lm_head are tied, as in most small models."""
    root = tmp_path_factory.mktemp("recipes")
    checkpoint = make_tiny_checkpoint(root / "checkpoint", "qwen2", tied=True, hidden_size=256, intermediate_size=512)
    return cache(lambda name: Built(load_recipe(name), checkpoint, root / name))


def test_recipes_that_need_the_whole_model_in_memory_are_marked() -> None:
    at_once = {name for precision in ("int4", "int8", "fp16") for name in known_recipes(precision)}
    at_once = {name for name in at_once if load_recipe(name).quantizes_at_once}
    assert at_once == {"int4-k-quant", "int4-k-quant-mixed", "int4-int8-head"}


PUBLIC_CHAIN: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "owner/model", "load_kwargs": {"torch_dtype": "float16"}},
    "systems": OLD_FORM["systems"],
    "evaluators": {"evaluator": {"type": "LMEvaluator", "tasks": ["arc_easy"]}},
    "evaluator": "evaluator",
    "passes": {
        "s": {
            "type": "SelectiveMixedPrecision",
            "algorithm": "kld_gradient",
            "bits": 4,
            "high_bits": 8,
            "ratio": 0.65,
            "sym": False,
            "group_size": 64,
        },
        "g": {"type": "gptq", "bits": 4, "sym": False, "group_size": 64},
        "r": {
            "type": "rtn",
            "bits": 8,
            "sym": False,
            "group_size": 64,
            "lm_head": True,
            "embeds": True,
            "overrides": {"lm_head": {"bits": 8}, "model.embed_tokens": {"bits": 8}},
        },
        "m": {"type": "ModelBuilder", "precision": "int4", "extra_options": {"int4_accuracy_level": "4"}},
        "t": {"type": "GraphSurgeries", "surgeries": [{"surgeon": "TieWordEmbeddings"}]},
    },
    "target": "local_system",
    "output_dir": "model_cpu_int4",
    "no_artifacts": True,
}


class TestBuiltRecipes:
    @pytest.mark.parametrize(
        ("name", "bits", "head_bits", "block_size", "asymmetric"),
        [
            ("int4", {4, 8}, 8, {32, 64}, {True, False}),
            ("int4-mixed", {4, 8}, 8, {32, 64}, {True, False}),
            ("int4-rtn", {4}, 4, {32}, {False}),
            ("int4-block128", {4}, 4, {128}, {False}),
            ("int4-asymmetric", {4}, 4, {32}, {True}),
            ("int4-block128-asymmetric", {4}, 4, {128}, {True}),
            ("int4-pruned-head", {4}, 4, {32}, {False}),
            ("int4-fast", {4}, 4, {64}, {False}),
            ("int4-k-quant", {4}, 4, {32}, {True}),
            ("int4-k-quant-mixed", {4, 8}, 8, {32}, {True}),
            ("int4-int8-head", {4, 8}, 8, {32}, {False}),
            ("int8", {8}, 8, {32}, {False}),
            ("int8-block128", {8}, 8, {128}, {False}),
        ],
    )
    def test_it_matches_its_name_and_runs(
        self,
        built: Callable[[str], Built],
        name: str,
        bits: set[int],
        head_bits: int,
        block_size: set[int],
        asymmetric: set[bool],
    ) -> None:
        found, plain = built(name), built("int8")
        assert set(found.attribute("bits").values()) == bits
        assert found.attribute("bits")[HEAD] == head_bits
        assert set(found.attribute("block_size").values()) == block_size
        assert found.asymmetric == asymmetric
        assert np.isfinite(found.logits).all()
        error = np.abs(found.logits[-1] - plain.logits[-1]).mean() / plain.logits.std()
        assert error < (0.1 if bits == {8} else 0.8)

    def test_every_quantized_recipe_for_the_cpu_is_tested(self) -> None:
        method = type(self).test_it_matches_its_name_and_runs
        (mark,) = [mark for mark in method.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
        assert {case[0] for case in mark.args[1]} == {*known_recipes("int4"), *known_recipes("int8")}

    @pytest.mark.parametrize("name", ["int4", "int8", "int4-fast"])
    def test_it_gives_the_last_positions_logits_and_for_distributions_all(
        self, built: Callable[[str], Built], name: str
    ) -> None:
        found = built(name)
        serving, comparing = (GenaiModel(found.folder, threads=1, all_positions=every) for every in (False, True))
        assert (serving.gives_last_position_only, comparing.gives_last_position_only) == (True, False)
        positions = range(len(Built.PROMPT))
        expected = list(serving.logits_at(Built.PROMPT, positions))
        for logits, alone in zip(comparing.logits_at(Built.PROMPT, positions), expected, strict=True):
            assert np.abs(logits - alone).max() < 0.05 * alone.std()

    def test_two_names_for_one_model_give_one(self, built: Callable[[str], Built]) -> None:
        files = [{path.name: path.read_bytes() for path in built(name).folder.iterdir()} for name in (SAME, "int4-rtn")]
        assert files[0] == files[1]

    def test_the_wider_head_leaves_the_other_weights_as_they_are(self, built: Callable[[str], Built]) -> None:
        plain, wide = built("int4-rtn"), built("int4-int8-head")
        assert (plain.weight_of(DOWN) == wide.weight_of(DOWN)).all()
        assert wide.weight_of(HEAD).nbytes == 2 * plain.weight_of(HEAD).nbytes
        assert set(wide.attribute("bits").items()) - set(plain.attribute("bits").items()) == {(HEAD, 8)}

    def test_k_quant_chooses_other_weights_and_the_mixed_one_widens_the_sensitive_ones(
        self, built: Callable[[str], Built]
    ) -> None:
        rounded, chosen, mixed = built("int4-asymmetric"), built("int4-k-quant"), built("int4-k-quant-mixed")
        assert chosen.weight_of(DOWN).shape == rounded.weight_of(DOWN).shape
        assert (chosen.weight_of(DOWN) != rounded.weight_of(DOWN)).any()
        bits = mixed.attribute("bits")
        assert (bits[DOWN], bits[GATE], bits[HEAD]) == (8, 4, 8)


def test_the_chain_of_public_recipes_builds_a_model_that_runs(tmp_path: Path) -> None:
    """SelectiveMixedPrecision, Gptq, Rtn, ModelBuilder, GraphSurgeries: microsoft/olive-recipes has it for SmolLM3."""
    recipe = _read(tmp_path, PUBLIC_CHAIN)
    assert recipe.is_calibrated
    assert recipe.builder["accuracy_level"] == 4
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint", "llama", tied=True)
    found = Built(recipe, checkpoint, tmp_path)
    bits = found.attribute("bits")
    assert set(bits.values()) == {4, 8}
    assert bits[HEAD] == 8
    assert np.isfinite(found.logits).all()


BUILDER = {"type": "ModelBuilder", "precision": "int4"}


class TestOrders:
    """What a worker takes from an order in the store, which another machine wrote."""

    @pytest.mark.parametrize("path", sorted(RECIPES_DIR.glob("*.json")), ids=lambda path: path.stem)
    def test_slmops_own_recipes(self, path: Path) -> None:
        provider, _, name = path.stem.partition("-")
        recipe = load_recipe(name, provider)
        assert ordered_recipe(recipe.model_dump(mode="json")) == recipe

    def test_the_content_of_a_users_file(self, tmp_path: Path) -> None:
        recipe = _read(tmp_path, {"passes": {"builder": {"type": "ModelBuilder", "precision": "int4"}}})
        assert ordered_recipe(recipe.model_dump(mode="json")) == recipe

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"passes": {"builder": {**BUILDER, "extra_options": {"hf_remote": True}}}}, "hf_remote"),
            ({"passes": {"builder": BUILDER, "other": {"type": "Foreign"}}}, "Foreign"),
            ({"data_configs": [{"user_script": "/tmp/x.py"}]}, "user_script"),
            ({"data_configs": [{"load_dataset_config": {"trust_remote_code": True}}]}, "trust_remote_code"),
        ],
    )
    @pytest.mark.parametrize("recipe_id", ["olive-config", "cpu-int4"])
    def test_one_that_names_code(self, changes: dict[str, Any], said: str, recipe_id: str) -> None:
        record = {**load_recipe("int4").model_dump(mode="json"), "id": recipe_id, **changes}
        with pytest.raises(BadInput, check=coded("olive-config-refused")) as caught:
            ordered_recipe(record)
        assert said in caught.value.message
