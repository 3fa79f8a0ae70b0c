"""`slmops serve`: what it refuses before it starts anything."""

from pathlib import Path

import pytest

from slmops.deployments.cli import app


@pytest.mark.parametrize(
    ("schema", "names", "fault"),
    [
        ('{"type": "thing"}', ["home"], "cannot be used"),
        ("true", ["home"], "allows any answer or none"),
        ('{"const": 1}', [], "is for one model, found 0 names"),
        ('{"const": 1}', ["home", "other"], "is for one model, found 2 names"),
    ],
)
def test_a_response_schema_needs_an_object_and_one_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    schema: str,
    names: list[str],
    fault: str,
) -> None:
    monkeypatch.setenv("SLMOPS_HOME", str(tmp_path / "home"))
    (tmp_path / "schema.json").write_text(schema, "utf-8")
    assert app.run(["serve", *names, "--response-schema", str(tmp_path / "schema.json")]) == 2
    assert fault in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "home").exists()
