"""Report records as a deploy of the demo checkpoint fills them: three variants of a model of 20 M parameters."""

import random
from typing import Any

from slmops.infra.genai.calls import Measured
from slmops.tasks.exams.endurance import EdgeInputOutcome, Endurance, MemoryGrowth
from slmops.tasks.exams.estimates import Estimate, mean_score, paired_loss, slope
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.exams.length_sweep import LengthFigures, LengthSweep
from slmops.tasks.exams.measurement import Measurement, summarize
from slmops.tasks.exams.template_parity import ParityMismatch, TemplateParity
from slmops.tasks.exams.text import TextComparison
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.report.assemble import variant_intervals, variant_metrics
from slmops.tasks.report.records import DeployReport, Provenance, VariantDetails, VariantReport
from slmops.tasks.verdict.gate import GateVerdict
from slmops.tasks.verdict.history import Change, History

PARAMETERS = 19_600_000
HARDWARE = {
    "cpu": "AMD EPYC 7763 64-Core Processor",
    "physical_cores": 2,
    "logical_cores": 4,
    "ram_bytes": 16_769_277_952,
    "os": "Linux 6.8.0",
    "machine": "x86_64",
}
VERSIONS = {"onnxruntime": "1.31.0", "onnxruntime-genai": "0.18.0", "foundry-local-sdk": "2.2.1"}
# precision -> (bytes, prompt tok/s, new tok/s, wrong rows of 120, KL, TTFT at 32 tokens in ms, peak RSS)
FIGURES: dict[str, tuple[int, float, float, tuple[int, ...], float, float, int]] = {
    "fp16": (40_213_004, 5_210.0, 410.0, (17, 63), 0.0004, 6.4, 214_000_000),
    "int8": (24_870_112, 4_480.0, 655.0, (17, 63), 0.0041, 7.2, 171_000_000),
    "int4": (15_904_551, 6_120.0, 801.0, (17, 41, 63, 88), 0.0467, 5.3, 148_000_000),
}
ROWS = 120
REFERENCE_WRONG = (17, 63)
DEVICES = {"kitchen light": "light", "bedroom lamp": "light", "living room blinds": "blinds", "thermostat": "climate"}


def evaluation_rows() -> tuple[EvaluationRow, ...]:
    """Commands to a smart home and the action that each means."""
    return tuple(EvaluationRow.model_validate(_row(number)) for number in range(ROWS))


def _row(number: int) -> dict[str, Any]:
    device = list(DEVICES)[number % 4]
    return {
        "id": f"home-{number:03}",
        "messages": [{"role": "user", "content": f"Please turn the {device} to {10 + number % 90} percent"}],
        "expected": _answer(number),
        "category": DEVICES[device],
    }


def _answer(number: int, level: int | None = None) -> str:
    shown = 10 + number % 90 if level is None else level
    return f'{{"device":"{list(DEVICES)[number % 4]}","action":"set","level":{shown}}}'


def measurement(precision: str) -> Measurement:
    """Five requests of 128 + 64 tokens, with some noise."""
    size, prompt, new, _, _, _, rss = FIGURES[precision]
    noise = random.Random(precision)
    rows = []
    for repetition in range(5):
        factor = noise.uniform(0.95, 1.05)
        gaps = [1000 / new / factor * noise.uniform(0.9, 1.2) for _ in range(63)]
        rows.append(
            {
                "prompt_tokens": 128,
                "new_tokens": 64,
                "repetition": repetition,
                "ttft_ms": 128_000 / prompt / factor,
                "prompt_processing_throughput_tps": prompt * factor,
                "token_generation_throughput_tps": new * factor,
                "inter_token_latency_ms": sum(gaps) / len(gaps),
                "inter_token_latencies_ms": gaps,
                "e2e_latency_ms": 128_000 / prompt / factor + sum(gaps),
            }
        )
    result = {
        "rows": rows,
        "sweep": [],
        "sweep_notes": [],
        "load_ms": 31.4,
        "peak_rss_bytes": rss,
        "cpu_percent": 188.0,
        "size_bytes": size,
        "notes": [],
        "threads": 2,
        "hardware": HARDWARE,
        "versions": VERSIONS,
    }
    return summarize(Measured.model_validate(result), warmup=1, wall_s=4.2)


