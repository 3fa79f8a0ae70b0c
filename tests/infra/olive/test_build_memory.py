"""Pages of mapped checkpoint files are released, except those changed in memory."""

import mmap
import sys
from pathlib import Path

import psutil
import pytest

from slmops.infra.olive.memory import release_mapped_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Only Linux lets go of pages that were read.")

SIZE_BYTES = 64 * 2**20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A recently written file, like that of a training."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\1" * SIZE_BYTES)
    return path


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def test_what_was_read_is_let_go_and_can_be_read_again(checkpoint: Path) -> None:
    with checkpoint.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) == SIZE_BYTES // mmap.PAGESIZE
        before = resident_bytes()
        release_mapped_pages()
        assert before - resident_bytes() > 0.9 * SIZE_BYTES
        assert sum(mapped[:: mmap.PAGESIZE]) == SIZE_BYTES // mmap.PAGESIZE


def test_a_change_in_memory_is_kept(checkpoint: Path) -> None:
    with checkpoint.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        mapped[5] = 2
        release_mapped_pages()
        assert mapped[4:7] == b"\1\2\1"
    assert checkpoint.read_bytes()[4:7] == b"\1\1\1"
