"""`slmops benchmark`: measure a stored version again."""

from typing import Any

from slmops.deployments.cli.options import Json, LogLevel, asks_for
from slmops.deployments.cli.output import print_json, print_line, print_table
from slmops.deployments.cli.running import run_flow, version_of
from slmops.tasks.request.upkeep_parameters import BenchmarkParameters


@asks_for(BenchmarkParameters)
def benchmark(parameters: dict[str, Any], log_level: LogLevel = None, as_json: Json = False) -> None:
    """Measure a stored version again and compare it with its earlier figures; run standard benchmarks on it."""
    version_of(parameters["reference"])  # refuses a missing version before anything is written
    report = run_flow("benchmark", parameters)
    if as_json:
        print_json(report.to_contract())
        return
    from slmops.tasks.report.benchmark import benchmark_rows, lm_eval_rows

    print_table("Figures", benchmark_rows(report))
    print_table("lm-eval", lm_eval_rows(report))
    print_line(report.summary)