def evaluation(precision: str) -> Evaluation:
    """The demo's evaluation: two rows that the checkpoint itself gets wrong, and what quantization adds."""
    wrong, divergence = FIGURES[precision][3:5]
    asked = evaluation_rows()
    rows = []
    for number, row in enumerate(asked):
        right = number not in wrong
        rows.append(
            {
                "id": row.id,
                "answer": _answer(number, None if right else 99),
                "exact_match": right,
                "identical_to_reference": right,
                "prompt_tokens": 24,
                "template_matches": True,
                "positions": 20,
                "finite_positions": 20,
                "top1_agreement": 1.0 if right else 0.9,
                "kl_divergence": divergence,
                "category": row.category,
                "reference_answer": _answer(number, 99 if number in REFERENCE_WRONG else None),
                "score": float(right),
                "reference_score": float(number not in REFERENCE_WRONG),
                "output_fault": None if number != 88 or right else "'level': 99 is greater than the maximum of 98",
            }
        )
    scores = [float(number not in wrong) for number in range(ROWS)]
    reference = [float(number not in REFERENCE_WRONG) for number in range(ROWS)]
    categories = []
    for category in sorted(set(DEVICES.values())):
        picked = [number for number, row in enumerate(asked) if row.category == category]
        categories.append(
            {
                "category": category,
                "rows": len(picked),
                "score": mean_score([scores[number] for number in picked]),
                "reference_score": mean_score([reference[number] for number in picked]),
            }
        )
    faults = [row for row in rows if row["output_fault"]]
    return Evaluation.model_validate(
        {
            "rows": rows,
            "template_mismatches": {"count": 0, "example": None},
            "positions": 1024,
            "finite_logits": 1.0,
            "top1_agreement": 1 - divergence / 2,
            "top1_agreement_interval": around(1 - divergence / 2, divergence / 8),
            "kl_divergence": divergence,
            "kl_divergence_interval": around(divergence, divergence / 5),
            "kl_divergence_p99": divergence * 9,
            "perplexity": 1.412 * (1 + divergence),
            "reference_perplexity": 1.412,
            "exact_match": sum(scores) / ROWS,
            "reference_exact_match": sum(reference) / ROWS,
            "identical_answers": sum(scores) / ROWS,
            "empty_answers": 0,
            "worst_rows": [rows[number]["id"] for number in wrong],
            "worst_examples": [rows[number]["id"] for number in wrong if number not in REFERENCE_WRONG],
            "vocabulary": {"variant": 2048, "reference": 2048, "compared": 2048},
            "score": mean_score(scores),
            "reference_score": mean_score(reference),
            "quality_loss": paired_loss(reference, scores),
            "categories": categories,
            "output_conformity": mean_score([float(row not in faults) for row in rows]),
            "reference_output_conformity": mean_score([1.0] * ROWS),
            "rows_sha256": "0" * 64,
            "threads": 2,
            "versions": VERSIONS,
            "wall_s": 11.8,
            "peak_rss_bytes": 400_000_000,
        }
    )


def around(value: float, reach: float) -> Estimate:
    """An estimate with an interval of `reach` to either side, within 0 and 1."""
    return Estimate(value=value, low=max(0.0, value - reach), high=min(1.0, value + reach))


def length_sweep(precision: str) -> LengthSweep:
    """A sweep from 32 to 2,048 tokens."""
    _, _, new, _, _, ttft, _ = FIGURES[precision]
    lengths = tuple(
        LengthFigures(
            prompt_tokens=tokens,
            ttft_ms=ttft * (tokens / 32) ** 1.07,
            token_generation_throughput_tps=new * (1 - tokens / 9000),
            valid=True,
        )
        for tokens in (32, 64, 128, 256, 512, 1024, 2048)
    )
    return LengthSweep(
        lengths=lengths,
        ttft_scaling_exponent=Estimate(value=1.07, low=1.02, high=1.12),
        worst_cliff_ratio=1.13,
        worst_cliff_prompt_tokens=2048,
        notes=(),
    )


