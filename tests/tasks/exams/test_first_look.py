"""What a quick deploy plans, and what it refuses."""

from pathlib import Path

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.plan import plan_deploy
from tests.support.errors import coded


@pytest.mark.parametrize(("named", "planned"), [((), "int8"), (("int4",), "int4")])
def test_it_plans_one_precision_and_a_tenth_of_the_rows(
    settings: Settings, tiny_checkpoint: Path, tmp_path: Path, named: tuple[str, ...], planned: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = '{"id": %d, "messages": [{"role": "user", "content": "hello"}], "expected": "hi"}\n'
    rows.write_text("".join(row % number for number in range(11)))
    asked = {"checkpoint": str(tiny_checkpoint), "name": "home", "evaluation_file": str(rows), "quick": True}
    plan = plan_deploy(settings, asked | ({"precisions": named} if named else {}))
    assert plan.rows == 2
    assert [stage.stage for stage in plan.stages if stage.stage.startswith("build")] == [f"build {planned}"]


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"promote": True}, "quick-asks-for-more"),
        ({"search": True}, "quick-asks-for-more"),
        ({"precisions": ("int8", "int4")}, "quick-precisions"),
    ],
)
def test_more_than_a_look_is_refused(
    settings: Settings, tiny_checkpoint: Path, more: dict[str, object], code: str
) -> None:
    with pytest.raises(BadInput, check=coded(code)):
        plan_deploy(settings, {"checkpoint": str(tiny_checkpoint), "name": "home", "quick": True, **more})
