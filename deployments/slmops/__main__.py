"""The command `slmops`, and `python -m slmops`."""

import os
import site
import sys


def main() -> None:
    """Run the command line on what is installed: no folder of the user's stands in for a module of it."""
    _forget_the_users_folders()
    from slmops.deployments.cli.app import main as run_command_line

    run_command_line()


def _forget_the_users_folders() -> None:
    # PYTHONPATH goes before what is installed, and `python -m` puts the current directory before all: a checkpoint with
    # a queue.py would run it. Only what Python loads before this line is out of reach. pathlib might be the user's.
    named = os.environ.pop("PYTHONPATH", "").split(os.pathsep)  # children shall not have it either
    try:
        folders = {os.path.abspath(folder) for folder in ("", *named)}  # noqa: PTH100
        folders -= {*site.getsitepackages(), site.getusersitepackages()}
        sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) not in folders]  # noqa: PTH100
    except FileNotFoundError:  # the current directory is gone, and nothing can come from there
        return


if __name__ == "__main__":
    main()
