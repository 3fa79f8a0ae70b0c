"""What a command does beside its check of the request, before its run begins."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.checkpoints import make_tiny_checkpoint

PROGRAM = """
import gc, sys, time
from slmops.deployments.cli.app import run
from slmops.infra.errors import BadInput

def plan_deploy(settings, parameters):
    deadline = time.monotonic() + 120
    while getattr(sys.modules.get("slmops.flows.deploy"), "deploy", None) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    print("imported:", "slmops.flows.deploy" in sys.modules, "collecting:", gc.isenabled())
    raise BadInput("No.", "Nothing.")

import slmops.deployments.server.environment as environment
environment.prepare_prefect(__import__("slmops.infra.settings").infra.settings.load_settings())
import slmops.tasks.plan
slmops.tasks.plan.plan_deploy = plan_deploy
print("status:", run(["deploy", sys.argv[1], "--name", "home"]))
print("collecting:", gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_the_flow_is_imported_while_the_request_is_checked_and_no_garbage_is_collected(tmp_path: Path) -> None:
    checkpoint = make_tiny_checkpoint(tmp_path / "checkpoint")
    environment = {**os.environ, "SLMOPS_HOME": str(tmp_path / "home"), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-c", PROGRAM, str(checkpoint)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if ": " in line]
    assert lines == ["imported: True collecting: False", "status: 2", "collecting: True True"], done.stderr
