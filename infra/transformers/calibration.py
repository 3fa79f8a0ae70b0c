"""The calibration texts of a quantization: given chats, and a checkpoint's own answers to prompts."""

from collections.abc import Iterator, Sequence
from typing import Any

from slmops.infra.errors import BadInput
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import Question
from slmops.infra.transformers.answers import answer_greedily, render_question, token_budgets
from slmops.infra.transformers.calls import Calibrate, CalibrationTexts, Chat
from slmops.infra.transformers.loading import load_to_answer


def calibrate(call: Calibrate, progress: Progress) -> CalibrationTexts:
    """Tokenize chats, and answer prompts until the texts have `max_tokens` tokens; a longer text is cut there.

    A prompt that the chat template cannot render (such as one with a system message) is left out. Raises `BadInput` for
    a chat that the template or the model's context does not allow, and `StageFailed` for a checkpoint that does not
    load.
    """
    import torch

    torch.set_num_threads(call.threads)
    progress(0, 1, "loading the source checkpoint")
    tokenizer, model = load_to_answer(call.checkpoint_dir)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = _chat_rows(tokenizer, call.chats, context, call.max_tokens)
    wanted = call.max_tokens - sum(map(len, rows))
    answered: list[tuple[int, ...]] = []
    prompts = list(_rendered(tokenizer, call.prompts)) if wanted > 0 else []
    tokens, size = 0, call.batch_size
    while prompts and tokens < wanted:
        batch, prompts = prompts[:size], prompts[size:]
        progress(tokens, wanted, "own answers to calibrate on")
        answered += _answered(tokenizer, model, batch, call.max_new_tokens)
        tokens = sum(map(len, answered))
        size = min(call.batch_size, max(1, (wanted - tokens) * len(answered) // tokens + 1))
    return CalibrationTexts(rows=(*rows, *answered), answers=len(answered))


def _chat_rows(tokenizer: Any, chats: Sequence[Chat], context: int | None, max_tokens: int) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = []
    total = 0
    for chat in chats:
        if total >= max_tokens:
            break
        ids = _encoded(tokenizer, chat)
        if context is not None and len(ids) > context:
            raise BadInput(
                f"Row {chat.number} of the calibration file has {len(ids)} tokens; the model's context is {context}.",
                "Shorten or remove the row.",
                code="calibration-row-too-long",
            )
        rows.append(ids[: max_tokens - total])
        total += len(rows[-1])
    return rows


def _encoded(tokenizer: Any, chat: Chat) -> tuple[int, ...]:
    try:
        text = tokenizer.apply_chat_template(list(chat.messages), tokenize=False)
    except Exception as error:  # a template is code of the checkpoint's author and may raise anything
        raise BadInput(
            f"The chat template cannot render row {chat.number} of the calibration file: {error}.",
            "Change the row's messages or the chat template.",
            code="row-does-not-render",
        ) from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _rendered(tokenizer: Any, prompts: Sequence[Question]) -> Iterator[tuple[Question, tuple[str, list[int]]]]:
    for prompt in prompts:
        try:
            yield prompt, render_question(tokenizer, prompt)
        except BadInput:
            continue


def _answered(
    tokenizer: Any, model: Any, batch: Sequence[tuple[Question, tuple[str, list[int]]]], max_new_tokens: int
) -> Iterator[tuple[int, ...]]:
    questions, prompts = zip(*batch, strict=True)
    budgets = token_budgets(questions, prompts, model, max_new_tokens)
    answers = answer_greedily(tokenizer, model, prompts, budgets, batch_size=len(prompts), progress=_silent)
    for (_, prompt), answer in zip(prompts, answers, strict=True):
        yield tuple(prompt + answer)


def _silent(done: float, total: float, what: str) -> None:
    """Report nothing, because the answers of a batch arrive together."""
