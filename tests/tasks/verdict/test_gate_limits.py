"""The limits that only a broken model misses lie where docs/evaluation.md says: between measured variants."""

import re

import pytest

from slmops.infra.settings import GateSettings
from slmops.tasks.verdict.gate import judge
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.counts import ROOT
from tests.tasks.verdict.test_gate import answered

MEASURED = re.findall(
    r"^\| (recipe|fault): (.+?) \| ([\d.]+) \| ([\d.]+) \| (?:yes|no|within noise) \| (yes|no) \|$",
    (ROOT / "docs" / "evaluation.md").read_text("utf-8"),
    re.M,
)


@pytest.mark.parametrize(("kind", "name", "divergence", "agreement", "passes"), MEASURED)
def test_beside_a_score_the_measured_distributions_pass_as_the_docs_say(
    kind: str, name: str, divergence: str, agreement: str, passes: str
) -> None:
    """Every sound variant of the real model passes; a fault that changes them more than rounding does is rejected."""
    limits = thresholds_for(name.partition("-")[0] if kind == "recipe" else "int4", GateSettings())
    right = [1.0] * 200
    verdict = judge(answered(right, right, top1_agreement=float(agreement), kl_divergence=float(divergence)), limits)
    assert verdict.passed == (passes == "yes")
    assert verdict.passed or kind == "fault"
