"""Release the memory of mapped checkpoint files that were read: their pages can be read again.

transformers maps safetensors files into memory. Pages that a build has read stay resident, and count as the process's
memory, until the system needs the memory. With a model as large as memory, the system first evicts everything else.
"""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

MADV_DONTNEED = 4
SMAPS, STATM = Path("/proc/self/smaps"), Path("/proc/self/statm")
SUFFIX = ".safetensors"


def mapped_bytes() -> int:
    """Return the part of this process's resident memory that is mapped files, in bytes; 0 if unknown."""
    return int(STATM.read_text("ascii").split()[2]) * mmap.PAGESIZE if sys.platform == "linux" else 0


def release_mapped_pages() -> None:
    """Release the resident pages of all mapped safetensors files that this process did not change. Linux only."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, size in _unchanged_mappings():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)


def _unchanged_mappings() -> Iterator[tuple[int, int]]:
    """Yield address and size in bytes.

    A page that this process changed would be lost, because no file has its content: such a mapping is skipped.
    """
    with contextlib.suppress(OSError), SMAPS.open(encoding="utf-8", errors="replace") as lines:
        found: tuple[int, int] | None = None
        for line in lines:
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                start, _, end = name.partition("-")
                is_checkpoint = rest.rstrip("\n").removesuffix(" (deleted)").endswith(SUFFIX)
                found = (int(start, 16), int(end, 16) - int(start, 16)) if is_checkpoint else None
                is_changed = False
            elif found and name in ("Anonymous:", "Swap:"):
                is_changed |= int(rest.split()[0]) > 0
            elif found and name == "VmFlags:":  # the last line of a mapping
                if not is_changed:
                    yield found
                found = None