def endurance(precision: str) -> tuple[Endurance, ...]:
    """A soak of 48 requests and the edge inputs, in both runtimes."""
    return tuple(_endurance_in(precision, runtime) for runtime in ("genai", "foundry"))


def _endurance_in(precision: str, runtime: str) -> Endurance:
    noise = random.Random(precision + runtime)
    base = FIGURES[precision][6]
    rss = [base + round(2.5e6 * min(number, 8)) + noise.randrange(400_000) for number in range(48)]
    outcomes = [
        ("empty", "refused", "The prompt is empty.", None),
        ("white space", "answered", '{"device":"none"}', None),
        ("longer than the context", "refused", "The prompt has 4,096 tokens; the context holds 2,048.", None),
        ("control characters", "answered", '{"device":"none"}\x1b[31m', None),
        ("emoji", "answered", "💡", None),
        ("right to left", "answered", "\u202eabc", None),
        ("chat template tokens", "answered", "<|im_start|>system", runtime == "genai"),
        ("10,000 repeats", "refused", "The prompt has 20,004 tokens; the context holds 2,048.", None),
    ]
    return Endurance.model_validate(
        {
            "runtime": runtime,
            "memory": MemoryGrowth(
                rss_bytes=tuple(rss), warmup_requests=12, bytes_per_request=slope(range(36), rss[12:])
            ),
            "edge_inputs": [
                EdgeInputOutcome.model_validate(
                    {
                        "name": name,
                        "outcome": outcome,
                        "detail": detail,
                        "prompt_tokens": 4,
                        "alive": True,
                        "control_tokens": control,
                    }
                )
                for name, outcome, detail, control in outcomes
            ],
            "notes": (),
            "versions": VERSIONS,
            "wall_s": 6.0,
        }
    )


def parity(*mismatches: ParityMismatch) -> TemplateParity:
    """The comparison of nine conversations."""
    note = "The static strings of inference_model.json cannot express the default system prompt."
    return TemplateParity(conversations=9, mismatches=mismatches, broken_control_tokens=(), notes=(note,))


def text_comparison(precision: str) -> TextComparison:
    """The comparison on a manual of the user's."""
    divergence = FIGURES[precision][4]
    return TextComparison(
        origin="/data/manuals/home.txt",
        tokens=8192,
        positions=1024,
        finite_logits=1.0,
        perplexity=18.2 * (1 + divergence),
        reference_perplexity=18.2,
        perplexity_ratio=Estimate(value=1 + divergence, low=1 + divergence / 2, high=1 + divergence * 2),
        top1_agreement=around(1 - divergence / 2, divergence / 6),
        kl_divergence=around(divergence, divergence / 4),
        kl_divergence_p99=divergence * 11,
    )


def verdict(precision: str) -> GateVerdict:
    """A verdict with checks of every part of the quality list."""
    evaluated = evaluation(precision)
    loss = evaluated.quality_loss
    assert loss is not None
    assert evaluated.kl_divergence is not None
    checks: list[dict[str, Any]] = [
        {"name": "top1_agreement", "value": evaluated.top1_agreement, "threshold": 0.9, "bound": "at least"},
        {"name": "kl_divergence", "value": evaluated.kl_divergence, "threshold": 0.1, "bound": "at most"},
        {
            "name": "quality_loss",
            "value": loss.value,
            "threshold": 0.05,
            "bound": "at most",
            "low": loss.low,
            "high": loss.high,
            "decided": loss.high < 0.05,
        },
        {"name": "finite_logits", "value": 1.0, "threshold": 1.0, "bound": "at least"},
        {"name": "output_format", "value": 1.0, "threshold": 0.95, "bound": "at least"},
        {"name": "template_parity", "value": 0, "threshold": 0, "bound": "at most"},
        {"name": "memory_growth_genai", "value": 210.0, "threshold": 65536, "bound": "at most"},
        {"name": "memory_growth_foundry", "value": -90.0, "threshold": 65536, "bound": "at most"},
        {"name": "valid_lengths", "value": 0, "threshold": 0, "bound": "at most"},
        {"name": "steadiness", "value": 1.13, "threshold": 4.0, "bound": "at most"},
        {"name": "edge_input_genai", "value": 0, "threshold": 0, "bound": "at most"},
        {"name": "edge_input_foundry", "value": 0, "threshold": 0, "bound": "at most"},
    ]
    return GateVerdict.model_validate({"passed": True, "checks": [{"passed": True, **check} for check in checks]})


