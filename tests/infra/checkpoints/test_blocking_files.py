"""Files that would block who reads them: a pipe, or a link to one, is refused at once."""

import os
from pathlib import Path

import pytest

from slmops.infra.checkpoints.folder import read_json
from slmops.infra.errors import BadInput
from tests.support.errors import coded


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes in folders")
def test_a_pipe_or_a_link_to_one_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "config.json")
    (tmp_path / "generation_config.json").symlink_to("/dev/zero")
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        with pytest.raises(BadInput, check=coded("file-not-regular", name)):
            read_json(tmp_path / name)
