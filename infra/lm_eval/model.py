"""A genai model folder behind lm-eval's interface: log-likelihoods and greedy generation."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.genai.text import COPIES_OF_A_CHUNK, begin_tokens_of
from slmops.infra.process.call import Progress
from slmops.infra.reference.distributions import log_probability
from slmops.infra.reference.text import LOGITS_CHUNK_BYTES

MAX_NEW_TOKENS = 256  # lm-eval's own default

# ((context, continuation) or None, ids of the context, ids of the continuation)
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class GenaiLM(TemplateLM):  # type: ignore[misc]
    """lm-eval's interface over onnxruntime-genai, by the conventions of lm-eval's own `HFLM`.

    The runtime's own tokenizer tokenizes texts. The tokens that the checkpoint's tokenizer adds before a text are
    added, unless the text already begins with them. The prefix of a text without context is the tokenizer's begin
    token, else its end token. A request longer than the context is truncated on the left; `notes` says so.
    """

    def __init__(self, model: GenaiModel, progress: Progress) -> None:
        super().__init__()
        self.notes: set[str] = set()
        self._model = model
        self._progress = progress
        self._begin = begin_tokens_of(model.model_dir)
        tokens = _special_tokens(model)
        self._eot_token_id = self._id_of(tokens["eos_token"], "eos_token_id")
        self._prefix_token_id = self._id_of(tokens["bos_token"], None) if tokens["bos_token"] else self._eot_token_id
        self._begin_text = tokens["bos_token"] or tokens["eos_token"]
        self._end_text = tokens["eos_token"]

    def _id_of(self, token: str | None, config_key: str | None) -> int:
        if token is not None:
            return int(self._model.tokenizer.to_token_id(token))
        value = self._model.config["model"].get(config_key)
        found = value[0] if isinstance(value, list) and value else value
        if not isinstance(found, int):
            raise StageFailed(
                f"The model in {self._model.model_dir} names no end token.",
                "Give its tokenizer an eos_token.",
                code="model-without-end-token",
            )
        return found

    @property
    def eot_token_id(self) -> int:
        """Token id of the end of a text."""
        return self._eot_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token id that a text without context is predicted from."""
        return self._prefix_token_id

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self._model.context_length

    @property
    def tokenizer_name(self) -> str:
        """Fingerprint of the tokenizer for lm-eval's request cache, which slmops does not use."""
        return str(self._model.model_dir)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text; special tokens (None: the tokenizer's default) only if the text has none itself."""
        ids = [int(token) for token in self._model.tokenizer.encode(string)]
        if add_special_tokens is None:
            add_special_tokens = not (self._begin_text and string.startswith(self._begin_text))
        return [*self._begin, *ids] if add_special_tokens else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; without `add_generation_prompt` its last message is the beginning of the answer."""
        if add_generation_prompt:
            return self._model.render(chat_history)[0]
        return self._model.render(chat_history[:-1])[0] + chat_history[-1]["content"]

    def _loglikelihood_tokens(self, requests: list[TokenRequest], **_: object) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether greedy decoding gives it.

        Requests with the same fed tokens, such as the one-token answers to one question, share one pass.
        """
        answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
        fed = [self._fed(context, continuation) for _, context, continuation in requests]
        done = 0
        order = sorted(range(len(requests)), key=lambda index: fed[index])
        for tokens, group in itertools.groupby(order, key=lambda index: fed[index]):
            indices = list(group)
            self._progress(done, len(requests), "log-likelihoods")
            longest = max(len(requests[index][2]) for index in indices)
            rows = self._scores(tokens, [requests[index][2] for index in indices], longest)
            for index, answer in zip(indices, rows, strict=True):
                answers[index] = answer
            done += len(indices)
        return answers

    def _fed(self, context: list[int], continuation: list[int]) -> list[int]:
        if not context or not continuation or len(continuation) > self.max_length:
            raise BadInput(
                f"A task requests the likelihood of {len(continuation)} tokens after {len(context)}; the model takes "
                f"1 to {self.max_length} after at least 1.",
                "Choose a task with shorter answers, or a model with a longer context.",
                code="lm-eval-too-long",
            )
        tokens = [*context, *continuation][:-1]
        if len(tokens) > self.max_length:
            self.notes.add(
                f"Some requests were longer than the context of {self.max_length} tokens and were cut at the beginning."
            )
        return tokens[-self.max_length :]

    def _scores(self, tokens: list[int], continuations: list[list[int]], longest: int) -> list[tuple[float, bool]]:
        """Score continuations at the end of the same fed `tokens`; a shorter one starts later."""
        positions = range(len(tokens) - longest, len(tokens))
        chunk_bytes = LOGITS_CHUNK_BYTES // COPIES_OF_A_CHUNK
        totals = [0.0] * len(continuations)
        greedy = [True] * len(continuations)
        for position, logits in zip(positions, self._model.logits_at(tokens, positions, chunk_bytes), strict=True):
            if not np.isfinite(logits).all():
                raise StageFailed(
                    f"The model in {self._model.model_dir} gives logits that are not finite.",
                    "Its weights hold NaN or infinity, or overflow in their precision: choose another precision.",
                    code="logits-not-finite",
                )
            best = int(logits.argmax())
            for line, continuation in enumerate(continuations):
                index = position - (len(tokens) - len(continuation))
                if index >= 0:
                    totals[line] += log_probability(logits, continuation[index])
                    greedy[line] &= best == continuation[index]
        return list(zip(totals, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood (nats) of whole texts, in windows of the model's context."""
        totals = []
        for done, (text,) in enumerate(request.args for request in requests):
            self._progress(done, len(requests), "rolling log-likelihoods")
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scores = [
                self._scores(self._fed(*pair), [pair[1]], len(pair[1])) for pair in map(make_disjoint_window, windows)
            ]
            totals.append(math.fsum(score for ((score, _),) in scores))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to its first stop sequence."""
        answers = []
        for done, (context, asked) in enumerate(request.args for request in requests):
            self._progress(done, len(requests), "answers")
            options = normalize_gen_kwargs(asked, MAX_NEW_TOKENS)
            until = handle_stop_sequences(options["until"], eos=self._end_text)
            new_tokens = options["max_gen_toks"]
            if new_tokens >= self.max_length:
                raise BadInput(
                    f"A task requests answers of {new_tokens} tokens, and the model's context is {self.max_length}.",
                    "Set a smaller max_gen_toks in the task, or choose a model with a longer context.",
                    code="lm-eval-answer-too-long",
                )
            ids = self.tok_encode(context)
            if len(ids) > self.max_length - new_tokens:
                self.notes.add(f"Some prompts did not fit with {new_tokens} new tokens and were cut at the beginning.")
                ids = ids[-(self.max_length - new_tokens) :]
            answers.append(postprocess_generated_text(self._generate(ids, new_tokens, until), until, None))
        return answers

    def _generate(self, ids: Sequence[int], new_tokens: int, until: Sequence[str]) -> str:
        stops = [stop for stop in until if stop]
        encoded = [self.tok_encode(stop, add_special_tokens=False) for stop in stops]
        ends = self._model.end_token_ids | {tokens[0] for tokens in encoded if len(tokens) == 1}
        text = ""
        try:
            stream = self._model.tokenizer.create_stream()
            generator = self._model.start(len(ids) + new_tokens)
            generator.append_tokens(np.asarray(ids, np.int32))
            while not generator.is_done():
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                if token in ends:
                    break
                text += stream.decode(token)
                if any(stop in text for stop in stops):
                    break
        except Exception as error:
            raise self._model.broken(error) from error
        return text


def _special_tokens(model: GenaiModel) -> dict[str, str | None]:
    """The begin and end token in the tokenizer's own configuration, or None."""
    path = model.model_dir / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StageFailed(
            f"{path} cannot be read: {error}.", "Build the model again.", code="file-unreadable"
        ) from error
    found = {name: config.get(name) for name in ("bos_token", "eos_token")}
    return {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