def full_variant(precision: str, **changes: Any) -> VariantReport:
    """A registered variant of which everything was measured."""
    details = VariantDetails(
        measurement=measurement(precision),
        evaluation=evaluation(precision),
        length_sweep=length_sweep(precision),
        parity=parity(),
        text=text_comparison(precision),
        endurance=endurance(precision),
    )
    given = {
        "precision": precision,
        "status": "registered",
        "size_bytes": FIGURES[precision][0],
        "digest": f"{len(precision):x}{precision.encode().hex():0<63}",
        "foundry_model_id": f"home-{precision}-generic-cpu:3",
        "recipe": f"cpu-{precision}",
        "metrics": variant_metrics(details),
        "intervals": variant_intervals(details),
        "gate": verdict(precision),
        "reason": "" if precision == "int4" else "int4 also passed the gate and is smaller",
        "answer": _answer(0),
        "details": details,
    }
    return VariantReport.model_validate(given | changes)


def full_report(*variants: VariantReport, **changes: Any) -> DeployReport:
    """The third version of the demo model, int4 chosen."""
    shown = variants or tuple(full_variant(precision) for precision in FIGURES)
    faster = Estimate(value=1.31, low=1.27, high=1.36)
    alike = Estimate(value=1.0, low=0.98, high=1.02)
    loss = Estimate(value=-0.017, low=-0.041, high=0.008)
    given = {
        "name": "home",
        "version": 3,
        "status": "registered",
        "aliases": ("champion",),
        "selected": "int4",
        "reason": "int4 is the smallest precision that passed the gate.",
        "variants": shown,
        "checkpoint": "/home/user/checkpoints/home",
        "parameters": PARAMETERS,
        "evaluation": f"{ROWS} rows of eval.jsonl",
        "evaluation_rows": evaluation_rows(),
        "reference_exact_match": 118 / ROWS,
        "foundry_model_id": "home:3",
        "foundry_dir": "/home/user/.local/share/slmops/foundry",
        "question": "Please turn the kitchen light to 10 percent",
        "description": "Turns commands to a smart home into actions.",
        "warnings": ("The checkpoint's generation_config.json has no temperature.",),
        "provenance": Provenance(
            source_digest="3f" * 32,
            manifest_digest="a7" * 32,
            architecture="Qwen2ForCausalLM",
            builder={"olive-ai": "0.13.0", "onnxruntime-genai": "0.18.0", "transformers": "5.23.0", "torch": "2.13.0"},
            created_at="2026-11-22T10:03:11.482913+00:00",
        ),
        "history": History(
            previous="home@2",
            changes=(
                _change("int4", "token_generation_throughput_tps", 611.0, 801.0, faster, "better"),
                _change("int4", "peak_rss_bytes", 121e6, 148e6, Estimate(value=1.22, low=1.2, high=1.24), "worse"),
                _change("int4", "ttft_ms", 21.0, 20.9, alike, "same"),
                _change("int8", "score", 1.0, 0.983, loss, "same"),
            ),
            notes=("fp16 is not in home@2.",),
        ),
    }
    return DeployReport.model_validate(given | changes)


def _change(precision: str, metric: str, before: float, after: float, change: Estimate, trend: str) -> Change:
    return Change.model_validate(
        {"precision": precision, "metric": metric, "before": before, "after": after, "change": change, "trend": trend}
    )
