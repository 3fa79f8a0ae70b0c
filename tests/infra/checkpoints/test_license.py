"""The license that a checkpoint's model card names."""

from pathlib import Path

import pytest

from slmops.infra.checkpoints.license import license_of


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: other\nlicense_name: my-own\n---\n", "my-own"),
        ("# A model\n", None),
        ("---\nlicense: [mit, apache-2.0]\n---\n", None),
        ('---\nlicense: "a\\nb"\n---\n', None),
        ("---\n- mit\n---\n", None),
        ("---\n{\n---\n", None),
        ("---\n!!python/object:os.system {}\n---\n", None),
    ],
)
def test_a_license_is_read_from_the_cards_metadata(card: str, name: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card.encode())
    assert license_of(tmp_path) == name


def test_a_folder_without_a_card_has_none(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
