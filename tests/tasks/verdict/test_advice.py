"""Every failed check has advice, and every command of it is one that `slmops` takes."""

import shlex
from typing import Any, get_args

import pytest
import typer

from slmops.deployments.cli.app import app
from slmops.tasks.exams.estimates import paired_loss
from slmops.tasks.request.parameters import PRECISIONS
from slmops.tasks.verdict.advice import GUIDANCE, Advice, Rejection, Step, advice_on, first_step, rows_to_decide
from slmops.tasks.verdict.checks import NEVER_ALLOWED, CheckName, GateCheck, at_most
from tests.support.reports import evaluation

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DEPLOY = ("slmops", "deploy", "/models/my home", "--name", "home")
LADDER = ("int4", "int4-mixed")


def failed(name: CheckName, value: float = 0.6, threshold: float = 0.1, detail: str = "") -> GateCheck:
    return at_most(name, value, threshold).model_copy(update={"detail": detail})


def rejection(*checks: GateCheck, **changes: Any) -> Rejection:
    given = {
        "reference": "home@2",
        "checkpoint": "/models/my home",
        "deploy": DEPLOY,
        "precision": "int4",
        "precisions": ("fp16", "int8", "int4"),
        "ladder": LADDER,
        "tried": ("int4-rtn",),
        "calibrated": frozenset(LADDER),
        "registered": (),
        "failed": checks,
        "evaluation": evaluation("int4"),
    }
    return Rejection(**given | changes)


def commands_of(advice: tuple[Advice, ...]) -> list[str]:
    return [step.command for found in advice for step in found.steps if step.command]


def test_every_check_has_advice() -> None:
    assert set(GUIDANCE) == set(get_args(CheckName))


@pytest.mark.parametrize("name", get_args(CheckName))
def test_its_commands_are_those_of_the_command_line(name: CheckName) -> None:
    for precision in PRECISIONS:
        given = rejection(failed(name, detail="512 tokens; 1024 tokens"), precision=precision, reliable=False)
        (advice,) = advice_on(given)
        assert advice.meaning.endswith(".")
        assert any(step.command for step in advice.steps)
        for command in (part for found in commands_of((advice,)) for part in found.split(" && ")):
            program, verb, *arguments = shlex.split(command)
            assert program == "slmops"
            COMMANDS[verb].make_context(verb, arguments)
        allowing = shlex.join(("slmops", "regate", "home@2", "--allow", name))
        assert (advice.steps[-1].command == allowing) == (name not in NEVER_ALLOWED)


def test_weights_rounded_to_nearest_are_built_by_the_recipe_that_climbs() -> None:
    (advice,) = advice_on(rejection(failed("kl_divergence")))
    assert advice.steps[0] == Step(
        text="Build it by the default recipe int4, and by itself of int4-mixed if it misses too:",
        command="slmops deploy '/models/my home' --name home",
    )
    assert "--calibration" not in " ".join(commands_of((advice,)))


def test_after_the_first_recipe_comes_the_next_one() -> None:
    advice = advice_on(rejection(failed("kl_divergence"), tried=("int4",), precisions=("int4",)))
    again = "slmops deploy '/models/my home' --name home --precision int4"
    assert commands_of(advice)[:3] == [
        f"{again} --recipe int4-mixed",
        f"{again} --recipe int4-mixed --calibration chats.jsonl",
        "slmops deploy '/models/my home' --name home --precision int8,int4",
    ]
    assert first_step(advice).endswith(f"{again} --recipe int4-mixed")


def test_after_all_recipes_come_chats_and_a_wider_precision() -> None:
    (advice,) = advice_on(rejection(failed("kl_divergence"), tried=LADDER, registered=("int8",)))
    assert "--calibration" in advice.steps[0].command
    assert advice.steps[1].text == "Leave it at that: int8 of home@2 passed, and can serve."


def test_what_fails_together_is_allowed_together() -> None:
    first, second = advice_on(rejection(failed("kl_divergence"), failed("top1_agreement")))
    assert first.steps[-1] == second.steps[-1]
    assert first.steps[-1].command == "slmops regate home@2 --allow kl_divergence --allow top1_agreement"
    assert all("--allow" not in text for text in commands_of(advice_on(rejection(failed("finite_logits")))))


def test_a_length_without_an_answer_names_the_longest_one_with() -> None:
    given = rejection(failed("valid_lengths", 2, 0, "512 tokens; 1024 tokens"), valid_lengths=(32, 256, 768))
    assert "--model-config max_length=256" in " ".join(commands_of(advice_on(given)))


def test_the_rows_that_it_asks_for_let_the_score_decide() -> None:
    """Two of 120 answers are lost. More rows that lose as often are within the allowed loss at the number it says."""
    evaluated = evaluation("int4")
    lost = [(row.reference_score or 0.0) - (row.score or 0.0) for row in evaluated.rows]
    rows = rows_to_decide(evaluated, 0.02)
    assert rows is not None
    assert rows > len(lost)

    def high(count: int) -> float:
        differences = (lost * (count // len(lost) + 1))[:count]
        return paired_loss([max(0.0, loss) for loss in differences], [max(0.0, -loss) for loss in differences]).high

    assert high(rows) == pytest.approx(0.02, rel=0.1)
    assert high(rows // 2) > 0.02
    assert rows_to_decide(evaluated, 0.01) is None


def test_it_says_how_many_rows_decide() -> None:
    few = evaluation("int4")
    few = few.model_copy(update={"rows": few.rows[:45]})
    scored = rejection(failed("kl_divergence"), evaluation=few)
    without = evaluation("int4").model_copy(update={"quality_loss": None, "rows": ()})
    unscored = rejection(failed("kl_divergence"), evaluation=without)
    first, second = ([step.text for step in advice_on(given)[0].steps] for given in (scored, unscored))
    assert any("give at least 103 rows with expected answers, instead of 45," in text for text in first)
    assert any("give at least 31 rows" in text for text in second)
