"""Where CI forbids skips, a skipped test is a failed one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.runtime

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest

@pytest.mark.skipif(True, reason="a server is missing")
def test_marked(): ...

def test_inside():
    pytest.skip("no luck")

@pytest.mark.skipif(True, reason="Windows has no signals")
def test_platform(): ...

@pytest.mark.xfail(reason="known", strict=True)
def test_expected_to_fail():
    assert False
"""


@pytest.mark.parametrize(
    ("forbidden", "status", "outcome"),
    [("1", 1, "1 failed, 1 skipped, 1 xfailed, 1 error"), ("0", 0, "3 skipped, 1 xfailed")],
)
def test_a_skip_fails_only_where_skips_are_forbidden(forbidden: str, status: int, outcome: str, tmp_path: Path) -> None:
    (tmp_path / "test_skips.py").write_text(TESTS)
    arguments = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLMOPS_TESTS_FORBID_SKIPS": forbidden},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome in done.stdout, done.stdout
    assert done.returncode == status


def test_a_skipped_module_fails_where_skips_are_forbidden(tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    arguments = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLMOPS_TESTS_FORBID_SKIPS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 error" in done.stdout, done.stdout
    assert done.returncode != 0
