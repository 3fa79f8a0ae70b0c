"""Calls of child processes that use onnxruntime-genai, and their answers."""

import math
from typing import Generic, Literal

from pydantic import Field, FiniteFloat

from slmops.infra.process.call import Call, Progress, R
from slmops.infra.process.endurance import Endure
from slmops.infra.records import AbsolutePath, Json, Record, later_field
from slmops.infra.reference.answers import Message, Question, RowId, Share, Thoughts
from slmops.infra.reference.decoding import PLAIN, Decoding
from slmops.infra.reference.text import LOGITS_CHUNK_BYTES


class OnModel(Call[R], Generic[R]):
    """A call on a model folder, which runs on the provider that its genai_config.json names."""

    model_dir: AbsolutePath
    threads: int


class RequestFigures(Record):
    """The raw figures of one measured request; see `slmops.infra.genai.timing.time_request`."""

    prompt_tokens: int
    new_tokens: int
    repetition: int
    ttft_ms: FiniteFloat
    prompt_processing_throughput_tps: FiniteFloat
    token_generation_throughput_tps: FiniteFloat
    inter_token_latency_ms: FiniteFloat
    inter_token_latencies_ms: tuple[FiniteFloat, ...]
    e2e_latency_ms: FiniteFloat


class SweptRequest(Record):
    """The raw figures of one request of the sweep over prompt lengths.

    `round` is above 0 if the length was measured again because of a loss of throughput. `finite_logits` says whether
    the logits of the last position were finite after the prompt and after each generated token, `answered` whether the
    answer decoded to a text that is not empty; None if the prompt was not a chat, because a chat model need not answer
    other prompts.
    """

    prompt_tokens: int
    new_tokens: int
    repetition: int
    round: int
    ttft_ms: FiniteFloat
    token_generation_throughput_tps: FiniteFloat
    finite_logits: bool
    answered: bool | None


class Hardware(Record):
    """The machine of the measurement."""

    cpu: str
    physical_cores: int | None
    logical_cores: int | None
    ram_bytes: int
    os: str
    machine: str


class Measured(Record):
    """The raw figures of a model folder.

    `load_ms` is of model and tokenizer; `cpu_percent` over the measured requests (100 is one core busy) and
    `peak_rss_bytes` from before the load to the last of them, both of the child's own process. `others_cpu_share` is
    the share of the cores for the measurement's threads that other programs took meanwhile, in the best of `rounds`.
    """

    load_ms: FiniteFloat
    rows: tuple[RequestFigures, ...]
    cpu_percent: FiniteFloat
    peak_rss_bytes: int
    size_bytes: int
    notes: tuple[str, ...]
    sweep: tuple[SweptRequest, ...]
    sweep_notes: tuple[str, ...]
    threads: int
    hardware: Hardware
    versions: dict[str, str]
    others_cpu_share: FiniteFloat | None = None
    rounds: int = 1


class Sweep(Record):
    """The requested sweep; with `max_prompt_tokens` None it goes to the end of the model's context."""

    max_prompt_tokens: int | None
    new_tokens: int
    repetitions: int
    budget_s: float
    max_cliff_ratio: float


class Measure(OnModel[Measured]):
    """Measure speed and memory; `prompt_tokens` are lengths; without `sweep` no sweep is made.

    A round of requests is repeated if other programs used more than `max_others_cpu_share` of its cores, or if the
    standard deviation of its token generation throughput is more than `max_spread` of the median.
    """

    prompt_tokens: tuple[int, ...]
    new_tokens: int
    warmup: int
    repetitions: int
    sweep: Sweep | None = None
    max_others_cpu_share: float = 1.0
    max_spread: float = math.inf

    def perform(self, progress: Progress) -> Measured:
        """See `slmops.infra.genai.measurement.measure`."""
        from slmops.infra.genai.measurement import measure

        return measure(self, progress)


