"""Fine-tune a checkpoint on chats with transformers' Trainer."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import Message
from slmops.infra.transformers.calls import Chat, FineTune, FineTuned, Loss

IGNORED_LABEL = -100  # torch's cross entropy skips this label
# Attention and MLP projections, by the names they have in Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite; then Phi-3's.
LORA_TARGETS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("qkv_proj", "gate_up_proj"),
)
WARM_UP_SHARE = 0.03
# The loss of the saved model may differ from the loss in memory only by the rounding of the weights.
LOADED_LOSS_TOLERANCE = 0.05
LOGS_PER_RUN = 100
MAX_NAMED_ROWS = 3


def fine_tune(call: FineTune, progress: Progress) -> FineTuned:
    """Fine-tune a checkpoint and write the result: a LoRA adapter, or a whole checkpoint of the base's dtype.

    Only the assistant's turns are learned. Training is in float32 on a CPU, in bfloat16 on a GPU that supports it.

    Raises `BadInput` for chats longer than the context, or a chat template in which a turn's text depends on later
    turns; `StageFailed` for a base that cannot be loaded, a loss that is not finite, or a saved result whose loss
    differs.
    """
    import torch
    import transformers

    from slmops.infra.transformers.loading import load_checkpoint

    torch.set_num_threads(call.threads)
    transformers.set_seed(call.seed)
    gpu = torch.cuda.is_available()
    progress(0, 1, "loading the base")
    tokenizer, model = load_checkpoint(call.base_dir, "bfloat16" if gpu else "float32")
    context = _context(model, call.max_length)
    train = _encode(tokenizer, call.train, context)
    held_out = _encode(tokenizer, call.held_out, context)
    if call.method == "lora":
        model = _with_lora(model, call.lora_rank, call.seed)
    else:
        model.requires_grad_(True)
    trainer = _trainer(model, train, held_out, call, progress)
    last = _last_state(call.state_dir)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = time.monotonic() - started
    losses = _losses(trainer.state.log_history)
    in_memory = trainer.evaluate()["eval_loss"] if held_out else None

    progress(trainer.state.max_steps, trainer.state.max_steps, "saving")
    _save(trainer.model, tokenizer, call)
    loaded = None
    if held_out:
        loaded = _loss_of_saved(call, held_out, trainer)
        assert in_memory is not None
        if abs(loaded - in_memory) > LOADED_LOSS_TOLERANCE * max(1.0, in_memory):
            raise StageFailed(
                f"The saved model has a loss of {loaded:.3f} on the held-out chats; in memory it was {in_memory:.3f}.",
                "Train with the other method (lora or full); see the log.",
            )
    return FineTuned(
        losses=losses,
        steps=trainer.state.global_step,
        best_step=trainer.state.best_global_step or trainer.state.global_step,
        held_out_loss=in_memory,
        loaded_held_out_loss=loaded,
        resumed_at_step=None if last is None else int(last.name.rpartition("-")[2]),
        trained_tokens=sum(label != IGNORED_LABEL for chat in train for label in chat["labels"]),
        seconds=seconds,
        device="cuda" if gpu else "cpu",
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
    )


def _context(model: Any, max_length: int | None) -> int:
    context = int(getattr(model.config, "max_position_embeddings", 0)) or 2**31
    return min(context, max_length or context)


def _encode(tokenizer: object, chats: Sequence[Chat], context: int) -> list[dict[str, list[int]]]:
    """Return input_ids and labels of each chat; only the assistant's turns have labels."""
    encoded = [_encode_chat(tokenizer, list(chat.messages)) for chat in chats]
    lengths = [(chat.number, len(example["input_ids"])) for chat, example in zip(chats, encoded, strict=True)]
    long = [(number, tokens) for number, tokens in lengths if tokens > context]
    if long:
        named = ", ".join(f"row {number} has {tokens} tokens" for number, tokens in long[:MAX_NAMED_ROWS])
        raise BadInput(
            f"{len(long)} of {len(chats)} chats are longer than the context of {context} tokens: {named}.",
            "Shorten or omit them; a truncated part would not be learned.",
            code="chat-too-long",
        )
    return encoded


