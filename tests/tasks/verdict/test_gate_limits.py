"""The limits that only a broken model misses lie where docs/evaluation.md says: between measured variants."""

import re

import pytest

from slmops.infra.settings import GateSettings
from slmops.tasks.verdict.gate import judge
from slmops.tasks.verdict.thresholds import thresholds_for
from tests.counts import ROOT
from tests.tasks.verdict.test_gate import answered, evaluation

MEASURED = re.findall(
    r"^\| (recipe|fault): (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (yes|no) \| (yes|no) \|$",
    (ROOT / "docs" / "evaluation.md").read_text("utf-8"),
    re.M,
)


@pytest.mark.parametrize(("kind", "name", "divergence", "agreement", "near", "alone", "beside"), MEASURED)
def test_the_measured_distributions_pass_alone_and_beside_a_score_as_the_docs_say(
    kind: str, name: str, divergence: str, agreement: str, near: str, alone: str, beside: str
) -> None:
    """Beside a score every sound variant of the real model passes, and alone every one by a default recipe; a fault
    that changes the distributions more than rounding does is rejected.
    """
    figures = {"top1_agreement": float(agreement), "near_agreement": float(near), "kl_divergence": float(divergence)}
    limits = thresholds_for(name.partition("-")[0] if kind == "recipe" else "int4", GateSettings())
    right = [1.0] * 200
    assert judge(evaluation(**figures), limits).passed == (alone == "yes")
    assert judge(answered(right, right, **figures), limits).passed == (beside == "yes")
    if kind == "recipe":
        assert beside == "yes"
        assert (alone == "yes") == (name != "int4-rtn")