class AnsweredRow(Record):
    """A variant's answer to one row, and its distance from the reference there (None: no reference, or not finite).

    `near_agreement` counts near ties as agreement (`slmops.infra.reference.distributions.NEAR_TIE`). `exact_match` is
    None without an expected answer; `identical_to_reference` is token for token, thoughts included. `ended` and
    `reference_ended` say whether an end token was reached within the tokens that the answer might have; None: not
    known. `repeats` and `reference_repeats` say whether an answer without an end is in a loop
    (`slmops.infra.reference.repetition`).
    """

    id: RowId
    answer: str
    reference_answer: str | None
    exact_match: bool | None
    identical_to_reference: bool | None
    prompt_tokens: int
    template_matches: bool | None
    positions: int
    finite_positions: int
    top1_agreement: Share | None
    kl_divergence: FiniteFloat | None
    near_agreement: Share | None = later_field(None)
    ended: bool | None = later_field(None)
    reference_ended: bool | None = later_field(None)
    thoughts: Thoughts | None = later_field(None)
    reference_thoughts: Thoughts | None = later_field(None)
    repeats: bool = later_field(False)
    reference_repeats: bool = later_field(False)


class TemplateMismatch(Record):
    """A prompt that the serving runtime renders or tokenizes differently from transformers."""

    id: RowId
    reference: str
    variant: str
    reference_ids: tuple[int, ...]
    variant_ids: tuple[int, ...]


class TemplateMismatches(Record):
    """The number of rows whose prompts differ, and the first of them."""

    count: int
    example: TemplateMismatch | None


class Vocabulary(Record):
    """Lengths of the logits, and of the part that was compared.

    `comparable` is false if the vocabularies differ in tokens of the reference's tokenizer; then nothing was compared.
    """

    variant: int
    reference: int | None
    compared: int
    comparable: bool = True


class Evaluated(Record):
    """A variant's answers and distributions.

    Over all `positions`: `finite_logits` (share; 0 without any), `top1_agreement` and `near_agreement` (shares; the
    second counts near ties as agreement), `kl_divergence` (mean of KL(reference || variant), nats per token), its 99th
    percentile, and the perplexities of the reference's answers. Figures over positions are None when a position is not
    finite, or without a reference.
    """

    rows: tuple[AnsweredRow, ...]
    template_mismatches: TemplateMismatches
    positions: int
    finite_logits: Share
    top1_agreement: Share | None
    kl_divergence: FiniteFloat | None
    kl_divergence_p99: FiniteFloat | None
    perplexity: FiniteFloat | None
    reference_perplexity: FiniteFloat | None
    exact_match: Share | None
    reference_exact_match: Share | None
    identical_answers: Share | None
    empty_answers: int
    vocabulary: Vocabulary
    threads: int
    versions: dict[str, str]
    near_agreement: Share | None = later_field(None)


class Evaluate(OnModel[Evaluated]):
    """Answer questions greedily and compare the next-token distributions with the reference's.

    `reference_dir` was written by `slmops.infra.transformers.calls.AnswerAsSource` for the same questions, or is None;
    `max_positions` is used without one. `max_new_tokens` is the limit of answers without their thoughts. Of `decoding`
    the end tokens are not used: the folder has its own.
    """

    rows: tuple[Question, ...]
    reference_dir: AbsolutePath | None
    max_new_tokens: int
    max_positions: int
    chunk_bytes: int = LOGITS_CHUNK_BYTES
    decoding: Decoding = PLAIN

    def perform(self, progress: Progress) -> Evaluated:
        """See `slmops.infra.genai.evaluation.evaluate`."""
        from slmops.infra.genai.evaluation import evaluate

        return evaluate(self, progress)


class ScoredWindow(Record):
    """A window of a text: sums over its scored tokens, and over the compared `positions`, in nats.

    A sum is None if it is not known: a token's logits are not finite, or there is no reference.
    """

    tokens: int
    finite_tokens: int
    log_probability: float | None
    reference_log_probability: float | None
    positions: int
    agreeing: int
    nearly_agreeing: int
    kl_divergence: float | None


class ComparedText(Record):
    """A variant on a text.

    `tokens` is their number in the text; `last_position_only`: the model gives the logits of one position at a time.
    """

    windows: tuple[ScoredWindow, ...]
    tokens: int
    window_tokens: int
    kl_divergence_p99: float | None
    last_position_only: bool
    threads: int
    versions: dict[str, str]


