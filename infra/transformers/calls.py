"""Calls of child processes that use transformers, torch and peft, and their answers."""

from typing import Literal

from pydantic import Field, FiniteFloat

from slmops.infra.process.call import Call, Progress
from slmops.infra.records import AbsolutePath, Json, Record
from slmops.infra.reference.answers import Message, Question, SourceAnswers
from slmops.infra.reference.decoding import PLAIN, Decoding
from slmops.infra.reference.text import LOGITS_CHUNK_BYTES, SourceText


class AnswerAsSource(Call[SourceAnswers]):
    """Answer questions greedily with a source checkpoint and write its logits at the compared positions.

    `max_new_tokens` is the limit of answers without their thoughts. `output_dir` gets `logits.npy` and
    `reference.json`, a copy of the answer (see `slmops.infra.reference.answers`).
    """

    checkpoint_dir: AbsolutePath
    rows: tuple[Question, ...]
    max_new_tokens: int
    max_positions: int
    batch_size: int
    threads: int
    output_dir: AbsolutePath
    decoding: Decoding = PLAIN

    def perform(self, progress: Progress) -> SourceAnswers:
        """See `slmops.infra.transformers.answers.answer`."""
        from slmops.infra.transformers.answers import answer

        return answer(self, progress)


class CalibrationTexts(Record):
    """The token ids of calibration texts; the last `answers` of them are the checkpoint's own answers."""

    rows: tuple[tuple[int, ...], ...]
    answers: int


class Calibrate(Call[CalibrationTexts]):
    """Make the calibration texts of a checkpoint's quantization, with `max_tokens` tokens or a few more.

    They are the first chats, prompt and answer; if these are too few, `prompts` with the checkpoint's own greedy
    answers of at most `max_new_tokens` tokens.
    """

    checkpoint_dir: AbsolutePath
    chats: tuple["Chat", ...]
    prompts: tuple[Question, ...]
    max_tokens: int
    max_new_tokens: int
    batch_size: int
    threads: int

    def perform(self, progress: Progress) -> CalibrationTexts:
        """See `slmops.infra.transformers.calibration.calibrate`."""
        from slmops.infra.transformers.calibration import calibrate

        return calibrate(self, progress)


class AnswerAtLengths(Call[tuple[bool, ...]]):
    """Answer a chat of each length, in tokens, with `new_tokens` tokens, and return whether the answer is a text."""

    checkpoint_dir: AbsolutePath
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    threads: int
    decoding: Decoding = PLAIN

    def perform(self, progress: Progress) -> tuple[bool, ...]:
        """See `slmops.infra.transformers.lengths.answer_at_lengths`."""
        from slmops.infra.transformers.lengths import answer_at_lengths

        return answer_at_lengths(self, progress)


class ScoreTextAsSource(Call[SourceText]):
    """Score the first `max_tokens` tokens of a UTF-8 text file with a source checkpoint.

    `output_dir` gets the logits at the compared positions, `logits.npy`, and `text.json`, a copy of the answer (see
    `slmops.infra.reference.text`). At most `chunk_bytes` of logits exist at once.
    """

    checkpoint_dir: AbsolutePath
    text_file: AbsolutePath
    max_tokens: int
    window_tokens: int
    max_positions: int
    threads: int
    output_dir: AbsolutePath
    chunk_bytes: int = LOGITS_CHUNK_BYTES

    def perform(self, progress: Progress) -> SourceText:
        """See `slmops.infra.transformers.text.score_text`."""
        from slmops.infra.transformers.text import score_text

        return score_text(self, progress)


class Rendering(Record):
    """The prompt of a conversation and its token ids; `dated`: the template used the date."""

    text: str
    ids: tuple[int, ...]
    dated: bool


class RenderedConversation(Record):
    """One rendering, or one per moment if the template uses the date; none with the template's `refusal`."""

    renderings: tuple[Rendering, ...] = ()
    refusal: str | None = None


class ControlTokenIds(Record):
    """A control token's id, and the ids of its text alone and in the context."""

    id: int
    alone: tuple[int, ...]
    in_context: tuple[int, ...]


class RebuiltTokenizer(Record):
    """A tokenizer whose class in transformers splits texts differently from tokenizer.json, in these `parts`.

    `follows_file` says whether the model was trained with the file; `conversations` are those with other tokens.
    """

    class_name: str
    parts: tuple[str, ...]
    follows_file: bool
    conversations: tuple[str, ...]


class RenderedConversations(Record):
    """The renderings of conversations in transformers.

    `control_tokens` are the added tokens whose id occurs in a rendering; `marks` are texts in the renderings that look
    like a control token but are not one, with their numbers of tokens; `dated` says whether a prompt contains the date.
    """

    conversations: dict[str, RenderedConversation]
    dated: bool
    control_tokens: dict[str, ControlTokenIds]
    marks: dict[str, int]
    begin_token: str | None
    rebuilt: RebuiltTokenizer | None = None
    versions: dict[str, str]


