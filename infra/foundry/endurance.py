"""Soak test and edge inputs in Foundry Local."""

from typing import Any

from slmops.infra.foundry import runtime
from slmops.infra.process import endurance
from slmops.infra.process.call import Progress

REPEATS = 9


def endure(call: endurance.Endure, progress: Progress) -> None:
    """Load an unregistered model folder, then run the soak and the edge inputs.

    See `slmops.infra.process.endurance.endure`. Raises `StageFailed` for a model that does not load.
    """
    progress(0, 1, "loading the model")
    model = runtime.open_folder(call.model_dir, call.cache_dir)
    endurance.endure(_Opened(model), call, progress)


class _Opened:
    """The runtime as other programs use it, without the checks of `slmops.infra.foundry.runtime.answer`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.context_length = int(model.info.context_length)

    def count_prompt_tokens(self, messages: endurance.Messages) -> int:
        return runtime.count_prompt_tokens(self._model, messages)

    def answer(self, messages: endurance.Messages, max_new_tokens: int) -> str:
        return runtime.answer_unchecked(self._model, messages, max_new_tokens)

    def takes_for_control_token(self, text: str, token_id: int) -> bool:
        # Foundry returns only the number of tokens, not their ids. As ordinary text, a control token's text is several
        # tokens, because a vocabulary has it only once. So one more token per repetition means the control token.
        once, repeated = (
            self.count_prompt_tokens([{"role": "user", "content": "a" + text * times}]) for times in (1, REPEATS)
        )
        return repeated - once == REPEATS - 1
