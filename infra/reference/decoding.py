"""The decoding of answers that are compared: greedy, by the same rules for a checkpoint and its variants."""

from slmops.infra.records import Record


class Decoding(Record):
    """Differences from plain greedy decoding.

    `end_token_ids` end an answer; None: those that transformers takes from the checkpoint's files. A repetition penalty
    of 1 has no effect (Keskar et al. 2019, CTRL, section 4.1).
    """

    end_token_ids: tuple[int, ...] | None = None
    repetition_penalty: float = 1.0


PLAIN = Decoding()
