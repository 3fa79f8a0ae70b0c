"""Calls of child processes that use lm-eval, and their answers."""

from pydantic import FiniteFloat

from slmops.infra.process.call import Call, Progress
from slmops.infra.records import AbsolutePath, Record


class TaskMetric(Record):
    """One metric of one lm-eval task (or group of tasks) after one filter.

    `stderr` is lm-eval's standard error of `value`, or None (a single document, a metric without one);
    `n_samples` counts documents. `task_digest` is the SHA-256 of the task's configuration.
    """

    task: str
    metric: str
    filter: str
    value: FiniteFloat
    stderr: FiniteFloat | None
    n_samples: int
    higher_is_better: bool | None
    num_fewshot: int | None
    task_version: str | None
    task_digest: str


class TaskResults(Record):
    """The metrics of all tasks, and notes on them."""

    results: tuple[TaskMetric, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]


class RunTasks(Call[TaskResults]):
    """Run lm-eval tasks by name.

    One of `model_dir` (genai) and `checkpoint_dir` (run by lm-eval's own HFLM in float32) is None. `tasks` are
    names of tasks, groups or tags; `include_path` is a folder of the user's tasks; `limit` counts documents per task.
    """

    model_dir: AbsolutePath | None = None
    checkpoint_dir: AbsolutePath | None = None
    tasks: tuple[str, ...]
    include_path: AbsolutePath | None = None
    limit: int | None = None
    chat_template: bool = False
    allow_code: bool = False
    allow_network: bool = False
    threads: int

    def perform(self, progress: Progress) -> TaskResults:
        """See `slmops.infra.lm_eval.run.evaluate`."""
        from slmops.infra.lm_eval.run import evaluate

        return evaluate(self, progress)
