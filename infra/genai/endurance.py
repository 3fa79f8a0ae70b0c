"""Soak test and edge inputs in onnxruntime-genai."""

import json

import numpy as np

from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.process import endurance
from slmops.infra.process.call import Progress


def endure(call: endurance.Endure, progress: Progress) -> None:
    """Open a model folder once, then run the soak and the edge inputs; see `slmops.infra.process.endurance.endure`.

    Raises `StageFailed` for a model that cannot be opened.
    """
    progress(0, 1, "loading the model")
    opened = GenaiModel(call.model_dir, threads=call.threads)
    endurance.endure(_Opened(opened), call, progress)


class _Opened:
    """The runtime as other programs use it, without the checks of `GenaiModel` before a request."""

    def __init__(self, model: GenaiModel) -> None:
        self._model = model
        self.context_length = model.context_length

    def count_prompt_tokens(self, messages: endurance.Messages) -> int:
        return len(self._prompt_ids(messages))

    def answer(self, messages: endurance.Messages, max_new_tokens: int) -> str:
        prompt_ids = self._prompt_ids(messages)
        max_length = len(prompt_ids) + max_new_tokens
        if len(prompt_ids) < self.context_length:
            max_length = min(max_length, self.context_length)
        generator = self._model.start(max_length)  # refuses a longer prompt before it allocates memory
        generator.append_tokens(np.asarray(prompt_ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        answer_ids = [int(token) for token in generator.get_sequence(0)[len(prompt_ids) :]]
        return self._model.decode(self._model.without_end(answer_ids))

    def takes_for_control_token(self, text: str, token_id: int) -> bool:
        plain, typed = (
            self._prompt_ids([{"role": "user", "content": content}]).count(token_id) for content in ("a", f"a{text}")
        )
        return typed > plain

    def _prompt_ids(self, messages: endurance.Messages) -> list[int]:
        tokenizer = self._model.tokenizer
        prompt = tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        return [int(token) for token in tokenizer.encode(prompt)]