class RenderConversations(Call[RenderedConversations]):
    """Render conversations with a folder's tokenizer.

    `moments` are the local times, ISO 8601, at which a template that writes the date is to be rendered, by conversation
    (none: the present); `marks` is a regular expression for texts that look like a control token, `context` the text
    before and after one. `tools` are offered in the conversations of these names. `save_dir` gets the tokenizer's files
    as the model builder writes them.
    """

    tokenizer_dir: AbsolutePath
    save_dir: AbsolutePath | None = None
    conversations: dict[str, tuple[Message, ...]]
    tools: dict[str, tuple[Json, ...]] = Field(default_factory=dict)
    moments: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    marks: str
    context: tuple[str, str]

    def perform(self, progress: Progress) -> RenderedConversations:
        """See `slmops.infra.transformers.templates.render`."""
        from slmops.infra.transformers.templates import render

        return render(self, progress)


class Merged(Record):
    """A merged checkpoint; `merged_tensors` are the adapter's."""

    parameters: int
    dtype: str
    merged_tensors: int
    tokenizer_from: Literal["adapter", "base"]


class MergeAdapter(Call[Merged]):
    """Merge a LoRA adapter into its base and write a checkpoint of the base's form and dtype.

    `output_dir` must not exist.
    """

    adapter_dir: AbsolutePath
    base_dir: AbsolutePath
    output_dir: AbsolutePath

    def perform(self, progress: Progress) -> Merged:
        """See `slmops.infra.transformers.adapters.merge_adapter`."""
        from slmops.infra.transformers.adapters import merge_adapter

        return merge_adapter(self, progress)


class Chat(Record):
    """A chat that ends with an assistant's turn; `number` is its row in the dataset, starting with 1."""

    number: int
    messages: tuple[Message, ...]


class Loss(Record):
    """Losses at one step, in nats per token."""

    step: int
    train_loss: FiniteFloat | None = None
    held_out_loss: FiniteFloat | None = None


class FineTuned(Record):
    """The result of a fine-tuning.

    `held_out_loss` and `loaded_held_out_loss` are of the best state, in memory and as saved and loaded back; None
    without held-out chats. `trained_tokens` are per epoch.
    """

    losses: tuple[Loss, ...]
    steps: int
    best_step: int
    held_out_loss: FiniteFloat | None
    loaded_held_out_loss: FiniteFloat | None
    resumed_at_step: int | None
    trained_tokens: int
    seconds: FiniteFloat
    device: str
    versions: dict[str, str]


class FineTune(Call[FineTuned]):
    """Fine-tune a checkpoint and write the result: a LoRA adapter, or a whole checkpoint of the base's dtype.

    Without `held_out` chats there is no early stopping. `max_length` in tokens (None: the base's context); `patience`
    in epochs without improvement. `state_dir` keeps the state of each epoch: an interrupted run continues from there.
    `output_dir` must not exist.
    """

    base_dir: AbsolutePath
    train: tuple[Chat, ...]
    held_out: tuple[Chat, ...]
    method: Literal["lora", "full"]
    lora_rank: int
    epochs: int
    learning_rate: float
    batch_size: int
    max_length: int | None
    patience: int
    seed: int
    threads: int
    state_dir: AbsolutePath
    output_dir: AbsolutePath

    def perform(self, progress: Progress) -> FineTuned:
        """See `slmops.infra.transformers.fine_tuning.fine_tune`."""
        from slmops.infra.transformers.fine_tuning import fine_tune

        return fine_tune(self, progress)


class TrainedChatModel(Record):
    """A model trained from scratch.

    `exact_match` is the share of the evaluation file's rows that the reloaded checkpoint answers exactly, by greedy
    decoding; `train_loss` the mean of the last epoch in nats per weighted token; `seconds` of the training alone.
    """

    exact_match: float
    eval_rows: int
    parameters: int
    steps: int
    train_loss: float
    seconds: float


class TrainChatModel(Call[TrainedChatModel]):
    """Train a Qwen2-architecture chat model with a tokenizer of its own and write a Hugging Face checkpoint.

    The files are JSON Lines of `{id, messages, tools?, expected, category}`; `architecture` are arguments of
    `Qwen2Config`; `chat_template` is Jinja with ChatML's markers. AdamW trains all weights, but with an
    `attention_learning_rate` those of attention's matrices are trained by Muon at this rate. With `base_dir`, a
    checkpoint of this call, the training starts from it with `added_tokens` beside its own; else from random weights.
    `output_dir` must not exist.
    """

    train_file: AbsolutePath
    eval_file: AbsolutePath
    base_dir: AbsolutePath | None = None
    added_tokens: tuple[str, ...] = ()
    architecture: Json
    chat_template: str
    vocabulary_size: int
    epochs: int
    learning_rate: float
    attention_learning_rate: float | None
    weight_decay: float
    prompt_loss_weight: float
    batch_size: int
    seed: int
    threads: int
    max_new_tokens: int
    min_exact_match: float
    output_dir: AbsolutePath

    def perform(self, progress: Progress) -> TrainedChatModel:
        """See `slmops.infra.transformers.training.train_chat_model`."""
        from slmops.infra.transformers.training import train_chat_model

        return train_chat_model(self, progress)
