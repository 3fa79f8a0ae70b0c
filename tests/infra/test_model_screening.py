"""The references that a model folder may have: others are refused by name, and every build of slmops passes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from slmops.infra.errors import BadInput
from slmops.infra.model_screening import screen_model
from slmops.infra.olive.calls import Build
from slmops.infra.process.supervisor import run_in_child
from slmops.tasks.build.olive_config import olive_run_config
from slmops.tasks.build.recipes import load_recipe
from tests.support.errors import coded
from tests.support.genai_models import EMPTY_GRAPH
from tests.support.torch_process import TORCH_PROCESS

CONFIG: dict[str, Any] = {
    "model": {
        "type": "qwen2",
        "context_length": 1024,
        "eos_token_id": [1, 2],
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{"cuda": {}}]},
            "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
        },
    },
    "search": {"do_sample": False, "max_length": 1024, "top_p": 0.9},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that passes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "genai_config.json").write_text(json.dumps(CONFIG))
    (folder / "model.onnx").write_bytes(EMPTY_GRAPH)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend", "vocab_file": null}')
    (folder / "LICENSE").write_text("MIT")
    return folder


def changed(*path: str, to: Any) -> str:
    """Return genai_config.json with one entry changed or added."""
    config = json.loads(json.dumps(CONFIG))
    section = config
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = to
    return json.dumps(config)


def in_session(key: str, value: Any) -> str:
    return changed("model", "decoder", "session_options", key, to=value)


def graph_of(*nodes: onnx.NodeProto, **model: Any) -> bytes:
    return helper.make_model(helper.make_graph(nodes, "graph", [], []), **model).SerializeToString()


def with_weights_at(location: str, **entries: str) -> onnx.TensorProto:
    tensor = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def weights_at(location: str, **entries: str) -> bytes:
    graph = helper.make_graph([], "graph", [], [], initializer=[with_weights_at(location, **entries)])
    return helper.make_model(graph).SerializeToString()


def in_a_branch(tensor: onnx.TensorProto) -> bytes:
    """Return a graph with a tensor where only a branch of a branch has it."""
    constant = helper.make_node("Constant", [], ["out"], value=tensor)
    inner = helper.make_node("If", ["a"], ["b"], then_branch=helper.make_graph([constant], "then", [], []))
    return graph_of(helper.make_node("If", ["a"], ["b"], else_branch=helper.make_graph([inner], "else", [], [])))


def sparse_at(location: str) -> bytes:
    tensor = helper.make_sparse_tensor(with_weights_at(location), with_weights_at(location), [1])
    graph = helper.make_graph([], "graph", [], [], sparse_initializer=[tensor])
    return helper.make_model(graph).SerializeToString()


def in_a_function(node: onnx.NodeProto) -> bytes:
    function = helper.make_function("own", "Function", [], [], [node], [helper.make_opsetid("", 17)])
    return graph_of(helper.make_node("Function", [], [], domain="own"), functions=[function])


CONFIGS = {
    "a library": (in_session("custom_ops_library", "ops.so"), "model.decoder.session_options.custom_ops_library"),
    "a library twice": (
        json.dumps(CONFIG).replace(
            '"session_options": {', '"session_options": {"custom_ops_library": "a"}, "session_options": {', 1
        ),
        "an entry twice",
    ),
    "a profile that is written": (in_session("enable_profiling", "/home/user/.bashrc"), "enable_profiling"),
    "an entry of onnxruntime's": (in_session("session.model_external_initializers_file_folder_path", "/"), "session."),
    "a compiled context": (in_session("ep.context_file_path", "../x"), "ep.context_file_path"),
    "a provider with a library": (
        in_session("provider_options", [{"QNN": {"backend_path": "libQnnHtp.so"}}]),
        "QNN backend_path",
    ),
    "a provider's own option": (
        in_session("provider_options", [{"CUDA": {"tunable_op_max_tuning_duration_ms": "9"}}]),
        "CUDA tunable_op",
    ),
    "one beside an allowed one": (
        in_session("provider_options", [{"CUDA": {"user_compute_stream": "1"}, "cuda": {}}]),
        "CUDA user_compute_stream",
    ),
    "run options": (changed("model", "decoder", "run_options", to={"terminate": "x"}), "run_options"),
    "a pipeline": (changed("model", "decoder", "pipeline", to=[{"a": {"filename": "a.onnx"}}]), "decoder.pipeline"),
    "initializers elsewhere": (changed("model", "decoder", "shared_initializers", to=[{}]), "shared_initializers"),
    "an encoder": (changed("model", "encoder", to={"filename": "/a.onnx"}), "model.encoder"),
    "an embedding": (changed("model", "embedding", to={"filename": "a.onnx"}), "model.embedding"),
    "vision": (changed("model", "vision", to={"config_filename": "../a.json"}), "model.vision"),
    "speech": (changed("model", "speech", to={"adapter_filename": "a"}), "model.speech"),
    "a tokenizer elsewhere": (changed("model", "tokenizer_dir", to="/tmp"), "model.tokenizer_dir"),
    "a profile of the runtime": (changed("runtime_profiles", to=[{"id": "a"}]), "runtime_profiles"),
    "a draft model": (changed("model", "mtp", to={"filename": "a.onnx"}), "model.mtp"),
    "a graph above": (changed("model", "decoder", "filename", to="../model.onnx"), "not the plain name"),
    "a graph anywhere": (changed("model", "decoder", "filename", to="/model.onnx"), "not the plain name"),
    "a graph by Windows' path": (changed("model", "decoder", "filename", to="C:\\model.onnx"), "not the plain name"),
    "onnxruntime's own format": (changed("model", "decoder", "filename", to="model.ort"), "not an ONNX file"),
    "a graph that is not there": (changed("model", "decoder", "filename", to="other.onnx"), "not a file of the folder"),
    "a format for snprintf": (changed("model", "decoder", "inputs", to={"past_key_names": "%d%n"}), "%d%n"),
    "text for a number": (changed("search", "max_length", to="/etc/passwd"), "search.max_length"),
    "no JSON": ("{", "not valid"),
    "too deep": ("[" * 100_000, "not valid"),
}

GRAPHS = {
    "a foreign operator": (graph_of(helper.make_node("Run", [], [], domain="evil")), "evil.Run"),
    "one in a function": (in_a_function(helper.make_node("Run", [], [], domain="evil")), "evil.Run"),
    "a compiled model": (graph_of(helper.make_node("EPContext", [], [], domain="com.microsoft")), "EPContext"),
    "an SNPE container": (graph_of(helper.make_node("Snpe", [], [], domain="com.microsoft")), "Snpe"),
    "weights above": (weights_at("../weights"), "'../weights'"),
    "weights anywhere": (weights_at("/dev/zero"), "'/dev/zero'"),
    "weights in memory": (weights_at("*/_ORT_MEM_ADDR_/*", offset="1"), "ORT_MEM_ADDR"),
    "weights that are not there": (weights_at("weights"), "'weights'"),
    "weights by another way": (weights_at("LICENSE", basepath="/"), "'LICENSE'"),
    "weights in a branch": (in_a_branch(with_weights_at("/etc/passwd")), "'/etc/passwd'"),
    "weights that are sparse": (sparse_at("/etc/passwd"), "'/etc/passwd'"),
    "no graph": (b"no graph", "not a readable ONNX model"),
}

BESIDE = {
    "code": ("modeling.py", "import os", "modeling.py"),
    "a library": ("ops.so", "", "ops.so"),
    "a pickle": ("pytorch_model.bin", "", "pytorch_model.bin"),
    "classes of a tokenizer": ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["t.T", null]}}', "auto_map"),
    "classes further in": ("config.json", '{"text_config": {"auto_map": {"AutoModel": "m.M"}}}', "auto_map"),
    "a vocabulary elsewhere": ("tokenizer_config.json", '{"vocab_file": "/etc/passwd"}', "vocab_file"),
    "a tokenizer's own module": ("tokenizer_module.json", "{}", "tokenizer_module.json"),
    "no JSON": ("tokenizer_config.json", "{", "tokenizer_config.json"),
}


def refused(folder: Path, said: str) -> None:
    with pytest.raises(BadInput, check=coded("model-refused")) as caught:
        screen_model(folder)
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_names_more_than_is_allowed(case: str, folder: Path) -> None:
    screen_model(folder)
    text, said = CONFIGS[case]
    (folder / "genai_config.json").write_text(text)
    refused(folder, said)


@pytest.mark.parametrize("case", GRAPHS)
def test_a_graph_that_reaches_out(case: str, folder: Path) -> None:
    data, said = GRAPHS[case]
    (folder / "model.onnx").write_bytes(data)
    refused(folder, said)


def test_a_second_graph_is_looked_through_too(folder: Path) -> None:
    (folder / "other.onnx").write_bytes(weights_at("/etc/passwd"))
    refused(folder, "other.onnx")


@pytest.mark.parametrize("case", BESIDE)
def test_other_files_of_the_folder(case: str, folder: Path) -> None:
    name, text, said = BESIDE[case]
    (folder / name).write_text(text)
    refused(folder, said)


def to_another_file(path: Path) -> None:
    other = path.parents[1] / "other.json"
    other.write_text("{}")
    path.symlink_to(other)


SPECIAL: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (os.mkfifo, "a device, a pipe or a socket"),
    "a link to a device": (lambda path: path.symlink_to("/dev/zero"), "symbolic link to /dev/zero"),
    "a link out of the folder": (to_another_file, "outside the folder"),
    "a link to a folder": (lambda path: path.symlink_to("/etc"), "symbolic link to /etc"),
    "a link to nothing": (lambda path: path.symlink_to("gone.json"), "symbolic link"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_file_of_the_folder(case: str, folder: Path) -> None:
    make, said = SPECIAL[case]
    make(folder / "added.json")
    refused(folder, said)


def test_what_is_allowed(folder: Path, tmp_path: Path) -> None:
    """Weights of any name, links inside, functions of the model's own, and Hugging Face's cache of links."""
    (folder / "weights.bin").write_bytes(bytes(4))
    (folder / "model.onnx").write_bytes(weights_at("weights.bin", offset="0", length="4"))
    (folder / "other.onnx").write_bytes(in_a_function(helper.make_node("Identity", ["a"], ["b"])))
    (folder / "linked.json").symlink_to("tokenizer_config.json")
    (folder / ".git").mkdir()
    (folder / ".git" / "hook.py").touch()
    screen_model(folder)

    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123" / "cpu"
    blobs = snapshot.parents[2] / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, blobs / f"of-{path.name}")
            (snapshot / path.name).symlink_to(Path("../../../blobs") / f"of-{path.name}")
    screen_model(snapshot)
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("../../../../other.json")
    refused(snapshot, "LICENSE")


@pytest.mark.parametrize("recipe", ["cuda-int4", "dml-int4", "webgpu-fp16"])
def test_what_slmops_builds_passes(recipe: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Also for devices that this machine lacks; a checkpoint's own classes do not become part of the model."""
    provider, _, name = recipe.partition("-")
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    tokenizer = json.loads((checkpoint / "tokenizer_config.json").read_text("utf-8"))
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization.Own", None]}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    run_in_child(
        Build(
            olive_config=olive_run_config(load_recipe(name, provider)),
            checkpoint_dir=checkpoint,
            output_dir=tmp_path / "model",
            cache_dir=tmp_path / "cache",
            threads=2,
        ),
        deadline_s=300,
        log_path=tmp_path / "log",
        work_dir=tmp_path / "work",
        within=TORCH_PROCESS,
    )
    screen_model(tmp_path / "model")
    options = json.loads((tmp_path / "model/genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert [list(provider_option) for provider_option in options["provider_options"]] == [[provider]]
