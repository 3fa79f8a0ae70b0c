"""`python -m slmops`: the command line."""

import sys
from pathlib import Path

# Python puts the current directory first for -m, and a folder of the user's would stand in for modules.
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", str(Path.cwd())):
    del sys.path[0]

from slmops.deployments.cli.app import main

if __name__ == "__main__":
    main()
