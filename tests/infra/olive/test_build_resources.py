"""A build's reads, writes and memory: counts that do not depend on the machine's speed.

Everything is built in one process, as in a deploy, after a first build that has paid for the imports.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from slmops.infra.settings import Settings
from slmops.tasks.workshop import torch_process
from tests.infra.child_functions import CountedBuild
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.olive_builds import build_request

pytestmark = [
    pytest.mark.runtime,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux counts what a process reads and writes."),
]

SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 16_000, "head_dim": 64, "num_hidden_layers": 2}
MORE_LAYERS = {"num_hidden_layers": 14}


class Figures(NamedTuple):
    """What a build read and wrote by system calls, held in memory at most, and made, in bytes."""

    read: int
    written: int
    peak: int
    size: int


def measured(folder: Path, builds: list[tuple[Path, str]], *, as_olive_does: bool = False) -> list[Figures]:
    """Build one after the other, and return the cost of each except the first."""
    with torch_process(Settings(home=folder)) as child:
        done = [
            child.run(
                CountedBuild(
                    build=build_request(checkpoint, folder / str(number), precision=precision),
                    as_olive_does=as_olive_does,
                ),
                deadline_s=600,
                log_path=folder / "log",
                work_dir=folder / "work",
            ).value
            for number, (checkpoint, precision) in enumerate(builds)
        ]
    sizes = [sum(path.stat().st_size for path in (folder / str(number)).rglob("*")) for number in range(len(builds))]
    return [Figures(**one, size=size) for one, size in zip(done, sizes, strict=True)][1:]


def size_of(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", "qwen2", tied=True, **SHAPE)


@pytest.fixture(scope="module")
def deeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deeper") / "checkpoint"
    return make_tiny_checkpoint(folder, "qwen2", tied=True, **(SHAPE | MORE_LAYERS))


@pytest.fixture(scope="module")
def builds(checkpoint: Path, deeper: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Figures]:
    """The cost of each build, by its checkpoint's name and its precision."""
    asked = {
        (name, precision): (folder, precision)
        for name, folder, precisions in (
            ("small", checkpoint, ("fp16", "int8", "int4")),
            ("deeper", deeper, ("int8", "int4")),
        )
        for precision in precisions
    }
    figures = measured(tmp_path_factory.mktemp("built"), [(checkpoint, "fp16"), *asked.values()])
    return dict(zip(asked, figures, strict=True))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_model_is_written_once_and_its_checkpoint_never_read_into_memory(
    precision: str, checkpoint: Path, builds: dict[tuple[str, str], Figures]
) -> None:
    figures = builds["small", precision]
    assert figures.written < 1.1 * figures.size + 2**20
    assert figures.read < 0.2 * size_of(checkpoint)  # it is mapped: what is read in this way would be read twice


def test_olive_itself_still_copies_and_hashes(checkpoint: Path, tmp_path: Path) -> None:
    """Otherwise infra/olive/lean_files.py can be removed."""
    (figures,) = measured(tmp_path, [(checkpoint, "fp16"), (checkpoint, "fp16")], as_olive_does=True)
    assert figures.read > size_of(checkpoint)
    assert figures.written > 1.1 * figures.size


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_memory_grows_with_the_largest_tensor_and_not_with_the_model(
    precision: str, checkpoint: Path, deeper: Path, builds: dict[tuple[str, str], Figures]
) -> None:
    in_fp32 = 2 * (size_of(deeper) - size_of(checkpoint))
    assert in_fp32 > 150 * 2**20
    assert builds["deeper", precision].peak - builds["small", precision].peak < 0.6 * in_fp32
