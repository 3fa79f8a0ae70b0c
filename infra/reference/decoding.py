"""How answers are decoded where a checkpoint and its variants are compared: greedily, by the same rules."""

from slmops.infra.records import Record


class Decoding(Record):
    """What differs from plain greedy decoding.

    `end_token_ids` end an answer; None: those that transformers takes from the checkpoint's files. A repetition
    penalty of 1 is none (Keskar et al. 2019, CTRL, section 4.1).
    """

    end_token_ids: tuple[int, ...] | None = None
    repetition_penalty: float = 1.0


PLAIN = Decoding()
