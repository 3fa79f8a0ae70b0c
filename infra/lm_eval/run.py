"""lm-eval (the optional extra) on a genai model folder or on a checkpoint, without network and without foreign code."""

import difflib
import hashlib
import ipaddress
import json
import math
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from slmops.infra.errors import BadInput, SlmopsError, StageFailed, reason_of
from slmops.infra.lm_eval.calls import RunTasks, TaskMetric, TaskResults
from slmops.infra.lm_eval.task_files import check_task_folder
from slmops.infra.process.call import Progress

# lm-eval's own default is 100,000, which takes minutes on every core for metrics without a closed form.
BOOTSTRAP_ITERATIONS = 1000
SEED = 1234  # lm-eval's own

# In addition to the child's environment. Each library has its own switch; the last one limits work to one process.
OFFLINE = {"HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "LMEVAL_DISABLE_MULTIPROC": "1"}
# For a user who allows downloads of standard tasks' data from the Hugging Face Hub.
ONLINE = {**OFFLINE, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}


def evaluate(call: RunTasks, progress: Progress) -> TaskResults:
    """Run lm-eval tasks by name.

    Relative paths in the user's tasks start at `include_path`. Templates run in a sandbox unless `allow_code`;
    metrics that would be downloaded as code, and tasks that run the model's output, are always refused. Without
    `allow_network`, this process cannot reach other machines from then on.

    Raises `BadInput` if lm-eval is missing, and for tasks that are unknown, cannot be loaded or cannot be run;
    `StageFailed` for a model that cannot be run.
    """
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput(
            "lm-eval is not installed.", "Install it: pip install 'slmops[lm-eval]'.", code="lm-eval-missing"
        ) from error

    if not call.allow_network:
        sys.addaudithook(_stay_on_this_machine)
    include = call.include_path
    progress(0, 1, "loading the tasks")
    if include:
        check_task_folder(include, allow_code=call.allow_code)
        os.chdir(include)
    loaded = _load_tasks(call.tasks, include, allow_code=call.allow_code)
    progress(0, 1, "loading the model")
    lm = _open(call, progress)
    found = _evaluate(lm, loaded, call)
    packages = ["lm-eval", "datasets"]
    packages += ["onnxruntime", "onnxruntime-genai"] if call.model_dir else ["torch", "transformers"]
    return TaskResults(
        results=tuple(_results(found)),
        notes=tuple(sorted(getattr(lm, "notes", ()))),
        versions={package: version(package) for package in packages},
    )


def _stay_on_this_machine(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse name lookups and connections to other machines, because a task's data files may be URLs."""
    if event in {"socket.connect", "socket.sendto"}:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a local socket's address is a path
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host is not None and not _is_local(host.decode() if isinstance(host, bytes) else str(host)):
        raise ConnectionError(f"the network is not allowed, and {host} was requested")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in {"", "localhost"}


def _load_tasks(names: Sequence[str], include: Path | None, *, allow_code: bool) -> Any:
    from lm_eval import utils
    from lm_eval.tasks import TaskManager

    refused: list[str] = []

    def refuse(name: str, *_: object, **__: object) -> NoReturn:
        refused.append(name)
        raise _foreign_metric(name)

    sys.modules["evaluate"] = _metrics_of(refuse)
    if not allow_code:
        utils.env = _sandboxed(utils.env)
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or not set(names) <= set(manager.all_subtasks):  # the built-in index takes seconds
        manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.task_index:  # lm-eval would also accept the path of a file
            close = difflib.get_close_matches(name, manager.all_tasks, n=5)
            raise BadInput(
                f"lm-eval has no task {name!r}.",
                f"Close to it: {', '.join(close)}." if close else "List them: lm-eval ls tasks.",
                code="lm-eval-task-unknown",
            )
    try:
        loaded = manager.load(list(names))
    except SlmopsError:
        raise
    except Exception as error:  # a task file and its data may have any fault
        raise BadInput(
            f"The tasks {', '.join(names)} cannot be loaded: {reason_of(error)[:500]}.",
            "For a task of your own, correct its file. A standard task's data must have been prepared once by the "
            "datasets library (docs/benchmarks.md), or the network be allowed.",
            code="lm-eval-task-not-valid",
        ) from error
    if refused:
        raise _foreign_metric(refused[0])
    for name, task in loaded["tasks"].items():
        _check_task(name, task)
    return loaded


def _metrics_of(load: Callable[..., NoReturn]) -> ModuleType:
    """Return a replacement of the package `evaluate`, from which lm-eval and its tasks load further metrics.

    The package's `load` runs code from the Hub or a local file, and its import takes seconds.
    """
    metrics = ModuleType("evaluate")
    metrics.load = load  # type: ignore[attr-defined]
    return metrics


def _foreign_metric(name: str) -> BadInput:
    return BadInput(
        f"A task uses the metric {name!r}, which lm-eval does not have and would download as code.",
        "Choose a task with lm-eval's own metrics.",
        code="lm-eval-metric-unknown",
    )


def _check_task(name: str, one: Any) -> None:
    from lm_eval.models.utils import normalize_gen_kwargs

    if getattr(one, "UNSAFE_CODE", False):
        raise BadInput(
            f"The task {name} runs code that the model wrote.", "Choose another task.", code="lm-eval-code-of-model"
        )
    if getattr(one, "MULTIMODAL", False):
        raise BadInput(f"The task {name} uses images or sound.", "Choose a task of text.", code="lm-eval-not-text")
    if one.OUTPUT_TYPE == "generate_until":
        options = one.get_config("generation_kwargs") or {}
        if normalize_gen_kwargs(options).get("do_sample"):
            raise BadInput(
                f"The task {name} requires sampled answers; slmops measures greedy ones.",
                "Choose another task, or include it in one of your own with generation_kwargs: {do_sample: false}.",
                code="lm-eval-samples",
            )


def _sandboxed(environment: Any) -> Any:
    """The templates' environment: a sandbox without access to Python."""
    from jinja2.sandbox import SandboxedEnvironment

    safe = SandboxedEnvironment(
        loader=environment.loader,
        undefined=environment.undefined,
        keep_trailing_newline=environment.keep_trailing_newline,
    )
    safe.filters.update(environment.filters)
    return safe


def _open(call: RunTasks, progress: Progress) -> Any:
    if call.model_dir:
        from slmops.infra.genai.runtime import GenaiModel
        from slmops.infra.lm_eval.model import GenaiLM

        model = GenaiModel(call.model_dir, threads=call.threads, all_positions=True)
        return GenaiLM(model, progress)
    assert call.checkpoint_dir
    import torch
    from lm_eval.models.huggingface import HFLM

    from slmops.infra.transformers.loading import load_to_answer

    torch.set_num_threads(call.threads)
    tokenizer, checkpoint = load_to_answer(call.checkpoint_dir)
    return HFLM(pretrained=checkpoint, tokenizer=tokenizer, batch_size=1)


def _evaluate(lm: Any, loaded: Any, call: RunTasks) -> Any:
    """Evaluate loaded tasks as `lm_eval.simple_evaluate` does, without inspecting the machine and its git folders."""
    import lm_eval
    import numpy as np

    random.seed(0)
    np.random.seed(SEED)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    try:
        return lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=call.limit,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
            apply_chat_template=call.chat_template,
            fewshot_as_multiturn=call.chat_template,
        )
    except SlmopsError:
        raise
    except Exception as error:  # tasks are programs of many authors
        raise StageFailed(
            f"lm-eval failed: {reason_of(error)[:500]}.",
            "The stage's log has the whole message; try another task.",
            code="lm-eval-failed",
        ) from error


def _results(found: Any) -> Iterator[TaskMetric]:
    for name, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                raise StageFailed(
                    f"The metric {metric} of the task {name} is {value}.",
                    "The model gives the correct text a probability of zero; see its figures on the evaluation.",
                    code="lm-eval-score-not-finite",
                )
            yield TaskMetric(
                task=name,
                metric=metric,
                filter=filter_name,
                value=float(value),
                stderr=_finite(figures.get(f"{metric}_stderr,{filter_name}")),
                n_samples=int(figures["sample_len"]),
                higher_is_better=found["higher_is_better"].get(name, {}).get(metric),
                num_fewshot=found["n-shot"].get(name),
                task_version=_text(found["versions"].get(name)),
                task_digest=_digest(found["configs"].get(name, found["group_subtasks"].get(name))),
            )


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _digest(config: object) -> str:
    """SHA-256 of a task's configuration (of a group: of its tasks' names), independent of its file's location."""
    if isinstance(config, dict):
        metadata = config.get("metadata")
        kept = {key: value for key, value in metadata.items() if key != "config_source"} if metadata else None
        config = {**config, "metadata": kept}
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
