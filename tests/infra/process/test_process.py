import contextlib
import importlib
import inspect
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import TypeAdapter

from slmops.infra.errors import BadInput, DeadlineExceeded, PassingFault, StageFailed
from slmops.infra.process.call import Call, ChildResult, perform
from slmops.infra.process.channel import child_environment, keeping_memory
from slmops.infra.process.supervisor import ChildProcess, run_in_child
from tests.infra.child_functions import (
    AnswerOtherwise,
    CountCalls,
    Counted,
    Crash,
    DieWhileItAnswers,
    Double,
    Doubled,
    EndSilently,
    KillItself,
    Refuse,
    SleepWithAGrandchild,
    UseMemory,
)
from tests.support.errors import coded

ROOT = Path(__file__).resolve().parents[3]


def run(call: Call[Any], tmp_path: Path, **options: Any) -> ChildResult[Any]:
    options = {"deadline_s": 60, **options}
    return run_in_child(call, log_path=tmp_path / "child.log", work_dir=tmp_path / "work", **options)


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 120
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child's end at once")
def test_the_end_of_a_child_is_not_found_by_looking_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    sleep = time.sleep

    def recorded(seconds: float) -> None:
        slept.extend([seconds] * (threading.current_thread() is threading.main_thread()))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", recorded)
    with ChildProcess() as lasting:
        run(Double(value=1), tmp_path, within=lasting)
    run(Double(value=2), tmp_path)
    assert slept == []


def test_a_child_returns_its_result_progress_and_log(tmp_path: Path) -> None:
    steps: list[tuple[float, float, str]] = []
    result = run(Double(value=21), tmp_path, on_progress=lambda *step: steps.append(step))
    assert result.value == Doubled(value=42, directory=str(tmp_path / "work"), ci="1")
    assert steps == [(1, 2, "half way")]
    log = (tmp_path / "child.log").read_text()
    assert "a library's chatter" in log
    assert "a native library's chatter" in log


def test_a_child_sends_no_telemetry_in_any_user_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    assert run(Double(value=1), tmp_path).value.ci == "1"


def test_the_childs_own_error_arrives_as_it_was_raised(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        run(Refuse(), tmp_path)
    assert (caught.value.message, caught.value.what_to_do) == ("The input is odd.", "Make it even.")


def test_a_crash_is_a_failed_stage_with_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, check=coded("child-failed", "disk on fire")) as caught:
        run(Crash(), tmp_path)
    assert "about to fail" in caught.value.what_to_do
    with pytest.raises(StageFailed, check=coded("child-without-result", "status 4")):
        run(EndSilently(), tmp_path)


def test_an_answer_of_another_type_is_a_failed_stage(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, check=coded("child-failed", "child_functions:AnswerOtherwise")):
        run(AnswerOtherwise(), tmp_path)


@pytest.mark.parametrize("target", ["os.path:join", "slmops.infra.records:Record"])
def test_a_child_performs_calls_and_nothing_else(target: str) -> None:
    with pytest.raises(TypeError, match="is not a call"):
        perform(target, {}, lambda done, total, what: None)


def calls_of_the_product() -> list[type[Call[Any]]]:
    for path in (ROOT / "infra").rglob("*.py"):
        if ("Call[" in path.read_text("utf-8")) and path.parent.name != "process":
            importlib.import_module(".".join(("slmops", *path.relative_to(ROOT).with_suffix("").parts)))
    found, pending = [], [Call]
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__.startswith("slmops.") and not inspect.isabstract(kind):
            found.append(kind)
    return found


def test_every_call_of_the_product_is_found_by_its_name_and_declares_its_answer() -> None:
    kinds = calls_of_the_product()
    assert len(kinds) >= 20
    for kind in kinds:
        module, _, name = kind.target().partition(":")
        assert getattr(importlib.import_module(module), name) is kind
        assert isinstance(kind.answer_type(), TypeAdapter)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signals")