class CompareText(OnModel[ComparedText]):
    """Score the tokens of a UTF-8 text file and compare the next-token distributions with the reference's.

    `reference_dir` was written by `slmops.infra.transformers.calls.ScoreTextAsSource` for the same text, or is None;
    `max_tokens` and `window_tokens` are used without one.
    """

    text_file: AbsolutePath
    reference_dir: AbsolutePath | None
    max_tokens: int
    window_tokens: int
    chunk_bytes: int = LOGITS_CHUNK_BYTES

    def perform(self, progress: Progress) -> ComparedText:
        """See `slmops.infra.genai.text.compare_text`."""
        from slmops.infra.genai.text import compare_text

        return compare_text(self, progress)


class Generated(Record):
    """One greedy answer, as it is streamed; `finish` is "length" if no end token was reached."""

    answer: str
    prompt: str
    prompt_tokens: int
    new_tokens: int
    finish: Literal["stop", "length"]


class Generate(OnModel[Generated]):
    """Answer one chat greedily."""

    messages: tuple[Message, ...]
    max_new_tokens: int
    repetition_penalty: float = 1.0

    def perform(self, progress: Progress) -> Generated:
        """See `slmops.infra.genai.runtime.generate`."""
        from slmops.infra.genai.runtime import generate

        return generate(self, progress)


class Probe(OnModel[int]):
    """Load a model and compute one step, to find out whether it runs; return the length of its logits.

    Raises `StageFailed` if it does not.
    """

    def perform(self, progress: Progress) -> int:
        """See `slmops.infra.genai.runtime.GenaiModel`."""
        from slmops.infra.genai.runtime import GenaiModel

        return GenaiModel(self.model_dir, threads=self.threads).vocabulary_size


class ListExecutionProviders(Call[tuple[str, ...]]):
    """Return the execution providers of the installed onnxruntime under its own names."""

    def perform(self, progress: Progress) -> tuple[str, ...]:
        """Ask onnxruntime."""
        import onnxruntime

        return tuple(onnxruntime.get_available_providers())


class RenderedChat(Record):
    """The prompt of a conversation and its token ids, or the `error` that prevented it.

    `moments` are the local times, ISO 8601, right before and after.
    """

    text: str = ""
    ids: tuple[int, ...] | None = None
    error: str | None = None
    moments: tuple[str, str]


class EncodedToken(Record):
    """Token ids of a control token's text, alone and in the context."""

    alone: tuple[int, ...]
    in_context: tuple[int, ...]


class RenderedChats(Record):
    """The runtime's prompts of conversations; if it cannot open the tokenizer, `fault` says why and the other fields
    are empty.

    `compositions` are token ids by name, with the special tokens that the tokenizer itself adds to a text.
    """

    fault: str | None = None
    conversations: dict[str, RenderedChat] = Field(default_factory=dict)
    control_tokens: dict[str, EncodedToken] = Field(default_factory=dict)
    compositions: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    versions: dict[str, str]


class RenderChats(Call[RenderedChats]):
    """Render conversations with a model folder's tokenizer; the model itself is not loaded.

    `context` is the text before and after a control token, `compositions` are whole prompts by name, `tools` are
    offered in the conversations of these names.
    """

    model_dir: AbsolutePath
    conversations: dict[str, tuple[Message, ...]]
    tools: dict[str, tuple[Json, ...]] = Field(default_factory=dict)
    control_tokens: tuple[str, ...]
    context: tuple[str, str]
    compositions: dict[str, str]

    def perform(self, progress: Progress) -> RenderedChats:
        """See `slmops.infra.genai.templates.render`."""
        from slmops.infra.genai.templates import render

        return render(self, progress)


class EndureInGenai(Endure):
    """Open a model folder once, then run the soak and the edge inputs; the journal has the results."""

    def perform(self, progress: Progress) -> None:
        """See `slmops.infra.genai.endurance.endure`."""
        from slmops.infra.genai.endurance import endure

        endure(self, progress)
