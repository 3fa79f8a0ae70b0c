"""The command `slmops`, and `python -m slmops`."""

import os
import site
import sys


def main() -> None:
    """Run the command line with installed modules only: no folder of the user can replace a module."""
    _forget_the_users_folders()
    from slmops.deployments.cli.app import main as run_command_line

    run_command_line()


def _forget_the_users_folders() -> None:
    # PYTHONPATH precedes installed packages, and `python -m` puts the current directory first: a queue.py in a
    # checkpoint would run. Only modules that Python loads before this line cannot be protected. Even pathlib could be
    # the user's.
    named = os.environ.pop("PYTHONPATH", "").split(os.pathsep)  # child processes must not have it either
    try:
        folders = {os.path.abspath(folder) for folder in ("", *named)}  # noqa: PTH100
        folders -= {*site.getsitepackages(), site.getusersitepackages()}
        sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) not in folders]  # noqa: PTH100
    except FileNotFoundError:  # the current directory was deleted, so nothing can be imported from it
        return


if __name__ == "__main__":
    main()
