"""onnxruntime-genai, the serving runtime: an opened model folder, its answers and its logits."""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import StageFailed, reason_of
from slmops.infra.genai.calls import Generate, Generated
from slmops.infra.genai.logits_graph import give_all_positions
from slmops.infra.process.call import Progress
from slmops.infra.records import Json, Untyped
from slmops.infra.reference.answers import Message
from slmops.infra.reference.text import LOGITS_CHUNK_BYTES
from slmops.infra.reference.thinking import TokenCounter

# Neutral values that override the search options of a folder's genai_config.json: pure greedy decoding. The seed
# decides nothing, but without one the runtime draws 624 numbers of the processor's random generator, 8 ms an answer.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "min_length": 0,
    "chunk_size": 0,
    "random_seed": 0,
}

# A lead of four units in the last place of fp16: so far may two passes over the same tokens differ that sum otherwise.
CERTAIN_LEAD = 2.0**-8


@dataclass(frozen=True)
class Confirmed:
    """The beginning of an expected answer that a model would generate; `ended`: the answer's end token follows it."""

    token_ids: tuple[int, ...] = ()
    ended: bool = False


NOTHING = Confirmed()


def threading_options(threads: int, *, spin: bool) -> Json:
    """Return the options of genai_config.json's `session_options` that limit the threads and say how they wait."""
    return {"intra_op_num_threads": threads} | ({} if spin else {"session.intra_op.allow_spinning": "0"})


def open_model(model_dir: Path, threads: int, *, spin: bool = False, all_positions: bool = False) -> Untyped:
    """Return the runtime's model of a folder; see `GenaiModel` for the options. Raises the runtime's own errors."""
    import onnxruntime_genai as og

    config = og.Config(str(model_dir))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": threading_options(threads, spin=spin)}}}))
    # The runtime only refers to the graph, so the name keeps it until the model is open.
    graph = give_all_positions(config, model_dir) if all_positions else None
    model = og.Model(config)
    del graph
    return model


def render_chat(
    tokenizer: Untyped, messages: Sequence[Message], tools: Sequence[Json] = (), template: str | None = None
) -> str:
    """Return the prompt that the runtime's tokenizer renders from a chat and the tools that it offers.

    It renders its own chat template, or the given one.
    """
    given = {"tools": json.dumps(tools)} if tools else {}
    given |= {"template_str": template} if template else {}
    text: str = tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True, **given)
    return text