def test_a_killed_child_is_a_fault_that_may_pass(tmp_path: Path) -> None:
    with pytest.raises(PassingFault, check=coded("child-killed")):
        run(KillItself(), tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no fcntl")
def test_a_child_that_dies_in_the_middle_of_its_answer_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(PassingFault, check=coded("child-killed")):
        run(DieWhileItAnswers(), tmp_path, deadline_s=30)


def test_a_child_whose_supervisor_dies_in_the_middle_of_a_call_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slmops.infra.process.child", "tests.infra.child_functions:Double"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    child.communicate(b'{"call": "tests', timeout=60)
    assert child.returncode == 0


def test_the_deadline_ends_the_whole_tree(tmp_path: Path) -> None:
    pids: list[int] = []
    with pytest.raises(DeadlineExceeded, check=coded("deadline-exceeded", "2 s")):
        run(
            SleepWithAGrandchild(),
            tmp_path,
            deadline_s=2,
            on_progress=lambda done, total, what: pids.extend(map(int, what.split())),
        )
    assert len(pids) == 2
    wait_until_gone(pids)


def test_an_exception_in_the_parent_ends_the_whole_tree(tmp_path: Path) -> None:
    pids: list[int] = []

    def interrupt(done: float, total: float, what: str) -> None:
        pids.extend(map(int, what.split()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SleepWithAGrandchild(), tmp_path, on_progress=interrupt)
    wait_until_gone(pids)


@pytest.mark.skipif(os.name != "posix", reason="process groups are POSIX's")
def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        from pathlib import Path
        from slmops.infra.process.supervisor import run_in_child
        from tests.infra.child_functions import SleepWithAGrandchild
        run_in_child(SleepWithAGrandchild(), deadline_s=60, log_path=Path("log"),
                     work_dir=Path("work"), environment={{"PYTHONPATH": {str(ROOT)!r}}},
                     on_progress=lambda done, total, what: print(what, flush=True))
    """)
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until_gone(pids)


def call(child: ChildProcess, tmp_path: Path, name: str, value: int, **options: Any) -> ChildResult[Counted]:
    options = {"log_path": tmp_path / f"{name}.log", "work_dir": tmp_path / name, "deadline_s": 60, **options}
    return child.run(CountCalls(value=value), **options)


def test_one_process_answers_several_calls_each_with_its_own_log_and_folder(tmp_path: Path) -> None:
    with ChildProcess() as child:
        first, second = (call(child, tmp_path, name, value) for name, value in (("first", 1), ("second", 2)))
        assert second.value.pid == first.value.pid
        assert (first.value.calls, second.value.calls) == (1, 2)
        assert second.value.directory == str(tmp_path / "second")
        assert (tmp_path / "first.log").read_text() == "called with 1\n"
        assert (tmp_path / "second.log").read_text() == "called with 2\n"
        assert psutil.pid_exists(first.value.pid)
        other = child.run(Double(value=3), log_path=tmp_path / "log", work_dir=tmp_path, deadline_s=60)
        assert other.value.value == 6
        assert call(child, tmp_path, "third", 3).value.calls == 3  # still the same process
    wait_until_gone([first.value.pid])


def test_after_a_failed_call_another_process_takes_over(tmp_path: Path) -> None:
    with ChildProcess() as child:
        first = call(child, tmp_path, "first", 1)
        with pytest.raises(StageFailed, check=coded("child-failed", "negative")):
            call(child, tmp_path, "second", -1)
        wait_until_gone([first.value.pid])
        with pytest.raises(DeadlineExceeded, check=coded("deadline-exceeded", "1 s")):
            call(child, tmp_path, "third", 0, deadline_s=1)
        assert call(child, tmp_path, "fourth", 4).value.calls == 1


def test_after_a_refusal_the_same_process_goes_on(tmp_path: Path) -> None:
    with ChildProcess() as child:
        first = call(child, tmp_path, "first", 1)
        with pytest.raises(BadInput):
            child.run(Refuse(), deadline_s=60, log_path=tmp_path / "log", work_dir=tmp_path / "refused")
        third = call(child, tmp_path, "third", 3)
        assert (third.value.pid, third.value.calls) == (first.value.pid, 2)


def test_a_process_that_was_killed_between_calls_is_started_again(tmp_path: Path) -> None:
    with ChildProcess() as child:
        pid = call(child, tmp_path, "first", 1).value.pid
        psutil.Process(pid).kill()
        wait_until_gone([pid])
        with contextlib.suppress(PassingFault):  # while its last thread still ends
            call(child, tmp_path, "second", 2)
        assert call(child, tmp_path, "third", 3).value.pid != pid


def test_memory_that_a_call_used_is_given_back(tmp_path: Path) -> None:
    size_bytes = 200_000_000
    with ChildProcess() as child:
        options: dict[str, Any] = {"deadline_s": 60, "log_path": tmp_path / "log", "work_dir": tmp_path}
        child.run(UseMemory(size_bytes=size_bytes), **options)
        assert child.run(UseMemory(size_bytes=0), **options).peak_rss_bytes < size_bytes


def test_peak_memory_is_that_of_the_child(tmp_path: Path) -> None:
    size_bytes = 200_000_000
    result = run(UseMemory(size_bytes=size_bytes), tmp_path)
    assert size_bytes < result.peak_rss_bytes < size_bytes + 200_000_000


def test_children_of_several_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    values: dict[int, int] = {}

    def work(number: int) -> None:
        values[number] = run(Double(value=number), tmp_path / str(number)).value.value

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert values == {0: 0, 1: 2, 2: 4, 3: 6}


def test_torchs_threads_sleep_while_they_wait_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert child_environment()["OMP_WAIT_POLICY"] == "passive"
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert child_environment()["OMP_WAIT_POLICY"] == "active"


def test_memory_is_kept_between_answers_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    assert int(child_environment(keeping_memory())["MALLOC_TRIM_THRESHOLD_"]) > 10**12
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert child_environment(keeping_memory())["MALLOC_TRIM_THRESHOLD_"] == "131072"
