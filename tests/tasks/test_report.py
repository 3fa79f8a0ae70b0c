"""The report's text and the status of a deploy, from records alone."""

import pytest

from tasks.gate import GateCheck, GateVerdict
from tasks.report.markdown import to_markdown, variant_rows
from tasks.report.records import DeployReport, VariantReport, in_order_of_size, overall_status

FIGURES = {"load_ms": 40.0, "ttft_ms": 5.25, "peak_rss_bytes": 78e6, "top1_agreement": 0.97, "kl_divergence": 0.0312}


def variant(precision: str, status: str = "registered", **changes: object) -> VariantReport:
    given = {
        "precision": precision,
        "status": status,
        "size_bytes": 500_000_000,
        "foundry_model_id": f"home-{precision}-generic-cpu:2" if status == "registered" else None,
        "metrics": FIGURES,
    }
    return VariantReport.model_validate(given | changes)


def report(*variants: VariantReport, **changes: object) -> DeployReport:
    given = {
        "name": "home",
        "version": 2,
        "status": "registered",
        "variants": variants,
        "checkpoint": "./home",
        "parameters": 494_000_000,
        "evaluation": "200 rows of eval.jsonl",
        "foundry_dir": "/data/foundry",
    }
    return DeployReport.model_validate(given | changes)


@pytest.mark.parametrize(
    ("statuses", "unchanged", "expected"),
    [
        (["registered", "registered"], False, "registered"),
        (["registered", "registered"], True, "unchanged"),
        (["registered", "rejected"], False, "registered"),
        (["rejected", "rejected"], False, "rejected"),
        (["rejected"], True, "rejected"),
        (["registered", "failed"], True, "failed"),
        (["rejected", "failed"], False, "failed"),
    ],
)
def test_a_deploys_status_is_that_of_its_gravest_variant(statuses: list[str], unchanged: bool, expected: str) -> None:
    variants = [variant("int4", status) for status in statuses]
    assert overall_status(variants, unchanged=unchanged) == expected


def test_variants_stand_from_large_to_small() -> None:
    given = [variant(precision) for precision in ("int4", "fp16", "int8")]
    assert [one.precision for one in in_order_of_size(given)] == ["fp16", "int8", "int4"]


def test_the_table_sets_sizes_beside_what_the_tutorial_promises() -> None:
    (row,) = variant_rows(report(variant("int4")))
    assert (row["size"], row["of fp32"]) == ("500.0 MB", "0.253 (0.125)")
    assert (row["load ms"], row["TTFT ms"], row["peak RSS"]) == ("40.0", "5.2", "78.0 MB")
    assert (row["prompt tok/s"], row["exact match"]) == ("-", "-")


def test_a_variant_that_was_not_built_has_a_row_too() -> None:
    failed = variant("int4", "failed", size_bytes=None, metrics={}, error="Olive could not build the model.")
    text = to_markdown(report(failed, status="failed", version=None))
    assert text.startswith("# home: failed")
    assert "| int4 | failed | - | - | - |" in text
    assert "## Failures\n\n- int4: Olive could not build the model." in text
    assert "## Use" not in text


def test_the_gate_shows_figures_thresholds_and_what_failed() -> None:
    checks = (
        GateCheck(name="top1_agreement", value=0.97, threshold=0.9, passed=True),
        GateCheck(name="kl_divergence", value=0.25, threshold=0.1, passed=False),
        GateCheck(name="finite_logits", value=None, threshold=1.0, passed=False),
    )
    rejected = variant("int4", "rejected", gate=GateVerdict(passed=False, checks=checks))
    text = to_markdown(report(variant("fp16"), rejected, reference_exact_match=0.985))
    assert "The reference answers 98.5% of the evaluation set exactly." in text
    assert "| top1 agreement | - | 0.97 (at least 0.9) |" in text
    assert "| kl divergence | - | **0.25 (at most 0.1)** |" in text
    assert "| finite logits | - | **not finite (at least 1)** |" in text


def test_it_says_how_to_call_what_was_registered() -> None:
    text = to_markdown(report(variant("int4", answer='{"a":1}'), foundry_model_id="home:2"))
    assert "`home-int4-generic-cpu:2`, `home:2`" in text
    assert "slmops chat home@2" in text
    assert "model_cache_dir='/data/foundry'" in text
    assert 'get_model_variant("home:2")' in text
    assert '- int4 answered: `{"a":1}`' in text


def test_a_table_cell_cannot_break_the_table() -> None:
    text = to_markdown(report(variant("int4", foundry_model_id="a|b")))
    assert "a\\|b" in text