class GenaiModel:
    """A model folder opened for greedy decoding; the folder is only read.

    It runs on the provider that its genai_config.json names. Threads that wait `spin` where a speed is measured, as the
    runtime lets them by default: on a busy machine, each step then takes several times as long. `all_positions` is for
    distributions: a model that was built to give the last position's logits gives all of them, where its graph allows
    it, and takes the time and memory for them in each prompt. Raises `StageFailed` for a folder that the runtime cannot
    open.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        threads: int,
        repetition_penalty: float = 1.0,
        spin: bool = False,
        all_positions: bool = False,
    ) -> None:
        import onnxruntime_genai as og

        self._og = og
        self._whole: Untyped = None
        self.model_dir = model_dir
        self._search = {**GREEDY, "repetition_penalty": repetition_penalty}
        self.config = _read_genai_config(model_dir)
        settings: dict[str, Any] = self.config["model"]
        self.context_length = int(settings["context_length"])
        ends = settings.get("eos_token_id", [])
        self.end_token_ids = set(ends) if isinstance(ends, list) else {ends}
        try:
            self._model = open_model(model_dir, threads, spin=spin, all_positions=all_positions)
            self.tokenizer = og.Tokenizer(self._model)
        except Exception as error:  # the binding raises RuntimeError and, for some faults, bare exceptions
            raise StageFailed(
                f"onnxruntime-genai cannot open the model in {model_dir}: {reason_of(error)}.",
                "Build it again; if it was built elsewhere, build it with this version of onnxruntime-genai.",
                code="model-does-not-open",
            ) from error

    def render(
        self, messages: Sequence[Message], tools: Sequence[Json] = (), template_prefix: str = ""
    ) -> tuple[str, list[int]]:
        """Return the prompt that the runtime renders from a chat and the tools that it offers, and its token ids.

        `template_prefix` is Jinja that stands before the model's template.
        """
        try:
            template = f"{template_prefix}{read_chat_template(self.model_dir)}" if template_prefix else None
            text = render_chat(self.tokenizer, messages, tools, template)
            return text, [int(token) for token in self.tokenizer.encode(text)]
        except Exception as error:
            raise StageFailed(
                f"onnxruntime-genai cannot render a chat with the model's template: {reason_of(error)}.",
                "Give a chat template that the runtime can render (deploy --chat-template FILE).",
                code="chat-template-does-not-render",
            ) from error

    def start(self, max_length: int, min_length: int = 0, guidance: tuple[str, str] | None = None) -> Any:
        """Return a greedy generator for up to `max_length` tokens, prompt included.

        `guidance` is a kind of grammar and its text, which the answer follows.
        """
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(**{**self._search, "min_length": min_length, "max_length": max_length})
        if guidance:
            params.set_guidance(*guidance)
        return self._og.Generator(self._model, params)

    def room_after(self, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
        """`max_new_tokens`, or fewer if the model's context ends earlier; `StageFailed` without any room."""
        room = min(max_new_tokens, self.context_length - len(prompt_ids))
        if room < 1:
            raise StageFailed(
                f"A prompt of {len(prompt_ids)} tokens leaves no room in the model's context of {self.context_length}.",
                "Shorten the prompt.",
                code="prompt-too-long",
            )
        return room

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Token ids of the greedy answer, without an end token."""
        return self.answer_and_end(prompt_ids, max_new_tokens)[0]

    def answer_and_end(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        counter: TokenCounter | None = None,
        confirmed: Confirmed = NOTHING,
    ) -> tuple[list[int], bool]:
        """Token ids of the greedy answer, without an end token, and whether one was reached.

        `counter` may end it earlier than `max_new_tokens` do. What is `confirmed` is not generated.
        """
        room, full = self.room_after(prompt_ids, max_new_tokens), False
        begun = [*confirmed.token_ids[:room]]
        for length, token in enumerate(begun, 1):
            if counter is not None and counter.add(token):
                return begun[:length], False
        if confirmed.ended or len(begun) == room:
            return begun, len(begun) < room
        try:
            generator = self.start(len(prompt_ids) + room)
            generator.append_tokens(np.asarray([*prompt_ids, *begun], np.int32))
            while not (full or generator.is_done()):
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                full = counter is not None and token not in self.end_token_ids and counter.add(token)
            answer = self.without_end([int(token) for token in generator.get_sequence(0)[len(prompt_ids) :]])
            return answer, not full and len(answer) < room
        except Exception as error:
            raise self.broken(error) from error

    def follow(
        self,
        prompt_ids: Sequence[int],
        expected_ids: Sequence[int],
        positions: Sequence[int] = (),
        on_logits: Callable[[int, NDArray[np.float32]], None] | None = None,
        chunk_bytes: int = LOGITS_CHUNK_BYTES,
    ) -> Confirmed:
        """Return the beginning of an expected answer that the model would generate, up to a near tie.

        It is found in one pass over all tokens, which may round otherwise than a pass over each: where that could
        decide between two tokens, the model must generate. Empty for a model that gives only the last logits or whose
        choices do not follow from the logits alone. `on_logits` gets the logits after each of `positions`, ascending
        indices into all tokens but the last, in the same pass.
        """
        token_ids, draft = [*prompt_ids, *expected_ids], self.without_end(expected_ids)
        confirms = not self.gives_last_position_only and self._search["repetition_penalty"] == 1
        last = len(prompt_ids) - 1
        answered = range(last, last + min(len(draft) + 1, len(expected_ids))) if confirms else range(0)
        asked, wanted = sorted({*answered, *positions}), frozenset(positions)
        certain = 0
        for position, logits in zip(asked, self.logits_at(token_ids, asked, chunk_bytes), strict=True):
            if on_logits and position in wanted:
                on_logits(position, logits)
            if position == last + certain and position in answered:
                certain += _is_certain(token_ids[position + 1], logits)
        return Confirmed(tuple(draft[:certain]), ended=certain > len(draft))

    def without_end(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens of an answer before its end token."""
        return list(itertools.takewhile(lambda token: token not in self.end_token_ids, token_ids))

    def decode_all(self, answer_ids: Sequence[int]) -> str:
        """Text of an answer with its control tokens, which the runtime's own decoder leaves out."""
        from tokenizers import Tokenizer

        self._whole = self._whole or Tokenizer.from_file(str(self.model_dir / "tokenizer.json"))
        text: str = self._whole.decode(list(answer_ids), skip_special_tokens=False)
        return text

    def decode(self, answer_ids: Sequence[int]) -> str:
        """Text of an answer, without control tokens, decoded as it is streamed to a client.

        Tokens whose bytes are not UTF-8 are dropped, as in serving.
        """
        stream = self.tokenizer.create_stream()
        return "".join(stream.decode(token) for token in answer_ids)

    def logits_at(
        self, token_ids: Sequence[int], positions: Sequence[int], chunk_bytes: int = LOGITS_CHUNK_BYTES
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the logits after each of `positions` (ascending indices into `token_ids`), teacher-forced.

        The tokens are fed in chunks, so that one chunk's logits stay under `chunk_bytes`. A model that was built
        to give only the last position's logits is fed up to one position at a time.
        """
        if not positions:
            return
        end = positions[-1] + 1
        if self.gives_last_position_only:
            cuts = [position + 1 for position in positions]
        else:
            chunk_tokens = max(1, chunk_bytes // (4 * self.vocabulary_size))
            cuts = [*range(chunk_tokens, end, chunk_tokens), end]
        try:
            generator = self.start(end)
            start = 0
            for cut in cuts:
                generator.append_tokens(np.asarray(token_ids[start:cut], np.int32))
                inside = [position for position in positions if start <= position < cut]
                if inside:
                    logits = np.asarray(generator.get_output("logits"))
                    lines = [position - cut for position in inside]  # counted from the chunk's end
                    yield from logits[0, lines].astype(np.float32)
                start = cut
        except Exception as error:
            raise self.broken(error) from error

    @property
    def vocabulary_size(self) -> int:
        """Length of a position's logits, padding included."""
        return self._logits_shape[-1]

    @property
    def gives_last_position_only(self) -> bool:
        """Whether the opened model gives only the logits of the last position."""
        return self._logits_shape[1] == 1

    @property
    def declared_vocabulary_size(self) -> int | None:
        """Length of a position's logits according to the folder, for a model that cannot be run; None if unknown.

        It is the smaller value of genai_config.json and the decoder's ONNX file.
        """
        import onnx

        sizes = [self.config["model"].get("vocab_size")]
        try:
            path = self.model_dir / self.config["model"]["decoder"]["filename"]
            outputs = onnx.load(path, load_external_data=False).graph.output
            sizes += [output.type.tensor_type.shape.dim[-1].dim_value for output in outputs if output.name == "logits"]
        except Exception as error:  # a damaged folder makes protobuf and the file system raise various errors
            raise self.broken(error) from error
        return min((size for size in sizes if size), default=None)

    @cached_property
    def _logits_shape(self) -> tuple[int, ...]:
        try:
            probe = self.start(2)
            probe.append_tokens(np.zeros(2, np.int32))
            return tuple(probe.get_output("logits").shape)
        except Exception as error:
            raise self.broken(error) from error

    def broken(self, error: Exception) -> StageFailed:
        """The error to raise when the runtime fails during a request."""
        return StageFailed(
            f"onnxruntime-genai opened the model in {self.model_dir} but could not run it: {reason_of(error)}.",
            "Build it again, or with another recipe; the stage's log has the whole message.",
            code="model-does-not-run",
        )


def _is_certain(token: int, logits: NDArray[np.float32]) -> bool:
    """Whether a token has the highest logit, with a lead of more than `CERTAIN_LEAD` times that."""
    first = logits[token]
    within = np.count_nonzero(first - logits <= CERTAIN_LEAD * max(1.0, abs(first)))
    return bool(within == 1 and not np.isnan(logits).any())


def _read_genai_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "genai_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        missing = {"context_length", "decoder"} - set(config["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageFailed(
            f"{path} is not a readable genai configuration: {reason_of(error)}.",
            "Build the model again.",
            code="genai-config-not-valid",
        ) from error
    if missing:
        raise StageFailed(
            f"{path} lacks model.{', model.'.join(sorted(missing))}.",
            "Build the model again.",
            code="genai-config-not-valid",
        )
    return config


def generate(call: Generate, progress: Progress) -> Generated:
    """Answer one chat greedily.

    Raises `StageFailed` for a model that cannot be run or whose logits are not finite.
    """
    progress(0, 1, "loading the model")
    model = GenaiModel(call.model_dir, threads=call.threads, repetition_penalty=call.repetition_penalty)
    prompt, prompt_ids = model.render(call.messages)
    (logits,) = model.logits_at(prompt_ids, [len(prompt_ids) - 1])
    if not np.isfinite(logits).all():
        raise StageFailed(
            f"The model in {model.model_dir} gives logits that are not finite.",
            "Its weights have NaN or infinity, or overflow in their precision: choose another precision.",
            code="logits-not-finite",
        )
    answer_ids, ended = model.answer_and_end(prompt_ids, call.max_new_tokens)
    return Generated(
        answer=model.decode(answer_ids),
        prompt=prompt,
        prompt_tokens=len(prompt_ids),
        new_tokens=len(answer_ids),
        finish="stop" if ended else "length",
    )


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute the answers."""
    return {package: version(package) for package in ("onnxruntime", "onnxruntime-genai", "numpy")}
