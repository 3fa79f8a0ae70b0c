"""Whole texts that are recorded beside their tests, each in a file of its own kind that a person can read.

After a wanted change: `pytest TEST --snapshot-update` records them anew, and the diff shows what a user will see.
"""

from syrupy.extensions.json import JSONSnapshotExtension
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode


class PlainText(SingleFileSnapshotExtension):
    """What a command prints."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


class Markdown(PlainText):
    """A report, or a model card."""

    file_extension = "md"


class JsonDocument(JSONSnapshotExtension):
    """What a command prints with `--json`."""
