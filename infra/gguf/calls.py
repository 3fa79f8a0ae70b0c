"""The call of a child process that converts a GGUF file."""

from slmops.infra.process.call import Call, Progress
from slmops.infra.records import AbsolutePath


class ConvertGguf(Call[None]):
    """Write the checkpoint of a GGUF file, in the Hub's layout, into `output_dir`, which must not exist."""

    file: AbsolutePath
    output_dir: AbsolutePath

    def perform(self, progress: Progress) -> None:
        """See `slmops.infra.gguf.conversion.convert`."""
        from slmops.infra.gguf.conversion import convert

        convert(self.file, self.output_dir, progress)
