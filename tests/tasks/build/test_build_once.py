"""What several processes ask for at once is made once."""

import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from slmops.infra.process.slots import only_maker
from slmops.infra.settings import MachineSettings, Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.build.build import BuiltVariant, build_variant
from slmops.tasks.build.recipes import load_recipe
from slmops.tasks.checkpoint.inspection import content_digest, inspect_checkpoint
from slmops.tasks.checkpoint.preparation import PreparedCheckpoint
from slmops.tasks.plan import parse_request
from slmops.tasks.runs.progress import listening
from slmops.tasks.workshop import Workshop, torch_process, working_in
from tests.support.checkpoints import make_tiny_checkpoint

pytestmark = pytest.mark.runtime

DEADLINE_S = 240  # a hang, not a slow machine, fails here


def build(home: Path, folder: Path, builds: int) -> tuple[list[str], BuiltVariant]:
    settings = Settings(home=home, machine=MachineSettings(threads=1), worker={"builds": builds})
    prepared = PreparedCheckpoint(
        uri=folder.as_uri(), origin=str(folder), digest=content_digest(folder), inspection=inspect_checkpoint(folder)
    )
    request = parse_request({"checkpoint": str(folder), "name": "home", "precisions": ["int8"]})
    steps: list[str] = []
    with (
        listening(lambda stage, share, what: steps.append(what)),
        torch_process(settings) as child,
        working_in(Workshop(settings, open_registry(settings), child)),
    ):
        built = build_variant.fn(load_recipe("int8"), prepared, request)
    return steps, built


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 2])
def test_two_deploys_of_one_checkpoint_at_once_build_once(tmp_path: Path, slots: int) -> None:
    folder = make_tiny_checkpoint(tmp_path / "checkpoint")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        runs = [pool.submit(build, tmp_path / "home", folder, slots) for _ in range(2)]
        (first, one), (second, two) = (run.result(300) for run in runs)
    assert sorted("built before" in steps for steps in (first, second)) == [False, True]
    assert one == two


def test_a_maker_waits_for_another_one_and_finds_what_it_made(tmp_path: Path) -> None:
    target, told = tmp_path / "cache" / "made", []
    begun, awaited = threading.Event(), threading.Event()

    def make() -> None:
        with only_maker(target):
            begun.set()
            awaited.wait(DEADLINE_S)
            target.write_text("once")

    maker = threading.Thread(target=make)
    maker.start()
    assert begun.wait(DEADLINE_S)

    def tell(done: float, total: float, what: str) -> None:
        told.append(what)
        awaited.set()

    with only_maker(target, tell):
        assert target.read_text() == "once"
    maker.join(DEADLINE_S)
    assert set(told) == {"waiting for another run that makes the same file"}
