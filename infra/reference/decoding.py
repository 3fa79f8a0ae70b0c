"""The decoding of answers that are compared: greedy, by the same rules for a checkpoint and its variants."""

from slmops.infra.records import Record, later_field
from slmops.infra.reference.thinking import Thinking


class Decoding(Record):
    """Differences from plain greedy decoding.

    `end_token_ids` end an answer; None: those that transformers takes from the checkpoint's files. A repetition penalty
    of 1 has no effect (Keskar et al. 2019, CTRL, section 4.1). `thinking` keeps an answer's thoughts apart; None: the
    model has none.
    """

    end_token_ids: tuple[int, ...] | None = None
    repetition_penalty: float = 1.0
    thinking: Thinking | None = later_field(None)


PLAIN = Decoding()
