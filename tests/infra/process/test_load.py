"""The CPU that other programs use."""

import os
import subprocess
import sys
import time

import pytest

from slmops.infra.process.load import OtherLoad

SPIN = "import time; end = time.time() + 60\nwhile time.time() < end: pass"


def test_busy_programs_are_seen() -> None:
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(os.cpu_count() or 1)]
    try:
        with OtherLoad() as others:
            time.sleep(0.5)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert others.cores > 0.5 * len(spinning)
    assert others.share_of(os.cpu_count() or 1) > 0.5


@pytest.mark.parametrize(
    ("busy", "threads", "cores", "share"),
    [(0.0, 2, 2, 0.0), (1.0, 2, 2, 0.5), (5.0, 2, 2, 1.0), (30.0, 2, 64, 0.0), (63.0, 2, 64, 0.5), (1.0, 0, 1, 1.0)],
)
def test_what_others_take_counts_where_there_are_too_few_cores_for_all(
    busy: float, threads: int, cores: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    others = OtherLoad()
    others.cores = busy
    assert others.share_of(threads) == share
