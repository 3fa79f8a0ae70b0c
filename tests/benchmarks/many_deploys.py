"""Deploy several checkpoints one after the other from one process, as a Python program that calls the flow does.

Started by tests/benchmarks/rows_orchestration.py as `python -m tests.benchmarks.many_deploys CHECKPOINT...`, with
slmops' settings in the environment. Prints a JSON line after each deploy: its name, how it ended, its wall time in s,
and this process's resident memory then, in bytes.
"""

import json
import sys
import time

import psutil

from slmops.deployments.server.environment import prefect_api, prepare_prefect
from slmops.infra.settings import load_settings


def main() -> None:
    """Deploy each argument under its own name, only int4."""
    settings = load_settings()
    prepare_prefect(settings)
    from slmops.flows.deploy import deploy  # Prefect reads its environment when it is imported

    with prefect_api(settings):
        for number, checkpoint in enumerate(sys.argv[1:]):
            started = time.perf_counter()
            name = f"model-{number}"
            state = deploy(checkpoint, name, precisions=("int4",), return_state=True)
            if not state.is_completed() and state.name != "Rejected":  # a verdict on random weights is as good
                raise SystemExit(f"{name}: {state.message}")
            line = {
                "name": name,
                "state": state.name,
                "wall_s": time.perf_counter() - started,
                "rss_bytes": psutil.Process().memory_info().rss,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