def _encode_chat(tokenizer: Any, chat: list[Message]) -> dict[str, list[int]]:
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    answers: list[tuple[int, int]] = []
    for index, turn in enumerate(chat):
        if turn["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(chat[:index], tokenize=False, add_generation_prompt=True)
        until = text if index == len(chat) - 1 else tokenizer.apply_chat_template(chat[: index + 1], tokenize=False)
        if text.startswith(before) and text.startswith(until):
            answers.append((len(before), len(until)))
        else:
            raise BadInput(
                "The base's chat template writes a conversation differently if an answer follows it.",
                "Prompts in use would differ from those in training: give another template, or chats of one answer.",
            )
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= at < end for start, end in answers) else IGNORED_LABEL
        for token, (at, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    return {"input_ids": list(tokens["input_ids"]), "labels": labels}


def _with_lora(model: Any, rank: int, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in LORA_TARGETS if name in names]
    if not targets:
        raise BadInput(
            f"LoRA supports no layer of {type(model).__name__}.",
            "Train it with the method full, or with another tool.",
            code="lora-layers-unknown",
        )
    # alpha = 2 * rank: the scale at which a learning rate means the same for every rank (Hu et al. 2021, section 4.1).
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def _trainer(
    model: Any,
    train: list[dict[str, list[int]]],
    held_out: list[dict[str, list[int]]],
    call: FineTune,
    progress: Progress,
) -> Any:
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

    class StepProgress(TrainerCallback):  # type: ignore[misc]
        loss = math.nan

        def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **_: object) -> None:
            self.loss = logs.get("loss", self.loss)

        def on_step_end(self, args: object, state: Any, control: object, **_: object) -> None:
            loss = "" if math.isnan(self.loss) else f", loss {self.loss:.3f}"
            progress(
                state.global_step, state.max_steps, f"training: step {state.global_step} of {state.max_steps}{loss}"
            )

    steps = call.epochs * math.ceil(len(train) / call.batch_size)
    by_epoch = "epoch" if held_out else "no"
    arguments = TrainingArguments(
        output_dir=str(call.state_dir),
        num_train_epochs=call.epochs,
        per_device_train_batch_size=call.batch_size,
        per_device_eval_batch_size=call.batch_size,
        learning_rate=call.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(WARM_UP_SHARE * steps)),
        logging_steps=max(1, steps // LOGS_PER_RUN),
        eval_strategy=by_epoch,
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=bool(held_out),
        metric_for_best_model="eval_loss" if held_out else None,
        greater_is_better=False if held_out else None,
        seed=call.seed,
        data_seed=call.seed,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    callbacks = [StepProgress(), *([EarlyStoppingCallback(call.patience)] if held_out else [])]
    return Trainer(model, arguments, _padded, train, held_out or None, callbacks=callbacks)


def _padded(batch: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Return tensors of a batch [chats, tokens], padded at the end, also without a padding token of the tokenizer."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def filled(rows: list[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": filled([example["input_ids"] for example in batch], 0),
        "attention_mask": filled([[1] * len(example["input_ids"]) for example in batch], 0),
        "labels": filled([example["labels"] for example in batch], IGNORED_LABEL),
    }


def _last_state(state_dir: Path) -> Path | None:
    """Return the newest complete state: the trainer writes trainer_state.json last."""
    states = [path for path in state_dir.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(states, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _losses(log: Sequence[dict[str, float]]) -> tuple[Loss, ...]:
    """Return the losses in a trainer's log; raises `StageFailed` for one that is not finite."""
    names = {"loss": "train_loss", "eval_loss": "held_out_loss"}
    by_step: dict[int, dict[str, float]] = {}
    for entry in log:
        found = {new: float(entry[old]) for old, new in names.items() if old in entry}
        if not all(map(math.isfinite, found.values())):
            raise StageFailed("The loss is not finite: the training diverged.", "Lower the learning rate.")
        if found:
            by_step.setdefault(int(entry["step"]), {}).update(found)
    return tuple(Loss(step=step, **found) for step, found in sorted(by_step.items()))


def _save(model: Any, tokenizer: Any, call: FineTune) -> None:
    import torch

    if call.method == "full":
        declared = json.loads((call.base_dir / "config.json").read_text("utf-8"))
        dtype = declared.get("dtype") or declared.get("torch_dtype") or "float32"
        model.to(getattr(torch, str(dtype)))
    model.save_pretrained(call.output_dir, **({"safe_serialization": True} if call.method == "lora" else {}))
    tokenizer.save_pretrained(call.output_dir)


def _loss_of_saved(call: FineTune, held_out: list[Any], trainer: Any) -> float:
    from slmops.infra.transformers.loading import load_checkpoint

    dtype = str(trainer.model.dtype).removeprefix("torch.")
    if call.method == "lora":
        from peft import PeftModel

        _, base = load_checkpoint(call.base_dir, dtype)
        model = PeftModel.from_pretrained(base, call.output_dir, local_files_only=True, use_safetensors=True)
    else:
        _, model = load_checkpoint(call.output_dir, dtype)
    trainer.model = trainer.model_wrapped = model.to(trainer.args.device)
    return float(trainer.evaluate()["eval_loss"])
