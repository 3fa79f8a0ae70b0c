"""Standard benchmarks: lm-eval's tasks, or the user's own tasks in its format, on a variant and its checkpoint."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.infra.lm_eval.calls import RunTasks, TaskMetric
from slmops.infra.lm_eval.run import OFFLINE, ONLINE
from slmops.infra.lm_eval.task_files import digest_of_task_folder
from slmops.infra.records import Json, Record
from slmops.infra.settings import Settings
from slmops.infra.storage.evidence import Kind
from slmops.infra.storage.folders import work_folder
from slmops.infra.storage.manifest import digest_of
from slmops.infra.storage.version import Variant, Version
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.exams.exam import Bench, Exam
from slmops.tasks.runs.progress import stage_progress
from slmops.tasks.runs.stage import stage
from slmops.tasks.workshop import Workshop, workshop


class LmEvalResult(TaskMetric):
    """One metric of one lm-eval task, with the versions that it was measured with, and notes."""

    versions: dict[str, str]
    notes: tuple[str, ...] = ()


class LmEvalTasks(Record):
    """The lm-eval tasks to run: names of tasks, groups or tags, and options.

    `include_path` is a folder with the user's own tasks, `limit` the documents of each task. Prompts are plain text
    unless `chat_template`. `allow_network` allows downloads of the tasks' data from the Hugging Face Hub; `allow_code`
    allows the folder's task files to run Python code, with the user's own permissions.
    """

    names: tuple[str, ...]
    include_path: str | None = None
    limit: int | None = None
    chat_template: bool = False
    allow_network: bool = False
    allow_code: bool = False


def run_lm_eval_tasks(
    settings: Settings, tasks: LmEvalTasks, bench: Bench, *, checkpoint: bool = False
) -> tuple[LmEvalResult, ...]:
    """Run lm-eval tasks in a child process on the bench's model: a genai model folder, or a `checkpoint`.

    Raises `BadInput` if lm-eval is not installed, and for tasks that are unknown, cannot be loaded, contain code, or
    have no local data; `StageFailed` and its kinds for a model that cannot be run.
    """
    _check(tasks)
    child = bench.run(
        RunTasks(
            model_dir=None if checkpoint else bench.model,
            checkpoint_dir=bench.model if checkpoint else None,
            tasks=tasks.names,
            include_path=None if tasks.include_path is None else _folder(tasks.include_path),
            limit=tasks.limit,
            chat_template=tasks.chat_template,
            allow_code=tasks.allow_code,
            allow_network=tasks.allow_network,
            threads=settings.threads,
        ),
        settings.timeout.lm_eval_s,
        environment=ONLINE if tasks.allow_network else OFFLINE,
    )
    shared = {"versions": child.value.versions, "notes": child.value.notes}
    return tuple(LmEvalResult(**result.model_dump(), **shared) for result in child.value.results)


def _check(tasks: LmEvalTasks) -> None:
    if not tasks.names or not all(tasks.names):
        raise BadInput("No lm-eval task is named.", "Name at least one task; lm-eval ls tasks lists them.")
    if tasks.limit is not None and tasks.limit < 1:
        raise BadInput(f"The limit is {tasks.limit} documents.", "Set at least 1, or none for all documents.")


def _folder(include_path: str) -> Path:
    return Path(include_path).expanduser().absolute()


def lm_eval_question(subject_digest: str, tasks: LmEvalTasks) -> Json:
    """Return everything that determines lm-eval's results.

    This is the subject (a variant's or a checkpoint's digest), the tasks, the content of the user's task folder and the
    data that it names, and lm-eval's version. Permissions do not change an answer and are left out.

    Raises `BadInput` for impossible tasks, if lm-eval is not installed, or if the folder cannot be read.
    """
    _check(tasks)
    try:
        lm_eval_version = version_of("lm-eval")
    except PackageNotFoundError:
        raise BadInput(
            "lm-eval is not installed.", "Install it: pip install 'slmops[lm-eval]'.", code="lm-eval-missing"
        ) from None
    return {
        "subject": subject_digest,
        "tasks": list(tasks.names),
        "limit": tasks.limit,
        "chat_template": tasks.chat_template,
        "folder": None if tasks.include_path is None else digest_of_task_folder(_folder(tasks.include_path)),
        "lm-eval": lm_eval_version,
    }


def check_lm_eval(tasks: LmEvalTasks) -> None:
    """Raise `BadInput` for tasks that lm-eval cannot run, before anything else is done."""
    lm_eval_question("", tasks)  # checks that lm-eval is installed and the folder exists


LM_EVAL = Kind("lm-eval", tuple[LmEvalResult, ...], field="results")


class LmEvalExam(Exam[tuple[LmEvalResult, ...]]):
    """lm-eval's results for a variant."""

    kind, name, done_before = LM_EVAL, "lm-eval", "run before"

    def __init__(self, tasks: LmEvalTasks) -> None:
        self.tasks = tasks

    def question(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.question`; raises `BadInput` as `lm_eval_question` does."""
        return lm_eval_question(variant.digest, self.tasks)

    def record(self, variant: Variant, settings: Settings) -> Json:
        """See `Exam.record`."""
        return {"subject": variant.precision, "tasks": self.tasks.model_dump(mode="json")}

    def take(self, bench: Bench, variant: Variant, shop: Workshop) -> tuple[LmEvalResult, ...]:
        """See `Exam.take`."""
        return run_lm_eval_tasks(shop.settings, self.tasks, bench)


@stage("run lm-eval on checkpoint", run_name="lm-eval-checkpoint")
def run_lm_eval_on_checkpoint(
    version: Version, prepared: PreparedCheckpoint, asked: LmEvalTasks
) -> tuple[LmEvalResult, ...]:
    """Run the same tasks on a version's source checkpoint with lm-eval's own runner, to compare its variants."""
    shop = workshop()
    key = digest_of(lm_eval_question(prepared.digest, asked))[:16]
    with stage_progress("lm-eval checkpoint") as on_progress:
        known = version.latest(LM_EVAL, key)
        if known:
            on_progress(1, 1, LmEvalExam.done_before)
            return known
        with work_folder(shop.settings) as work:
            bench = Bench(prepared.folder, work, on_progress)
            results = run_lm_eval_tasks(shop.settings, asked, bench, checkpoint=True)
        version.record(LM_EVAL, results, key, beside={"subject": "checkpoint", "tasks": asked.model_dump(mode="json")})
    return results
