"""onnxruntime-genai, the runtime that serves: a model folder's answers and distributions."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.infra.errors import StageFailed
from slmops.infra.genai.distributions import PositionComparison, are_comparable, compare_position
from slmops.infra.process.call import Progress
from slmops.infra.transformers.reference import LOGITS_FILE, REFERENCE_FILE, choose_positions, matches, share_of

# Bound on one chunk's float32 logits: 220 positions of a vocabulary of 152 k.
LOGITS_CHUNK_BYTES = 128 * 2**20

# Neutral values for whatever a folder's genai_config.json says about search: pure greedy decoding.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "min_length": 0,
    "chunk_size": 0,
}


class GenaiModel:
    """A model folder opened for greedy decoding; the folder is only read.

    `execution_provider` names the provider to run on ("cpu", "cuda", ...), or is None for what the folder's
    genai_config.json says. Raises `StageFailed` for a folder that the runtime cannot open.
    """

    def __init__(
        self, model_dir: Path, *, threads: int, execution_provider: str | None, repetition_penalty: float = 1.0
    ) -> None:
        import onnxruntime_genai as og

        self._og = og
        self.model_dir = model_dir
        self._search = {**GREEDY, "repetition_penalty": repetition_penalty}
        self.config = _read_genai_config(model_dir)
        settings: dict[str, Any] = self.config["model"]
        self.context_length = int(settings["context_length"])
        ends = settings.get("eos_token_id", [])
        self.end_token_ids = set(ends) if isinstance(ends, list) else {ends}
        try:
            config = og.Config(str(model_dir))
            threading_options = {"session_options": {"intra_op_num_threads": threads}}
            config.overlay(json.dumps({"model": {"decoder": threading_options}}))
            if execution_provider is not None:
                _choose_provider(config, execution_provider)
            self._model = og.Model(config)
            self.tokenizer = og.Tokenizer(self._model)
        except Exception as error:  # the binding raises RuntimeError and, for some faults, bare exceptions
            raise StageFailed(
                f"onnxruntime-genai cannot open the model in {model_dir}: {_reason(error)}.",
                "Build it again; if it was built elsewhere, make it with this version of onnxruntime-genai.",
            ) from error

    def render(self, messages: Sequence[dict[str, str]]) -> tuple[str, list[int]]:
        """Return the prompt that the runtime makes of a chat, and its token ids."""
        try:
            text = self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
            return text, [int(token) for token in self.tokenizer.encode(text)]
        except Exception as error:
            raise StageFailed(
                f"onnxruntime-genai cannot render a chat with the model's template: {_reason(error)}.",
                "Give a chat template that the runtime can render (deploy --chat-template FILE).",
            ) from error

    def start(self, max_length: int, min_length: int = 0) -> Any:
        """Return a greedy generator for up to `max_length` tokens, prompt included."""
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(**{**self._search, "min_length": min_length, "max_length": max_length})
        return self._og.Generator(self._model, params)

    def room_after(self, prompt_ids: Sequence[int], max_new_tokens: int) -> int:
        """`max_new_tokens`, or fewer where the model's context ends earlier; `StageFailed` without any room."""
        room = min(max_new_tokens, self.context_length - len(prompt_ids))
        if room < 1:
            raise StageFailed(
                f"A prompt of {len(prompt_ids)} tokens leaves no room in the model's context of {self.context_length}.",
                "Shorten the prompt.",
            )
        return room

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Token ids of the greedy answer, without an end token: fewer than allowed means that one was reached."""
        try:
            generator = self.start(len(prompt_ids) + self.room_after(prompt_ids, max_new_tokens))
            generator.append_tokens(np.asarray(prompt_ids, np.int32))
            while not generator.is_done():
                generator.generate_next_token()
            return self.without_end([int(token) for token in generator.get_sequence(0)[len(prompt_ids) :]])
        except StageFailed:
            raise
        except Exception as error:
            raise self.broken(error) from error

    def without_end(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens of an answer before its end token."""
        return list(itertools.takewhile(lambda token: token not in self.end_token_ids, token_ids))

    def decode(self, answer_ids: Sequence[int]) -> str:
        """Text of an answer, without control tokens, decoded as it is streamed to a client.

        Tokens whose bytes are not UTF-8 are lost, as they are in serving.
        """
        stream = self.tokenizer.create_stream()
        return "".join(stream.decode(token) for token in answer_ids)

    def decode_whole(self, answer_ids: Sequence[int]) -> str:
        """Like `decode`, but in one piece: the text ends at the first bytes that are not UTF-8."""
        return str(self.tokenizer.decode(np.asarray(answer_ids, np.int32))) if answer_ids else ""

    def logits_at(
        self, token_ids: Sequence[int], positions: Sequence[int], chunk_bytes: int = LOGITS_CHUNK_BYTES
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the logits after each of `positions` (ascending indices into `token_ids`), teacher-forced.

        The tokens are fed in chunks, so that one chunk's logits stay under `chunk_bytes`. A model that was built
        to give only the last position's logits is fed up to one position at a time.
        """
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
        """Whether the model was built to give the logits of the last position alone."""
        return self._logits_shape[1] == 1

    @property
    def declared_vocabulary_size(self) -> int | None:
        """Length of a position's logits as the folder declares it, for a model that cannot be run; None if it does not.

        It is the smaller of what genai_config.json says and what the decoder's ONNX file says.
        """
        import onnx

        sizes = [self.config["model"].get("vocab_size")]
        try:
            path = self.model_dir / self.config["model"]["decoder"]["filename"]
            outputs = onnx.load(path, load_external_data=False).graph.output
            sizes += [one.type.tensor_type.shape.dim[-1].dim_value for one in outputs if one.name == "logits"]
        except Exception as error:  # protobuf's and the file system's, whatever a damaged folder makes them raise
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
        """The error to raise when the runtime fails in the middle of its work."""
        return StageFailed(
            f"onnxruntime-genai opened the model in {self.model_dir} and could not run it: {_reason(error)}.",
            "Build it again, or with another recipe; the stage's log has the whole message.",
        )


def _read_genai_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "genai_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        missing = {"context_length", "decoder"} - set(config["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StageFailed(
            f"{path} is not a readable genai configuration: {_reason(error)}.", "Build the model again."
        ) from error
    if missing:
        raise StageFailed(f"{path} lacks model.{', model.'.join(sorted(missing))}.", "Build the model again.")
    return config


def _choose_provider(config: Any, execution_provider: str) -> None:
    name = execution_provider.removesuffix("ExecutionProvider").lower()
    config.clear_providers()
    if name != "cpu":
        config.append_provider(name)


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).replace("\n", " ").rstrip(".")


def generate(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Answer one chat greedily.

    Request: `model_dir`, `messages`, `max_new_tokens`, `threads`, `execution_provider` (or null),
    `repetition_penalty` (optional).
    Result: `answer` (as streamed), `answer_whole` (decoded in one piece: the same for well-formed text), `prompt`,
    `prompt_tokens`, `new_tokens`, `finish` ("stop" or "length").
    Raises `StageFailed` for a model that cannot be run or whose logits are not finite.
    """
    progress(0, 1, "loading the model")
    model = _open(request)
    prompt, prompt_ids = model.render(request["messages"])
    (logits,) = model.logits_at(prompt_ids, [len(prompt_ids) - 1])
    if not np.isfinite(logits).all():
        raise StageFailed(
            f"The model in {model.model_dir} gives logits that are not finite.",
            "Its weights hold NaN or infinity, or overflow in their precision: choose another precision.",
        )
    answer_ids = model.answer(prompt_ids, request["max_new_tokens"])
    return {
        "answer": model.decode(answer_ids),
        "answer_whole": model.decode_whole(answer_ids),
        "prompt": prompt,
        "prompt_tokens": len(prompt_ids),
        "new_tokens": len(answer_ids),
        "finish": "stop" if len(answer_ids) < model.room_after(prompt_ids, request["max_new_tokens"]) else "length",
    }


def execution_providers(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Name the execution providers of the installed onnxruntime: `{"available": [str]}`, as onnxruntime spells them."""
    import onnxruntime

    return {"available": onnxruntime.get_available_providers()}


def _open(request: dict[str, Any]) -> GenaiModel:
    return GenaiModel(
        Path(request["model_dir"]),
        threads=request["threads"],
        execution_provider=request.get("execution_provider"),
        repetition_penalty=request.get("repetition_penalty", 1.0),
    )


def evaluate(request: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Answer the rows greedily and compare the next-token distributions with the reference's.

    Request: `model_dir`, `rows` [{id, messages, expected?}], `reference_dir` (written by
    `slmops.infra.transformers.reference:reference` for the same rows, or null), `max_new_tokens`, `max_positions` (used
    without a reference), `threads`, `execution_provider` (or null), `chunk_bytes` (optional).

    Prompts for the answers are rendered by the runtime itself; the distributions are teacher-forced over the
    reference's own token ids (without a reference: over the variant's own answers, only to see whether they are
    finite). Figures over positions are None when a position is not finite, or without a reference.

    A variant whose vocabulary is not the reference's is not compared either: it is looked at as without a reference,
    and `comparable` is false. Where its tokenizer's ids are beyond what it takes, it cannot answer at all: then the
    answer is empty and has no positions.

    Result:
    - `rows` [{id, answer, reference_answer, exact_match, identical_to_reference (token for token), prompt_tokens,
      template_matches, positions, finite_positions, top1_agreement, kl_divergence}];
    - `template_mismatches` {count, example: {id, reference, variant, reference_ids, variant_ids} or null};
    - `positions`, and over them: `finite_logits` (share; 0 without any), `top1_agreement` (share), `kl_divergence`
      (mean of KL(reference || variant), nats per token), `kl_divergence_p99`, `perplexity` and `reference_perplexity`
      of the reference's answers;
    - `exact_match`, `reference_exact_match`, `identical_answers` (shares), `empty_answers`;
    - `vocabulary` {variant, reference, compared, comparable}, `threads`, `versions`.

    Raises `StageFailed` for a model that cannot be run, or a reference of other rows.
    """
    rows: list[dict[str, Any]] = request["rows"]
    progress(0, len(rows), "loading the model")
    model = _open(request)
    reference = _Reference(Path(request["reference_dir"]), rows) if request.get("reference_dir") else None
    vocabulary = _vocabulary(model, reference)
    evaluated = []
    own: list[tuple[list[int], list[int]]] = []
    example: dict[str, Any] | None = None
    for done, row in enumerate(rows):
        progress(done, 2 * len(rows), "answers")
        text, prompt_ids = model.render(row["messages"])
        expected = reference.rows[done] if reference else None
        template_matches = None if expected is None else prompt_ids == expected["prompt_ids"]
        if expected is not None and not template_matches and example is None:
            example = {
                "id": row["id"],
                "reference": expected["prompt"],
                "variant": text,
                "reference_ids": expected["prompt_ids"],
                "variant_ids": prompt_ids,
            }
        budget = expected["max_new_tokens"] if expected else request["max_new_tokens"]
        if vocabulary["comparable"]:
            answer_ids = model.answer(prompt_ids, budget)
            own.append((prompt_ids, answer_ids))
        else:
            possible = _answer_if_possible(model, vocabulary["variant"], prompt_ids, budget)
            answer_ids = possible or []
            own.append(([], []) if possible is None else (prompt_ids, possible))
        answer = model.decode(answer_ids)
        evaluated.append(
            {
                "id": row["id"],
                "answer": answer,
                "reference_answer": None if expected is None else expected["answer"],
                "exact_match": matches(answer, row.get("expected")),
                "identical_to_reference": None
                if expected is None
                else answer_ids == model.without_end(expected["answer_ids"]),
                "prompt_tokens": len(prompt_ids),
                "template_matches": template_matches,
            }
        )
    chunk_bytes = request.get("chunk_bytes", LOGITS_CHUNK_BYTES)
    found: list[PositionComparison] = []
    finite: list[bool] = []
    chosen = choose_positions([len(prompt) + len(answer) for prompt, answer in own], request["max_positions"])
    for done, row in enumerate(evaluated):
        progress(len(rows) + done, 2 * len(rows), "distributions")
        if reference and vocabulary["comparable"]:
            comparisons = list(reference.compare(model, done, vocabulary["compared"], chunk_bytes))
            found += comparisons
            flags = [comparison.finite for comparison in comparisons]
            row.update(_figures(comparisons))
        else:
            prompt_ids, answer_ids = own[done]
            flags = _finite_flags(model, prompt_ids + answer_ids, chosen[done], chunk_bytes)
            row.update(_figures([]))
        finite += flags
        row.update({"positions": len(flags), "finite_positions": sum(flags)})
    log_probabilities = [comparison.log_probability for comparison in found]
    return {
        "rows": evaluated,
        "template_mismatches": {
            "count": sum(row["template_matches"] is False for row in evaluated),
            "example": example,
        },
        "positions": len(finite),
        "finite_logits": sum(finite) / max(1, len(finite)),
        **_figures(found),
        "kl_divergence_p99": _percentile([comparison.kl_divergence for comparison in found], 99),
        "perplexity": _perplexity(log_probabilities),
        "reference_perplexity": _perplexity([comparison.reference_log_probability for comparison in found]),
        "exact_match": share_of([row["exact_match"] for row in evaluated]),
        "reference_exact_match": reference.exact_match if reference else None,
        "identical_answers": share_of([row["identical_to_reference"] for row in evaluated]),
        "empty_answers": sum(not row["answer"].strip() for row in evaluated),
        "vocabulary": vocabulary,
        "threads": request["threads"],
        "versions": package_versions(),
    }


class _Reference:
    """The reference's tokens and logits, as its child function wrote them."""

    def __init__(self, directory: Path, rows: Sequence[dict[str, Any]]) -> None:
        content = json.loads((directory / REFERENCE_FILE).read_text("utf-8"))
        self.rows: list[dict[str, Any]] = content["rows"]
        self.exact_match: float | None = content["exact_match"]
        self.vocabulary_size: int = content["vocabulary_size"]
        self._tokenizer_size: int = content["tokenizer_size"]
        if [row["id"] for row in self.rows] != [row["id"] for row in rows]:
            raise StageFailed(
                f"The reference in {directory} was made for other evaluation rows.", "Make the reference again."
            )
        self._logits = np.load(directory / LOGITS_FILE, mmap_mode="r")
        self._offsets = np.cumsum([0, *(len(row["positions"]) for row in self.rows)])

    def is_comparable(self, variant_size: int) -> bool:
        """See `are_comparable`."""
        return are_comparable(variant_size, self.vocabulary_size, self._tokenizer_size)

    def compare(self, model: GenaiModel, index: int, vocabulary: int, chunk_bytes: int) -> Iterator[PositionComparison]:
        row = self.rows[index]
        if not row["positions"]:
            return
        token_ids = row["prompt_ids"] + row["answer_ids"]
        expected = self._logits[self._offsets[index] : self._offsets[index + 1]]
        found = model.logits_at(token_ids, row["positions"], chunk_bytes)
        for position, reference, variant in zip(row["positions"], expected, found, strict=True):
            yield compare_position(reference[:vocabulary], variant[:vocabulary], token_ids[position + 1])


def _vocabulary(model: GenaiModel, reference: _Reference | None) -> dict[str, Any]:
    try:
        size = model.vocabulary_size
    except StageFailed:
        declared = model.declared_vocabulary_size if reference else None
        if reference is None or declared is None or reference.is_comparable(declared):
            raise
        size = declared  # a model cut down to it may not even start: that is what the figure is to tell
    comparable = reference is None or reference.is_comparable(size)
    return {
        "variant": size,
        "reference": reference.vocabulary_size if reference else None,
        "compared": min(size, reference.vocabulary_size if reference else size) if comparable else 0,
        "comparable": comparable,
    }


def _answer_if_possible(
    model: GenaiModel, vocabulary_size: int, prompt_ids: list[int], max_new_tokens: int
) -> list[int] | None:
    """Token ids of the answer of a model with a vocabulary of its own; None when it cannot take the prompt."""
    if max(prompt_ids, default=0) >= vocabulary_size:
        return None
    try:
        return model.answer(prompt_ids, max_new_tokens)
    except StageFailed:
        return None


def _finite_flags(
    model: GenaiModel, token_ids: Sequence[int], positions: Sequence[int], chunk_bytes: int
) -> list[bool]:
    if not positions:
        return []
    return [bool(np.isfinite(logits).all()) for logits in model.logits_at(token_ids, positions, chunk_bytes)]


def _figures(comparisons: Sequence[PositionComparison]) -> dict[str, float | None]:
    return {
        "top1_agreement": share_of([comparison.agrees for comparison in comparisons]),
        "kl_divergence": _mean([comparison.kl_divergence for comparison in comparisons]),
    }


def _all_known(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if known and len(known) == len(values) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = _all_known(values)
    return math.fsum(known) / len(known) if known else None


def _percentile(values: Sequence[float | None], percent: float) -> float | None:
    known = _all_known(values)
    return float(np.percentile(known, percent)) if known else None


def _perplexity(log_probabilities: Sequence[float | None]) -> float | None:
    """exp of the mean negative log-likelihood; None when unknown or beyond what a float64 holds."""
    mean = _mean(log_probabilities)
    return math.exp(-mean) if mean is not None and -mean < 700 else None


def package_versions() -> dict[str, str]:
    """Versions of the packages that compute the answers."""
    return {package: version(package) for package in ("onnxruntime", "onnxruntime-genai", "numpy")}
