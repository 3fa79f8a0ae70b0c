"""The source checkpoint in transformers: variants are compared with its greedy answers and next-token logits."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput, StageFailed, reason_of
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import (
    ANSWERS_FILE,
    LOGITS_FILE,
    Question,
    SourceAnswer,
    SourceAnswers,
    choose_positions,
    matches,
    share_of,
)
from slmops.infra.reference.decoding import PLAIN, Decoding
from slmops.infra.reference.repetition import ends_in_repetition
from slmops.infra.reference.thinking import Decode, Thinking, TokenCounter, split_tokens
from slmops.infra.transformers.calls import AnswerAsSource
from slmops.infra.transformers.lanes import in_lanes, lanes_of
from slmops.infra.transformers.loading import load_to_answer

# A step of 32 rows takes far less than four steps of 8, because each step reads all weights. But the cache of keys and
# values grows with every token of every row, so long rows are answered by eight.
MIN_BATCH_ROWS = 8
MAX_BATCH_TOKENS = 4096
STEPS_TOGETHER = 8  # after so many steps, the rows whose answers have ended leave their batch


def answer(call: AnswerAsSource, progress: Progress) -> SourceAnswers:
    """Answer the rows greedily and write the logits at the compared positions.

    Decoding is greedy, by the call's `decoding`: nothing else of the checkpoint's generation config applies. Thoughts
    are kept apart by the call's `thinking`. The compared positions are those of the prompt and of the reference's own
    answer, teacher-forced over both, each the distribution of the token that follows; the last one predicts the
    answer's end.

    Raises `BadInput` for a row that the chat template or the model's context cannot take, and `StageFailed` for a
    checkpoint that cannot be loaded or whose logits are not finite.
    """
    import torch

    torch.set_num_threads(call.threads)
    call.output_dir.mkdir(parents=True, exist_ok=True)
    progress(0, 1, "loading the source checkpoint")
    tokenizer, model = load_to_answer(call.checkpoint_dir)
    prompts = [render_question(tokenizer, row) for row in call.rows]
    budgets = token_budgets(call.rows, prompts, model, call.max_new_tokens + _max_thought_tokens(call))
    ends = end_token_ids(tokenizer, model, call.decoding)
    answer_ids = answer_greedily(
        tokenizer,
        model,
        prompts,
        budgets,
        batch_size=call.batch_size,
        progress=progress,
        decoding=call.decoding,
        counter=_counter_for(call, tokenizer),
    )
    lengths = [len(prompt_ids) + len(ids) - 1 for (_, prompt_ids), ids in zip(prompts, answer_ids, strict=True)]
    chosen = choose_positions(lengths, call.max_positions)
    rows = tuple(
        _answered(tokenizer, row, prompt, ids, budget, indices, call.decoding.thinking, ended=bool(ends & {*ids[-1:]}))
        for row, prompt, ids, budget, indices in zip(call.rows, prompts, answer_ids, budgets, chosen, strict=True)
    )
    positions, vocabulary_size = _write_logits(model, rows, call.output_dir / LOGITS_FILE, progress)
    answers = SourceAnswers(
        rows=rows,
        exact_match=share_of([row.exact_match for row in rows]),
        positions=positions,
        vocabulary_size=vocabulary_size,
        tokenizer_size=max(tokenizer.get_vocab().values()) + 1,
        logits_sha256=_sha256_of_file(call.output_dir / LOGITS_FILE),
        answers_sha256=_digest(rows),
        dtype=str(model.dtype).removeprefix("torch."),
        versions={package: version(package) for package in ("torch", "transformers", "tokenizers")},
    )
    (call.output_dir / ANSWERS_FILE).write_text(answers.model_dump_json(), "utf-8", newline="\n")
    return answers


def _answered(
    tokenizer: Any,
    question: Question,
    prompt: tuple[str, list[int]],
    answer_ids: list[int],
    max_new_tokens: int,
    positions: list[int],
    thinking: Thinking | None,
    *,
    ended: bool,
) -> SourceAnswer:
    text, prompt_ids = prompt
    spoken = answer_ids[: len(answer_ids) - ended]

    def shown(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=not question.keeps_control_tokens))

    answer_text, thoughts = shown(spoken), None
    if thinking:
        opened = thinking.marks.is_opened_by(text)
        parts = split_tokens(thinking.marks, spoken, opened=opened, whole=_whole(tokenizer), shown=shown)
        answer_text, thoughts = parts.text, parts.record
    return SourceAnswer(
        id=question.id,
        prompt=text,
        prompt_ids=tuple(prompt_ids),
        answer=answer_text,
        answer_ids=tuple(answer_ids),
        max_new_tokens=max_new_tokens,
        positions=tuple(positions),
        exact_match=matches(answer_text, question.expected),
        ended=ended,
        thoughts=thoughts,
        repeats=not ended and ends_in_repetition(answer_ids),
    )


def _max_thought_tokens(call: AnswerAsSource) -> int:
    return call.decoding.thinking.max_tokens if call.decoding.thinking else 0


def _whole(tokenizer: Any) -> Decode:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


def _counter_for(call: AnswerAsSource, tokenizer: Any) -> Callable[[str], TokenCounter] | None:
    thinking = call.decoding.thinking
    if thinking is None:
        return None
    return lambda prompt: TokenCounter(
        thinking, call.max_new_tokens, _whole(tokenizer), opened=thinking.marks.is_opened_by(prompt)
    )


def _digest(rows: Sequence[SourceAnswer]) -> str:
    content = [row.model_dump(mode="json") for row in rows]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def render_question(tokenizer: Any, row: Question) -> tuple[str, list[int]]:
    """Return a row's prompt and its token ids; raises `BadInput` if the chat template cannot render it."""
    try:
        text = tokenizer.apply_chat_template(
            list(row.messages),
            tools=list(row.tools) or None,
            chat_template=f"{row.template_prefix}{tokenizer.chat_template}" if row.template_prefix else None,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is code of the checkpoint's author and may raise anything
        raise BadInput(
            f"The chat template cannot render row {row.id!r}: {reason_of(error, -1)}.",
            "Change the row's messages or the chat template.",
            code="row-does-not-render",
        ) from error
    # The template itself writes the begin token, if the model has one.
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def token_budgets(
    rows: Sequence[Question], prompts: Sequence[tuple[str, list[int]]], model: Any, max_new_tokens: int
) -> list[int]:
    """Return how many tokens each answer may have; raises `BadInput` for a prompt that fills the context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    budgets = []
    for row, (_, ids) in zip(rows, prompts, strict=True):
        budget = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        if budget < 1:
            raise BadInput(
                f"Row {row.id!r} has a prompt of {len(ids)} tokens, and the model's context is {context}.",
                "Shorten or remove the row.",
                code="prompt-too-long",
            )
        budgets.append(budget)
    return budgets


def answer_greedily(
    tokenizer: Any,
    model: Any,
    prompts: Sequence[tuple[str, list[int]]],
    budgets: Sequence[int],
    *,
    batch_size: int,
    progress: Progress,
    decoding: Decoding = PLAIN,
    counter: Callable[[str], TokenCounter] | None = None,
) -> list[list[int]]:
    """Greedy answers, cut after the first end token; prompts of similar length are batched, for little padding.

    `counter` makes the counter of a prompt's answer, whose limits apply within the budgets.
    """
    import torch
    from transformers import GenerationConfig

    ends = end_token_ids(tokenizer, model, decoding)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
    # generate() fills unset fields of a given config from the model's own config, so the latter is replaced.
    model.generation_config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        repetition_penalty=decoding.repetition_penalty,
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index][1]))
    lengths = [len(prompts[index][1]) + budgets[index] for index in order]
    batches = [*batches_of(order, lengths, min(batch_size, -(-len(order) // lanes_of(model))))]

    def answered(batch: Sequence[int]) -> list[list[int]]:
        width = max(len(prompts[index][1]) for index in batch)
        ids = torch.full((len(batch), width), pad)
        mask = torch.zeros((len(batch), width), dtype=torch.long)
        for line, index in enumerate(batch):
            prompt = prompts[index][1]
            ids[line, width - len(prompt) :] = torch.tensor(prompt)
            mask[line, width - len(prompt) :] = 1
        counters = [counter(prompts[index][0]) for index in batch] if counter else []
        return _generate(model, ids, mask, [budgets[index] for index in batch], counters, ends)

    answers: dict[int, list[int]] = {}
    progress(0, len(prompts), "reference answers")
    for batch, found in zip(batches, in_lanes(model, answered, batches), strict=True):
        answers |= zip(batch, found, strict=True)
        progress(len(answers), len(prompts), "reference answers")
    return [answers[index] for index in range(len(prompts))]


def _generate(
    model: Any, ids: Any, mask: Any, budgets: Sequence[int], counters: Sequence[TokenCounter], ends: set[int]
) -> list[list[int]]:
    """Return the greedy answers to one batch of prompts, which are padded on the left.

    A batch goes on until its longest answer has ended, so rows with shorter ones leave it every few steps.
    """
    import torch

    width, cache = ids.shape[1], None
    answers: list[list[int]] = [[] for _ in budgets]
    lines = list(range(len(budgets)))
    while lines:
        full = [False] * len(lines)
        left = max(budgets[line] for line in lines) - (ids.shape[1] - width)
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=min(STEPS_TOGETHER, left),
                stopping_criteria=_limits([counters[line] for line in lines], full) if counters else None,
                return_dict_in_generate=True,
            )
            kept = []
            for place, line in enumerate(lines):
                new_ids = output.sequences[place, width:].tolist()
                room = min(budgets[line], counters[line].tokens) if counters else budgets[line]
                answers[line] = _until_end(new_ids[:room], ends)
                if not (full[place] or len(new_ids) >= budgets[line] or ends & {*answers[line][-1:]}):
                    kept.append(place)
            lines = [lines[place] for place in kept]
            ids, cache = output.sequences[kept], output.past_key_values
            mask = torch.nn.functional.pad(mask[kept], (0, ids.shape[1] - mask.shape[1]), value=1)
            cache.reorder_cache(torch.tensor(kept, dtype=torch.long))
    return answers


def _limits(counters: Sequence[TokenCounter], full: list[bool]) -> Any:
    """Return the criteria that end each answer of a batch at its counter's limits, and note in `full` which ended."""
    import torch
    from transformers import StoppingCriteriaList

    def are_full(input_ids: Any, scores: Any, **_: Any) -> Any:
        for line, token in enumerate(input_ids[:, -1].tolist()):
            full[line] = full[line] or counters[line].add(token)
        return torch.tensor(full, device=input_ids.device)

    return StoppingCriteriaList([are_full])


def end_token_ids(tokenizer: Any, model: Any, decoding: Decoding) -> set[int]:
    """The tokens that end an answer: those of the decoding, else those of the first file that names any."""
    if decoding.end_token_ids is not None:
        return set(decoding.end_token_ids)
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return set(found) if isinstance(found, list | tuple) else {found}
    return set()


def batches_of(order: Sequence[int], lengths: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Split the rows, whose whole lengths ascend, into batches of at most `size`, fewer where they are long."""
    start = 0
    while start < len(order):
        end = start + 1
        while (
            end < len(order)
            and end - start < size
            and (end - start < MIN_BATCH_ROWS or (end + 1 - start) * lengths[end] <= MAX_BATCH_TOKENS)
        ):
            end += 1
        yield order[start:end]
        start = end


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids


def _write_logits(model: Any, rows: Sequence[SourceAnswer], path: Path, progress: Progress) -> tuple[int, int]:
    """Write the logits at each row's positions, one exact unbatched pass per row; return the array's shape."""
    import numpy as np
    import torch

    total = sum(len(row.positions) for row in rows)
    vocabulary_size = model.get_output_embeddings().weight.shape[0]
    asked = [row for row in rows if row.positions]

    def logits_of(row: SourceAnswer) -> Any:
        ids = torch.tensor([row.prompt_ids + row.answer_ids[:-1]])
        with torch.inference_mode():
            output = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(row.positions))
            return output.logits[0].float().numpy()

    # Pages of a mapped file would count as memory of this process: 0.6 GB for a vocabulary of 151,936.
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (total, vocabulary_size)}
        )
        for done, (row, logits) in enumerate(zip(asked, in_lanes(model, logits_of, asked), strict=True)):
            progress(done, len(asked), "reference distributions")
            if not np.isfinite(logits).all():
                raise StageFailed(
                    f"The source checkpoint itself gives logits that are not finite, for row {row.id!r}.",
                    "Its weights hold NaN or infinity, or overflow: repair the training before it is deployed.",
                    code="logits-not-finite",
                )
            file.write(logits.tobytes())
    return total, vocabulary_size


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
