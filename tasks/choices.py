"""The values to choose from, by parameter, that stages define: recipes, checks of the gate, and scorers."""

from typing import get_args

from slmops.tasks.build.olive_config import OLIVE_PROVIDERS
from slmops.tasks.build.recipes import known_recipes
from slmops.tasks.questions.scoring import SCORERS
from slmops.tasks.request.parameters import PRECISIONS
from slmops.tasks.verdict.checks import NEVER_ALLOWED, CheckName

RECIPES = tuple(
    sorted({name for each in OLIVE_PROVIDERS for precision in PRECISIONS for name in known_recipes(precision, each)})
)
CHECKS = tuple(name for name in get_args(CheckName) if name not in NEVER_ALLOWED)

CHOICES: dict[str, tuple[str, ...]] = {"recipes": RECIPES, "allow": CHECKS, "scorer": tuple(SCORERS)}
