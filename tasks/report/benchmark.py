"""The report of the flow `benchmark`: a stored version's new measurement, compared with its earlier ones."""

from collections.abc import Iterator, Sequence

from prefect.artifacts import create_markdown_artifact
from pydantic import Field, FiniteFloat

from slmops.infra.records import Record
from slmops.tasks.exams.lm_eval import LmEvalResult
from slmops.tasks.report.blocks import Block, Heading, Paragraph, Strong, Text, bullets, joined, quoted, table
from slmops.tasks.report.document import METRIC_TITLES
from slmops.tasks.report.markdown import blocks_to_markdown
from slmops.tasks.report.wording import INTERVALS, decimal, estimated, factor, megabytes
from slmops.tasks.runs.artifacts import shown_in_prefect
from slmops.tasks.runs.events import REGRESSION, tell
from slmops.tasks.runs.stage import stage
from slmops.tasks.verdict.history import Change


class VariantBenchmark(Record):
    """One variant's new figures and their changes from `earlier` measurements; `error` if it did not run.

    `reliable` says whether the machine was idle enough for its figures of speed.
    """

    precision: str
    metrics: dict[str, FiniteFloat] = Field(default_factory=dict)
    reliable: bool | None = None
    earlier: int = 0
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    lm_eval: tuple[LmEvalResult, ...] = ()
    error: str | None = None


class BenchmarkReport(Record):
    """The result of `benchmark`; `regressed` if a figure became worse beyond noise."""

    name: str
    version: int
    variants: tuple[VariantBenchmark, ...]
    checkpoint_lm_eval: tuple[LmEvalResult, ...] = ()

    @property
    def reference(self) -> str:
        """`NAME@VERSION`."""
        return f"{self.name}@{self.version}"

    @property
    def worse(self) -> tuple[Change, ...]:
        """The changes for the worse beyond noise."""
        return tuple(change for variant in self.variants for change in variant.changes if change.trend == "worse")

    @property
    def regressed(self) -> bool:
        """Whether a figure became worse beyond noise."""
        return bool(self.worse)

    @property
    def failed(self) -> tuple[str, ...]:
        """The precisions that could not be measured."""
        return tuple(variant.precision for variant in self.variants if variant.error)

    @property
    def faults(self) -> str:
        """Their errors."""
        return " ".join(f"{variant.precision}: {variant.error}" for variant in self.variants if variant.error)

    @property
    def summary(self) -> str:
        """One sentence on how it ended."""
        figures = [f"{change.precision} {_title(change.metric)} {factor(change.change.value)}" for change in self.worse]
        compared = sum(1 for variant in self.variants if variant.changes)
        parts = [f"worse: {', '.join(figures)}" if figures else "no regression" if compared else "nothing to compare"]
        if self.failed:
            parts.append(f"not measured: {', '.join(self.failed)}")
        return f"{self.reference} {'; '.join(parts)}."

    def to_contract(self) -> dict[str, object]:
        """Return the JSON document of `slmops benchmark --json`."""
        return {"reference": self.reference, "regressed": self.regressed, **self.model_dump(mode="json")}


def benchmark_markdown(report: BenchmarkReport) -> str:
    """Return the report as Markdown; its tables have four columns, for a phone's width."""
    return blocks_to_markdown(list(_document(report)))


def _document(report: BenchmarkReport) -> Iterator[Block]:
    yield Heading(f"{report.reference}: {'regressed' if report.regressed else 'benchmark'}", level=1)
    yield Paragraph(Strong(report.summary) if report.regressed or report.failed else report.summary)
    for variant in report.variants:
        yield Heading(variant.precision)
        if variant.error:
            yield Paragraph((Strong("Not measured: "), quoted(variant.error, 2000)))
            continue
        if variant.changes:
            runs = "the earlier measurement" if variant.earlier == 1 else f"{variant.earlier} earlier measurements"
            yield Paragraph(f"Compared with {runs} of the same files. {INTERVALS}")
            yield from table(("figure", "before", "now", "change"), [_row(change) for change in variant.changes])
        else:
            figures = [(_title(name), _text(name, value)) for name, value in variant.metrics.items()]
            yield from table(("figure", "now"), figures)
        yield from bullets(variant.notes)
    rows = lm_eval_rows(report)
    if rows:
        yield Heading("lm-eval")
        yield from table(tuple(rows[0]), [tuple(quoted(text) for text in row.values()) for row in rows])


def lm_eval_rows(report: BenchmarkReport) -> list[dict[str, str]]:
    """Return one row per task and metric, with value and standard error for the checkpoint and each precision."""
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    subjects = {
        "checkpoint": report.checkpoint_lm_eval,
        **{variant.precision: variant.lm_eval for variant in report.variants},
    }
    for subject, results in subjects.items():
        for result in results:
            key = (result.task, result.metric, result.filter)
            row = rows.setdefault(key, {"task": result.task, "metric": result.metric})
            error = "" if result.stderr is None else f" ± {result.stderr:.4f}"
            row[subject] = f"{result.value:.4f}{error}"
    columns = {"task": "", "metric": ""} | {subject: "-" for subject, results in subjects.items() if results}
    return [columns | row for row in rows.values()]


def benchmark_rows(report: BenchmarkReport) -> list[dict[str, str]]:
    """Return one row per figure for the terminal: the new value, and the earlier one if there is one."""
    rows = []
    for variant in report.variants:
        changes = {change.metric: change for change in variant.changes}
        for name, value in variant.metrics.items():
            change = changes.get(name)
            before, trend = ("-", "-") if change is None else (_text(name, change.before), change.trend)
            now = _text(name, value if change is None else change.after)
            rows.append(
                {"precision": variant.precision, "figure": _title(name), "before": before, "now": now, "trend": trend}
            )
    return rows


def _row(change: Change) -> Sequence[Text]:
    verdict: Text = change.trend if change.trend == "same" else Strong(change.trend)
    changed = joined([verdict, estimated(change.change, factor)], " ")
    return (_title(change.metric), _text(change.metric, change.before), _text(change.metric, change.after), changed)


def _title(metric: str) -> str:
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def _text(metric: str, value: float) -> str:
    return megabytes(value) if metric.endswith("_bytes") else decimal(value)


@stage("publish benchmark", run_name="report-{report.name}")
def publish_benchmark(report: BenchmarkReport) -> None:
    """Post the report as a Markdown artifact, and a regression as an event that an automation can act on."""
    key, markdown = f"slmops-benchmark-{report.name}", benchmark_markdown(report)
    with shown_in_prefect("The report"):
        create_markdown_artifact(markdown=markdown, key=key, description=report.summary)
    if report.regressed:
        changes = [change.model_dump(mode="json") for change in report.worse]
        tell(REGRESSION, report.name, report.reference, report.summary, changes=changes)
