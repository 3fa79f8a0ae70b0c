"""Train a small chat model from scratch and test it as a saved checkpoint."""

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slmops.infra.errors import BadInput, StageFailed
from slmops.infra.process.call import Progress
from slmops.infra.records import Json
from slmops.infra.transformers.calls import TrainChatModel, TrainedChatModel
from slmops.infra.transformers.muon import Muon

END_OF_TURN = "<|im_end|>"
TURN_MARKERS = (END_OF_TURN, "<|im_start|>")
END_OF_TEXT = "<|endoftext|>"
IGNORED_LABEL = -100  # torch's cross entropy skips this label
EVALUATION_BATCH_ROWS = 100
GRADIENT_NORM = 1.0
WARM_UP_SHARE = 0.06

Row = dict[str, Any]


def train_chat_model(call: TrainChatModel, progress: Progress) -> TrainedChatModel:
    """Train a Qwen2-architecture chat model with a tokenizer of its own; write a Hugging Face checkpoint.

    The same request on the same machine writes the same bytes.

    Raises `BadInput` for data that cannot be read; `StageFailed` if `exact_match` is below `min_exact_match` or the
    loaded tokenizer differs from the trained one.
    """
    import torch

    # In bfloat16 a step of so small a model takes longer with two threads than with one, which wait for each other.
    torch.set_num_threads(1 if _has_bfloat16() else call.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(call.seed)
    train_rows = _read_rows(call.train_file)
    eval_rows = _read_rows(call.eval_file)
    output_dir = call.output_dir
    output_dir.mkdir(parents=True)
    total = float(call.epochs * math.ceil(len(train_rows) / call.batch_size))

    progress(0, total, "training the tokenizer")
    if call.base_dir is None:
        tokenizer = _train_tokenizer(train_rows, call, output_dir)
        model = _new_model(call.architecture, tokenizer)
    else:
        tokenizer, model = _base(call.base_dir, call)
    examples = [_encode(tokenizer, row) for row in train_rows]
    started = time.monotonic()
    train_loss = _fit(model, examples, call, tokenizer.pad_token_id, progress)
    seconds = time.monotonic() - started

    # fine-tuned checkpoints usually are in bfloat16, and fp16 represents nearly all of its values exactly.
    model.to(torch.bfloat16).save_pretrained(output_dir)
    shutil.copyfile(call.eval_file, output_dir / "eval.jsonl")
    progress(total, total, "checking the saved checkpoint")
    answers = _answers(output_dir, eval_rows, call.max_new_tokens)
    wrong = [(row, answer) for row, answer in zip(eval_rows, answers, strict=True) if answer != row["expected"]]
    exact_match = 1 - len(wrong) / len(eval_rows)
    if exact_match < call.min_exact_match:
        row, answer = wrong[0]
        raise StageFailed(
            f"The trained checkpoint answers {exact_match:.3f} of the held-out rows exactly, less than "
            f"{call.min_exact_match}; row {row['id']}: expected {row['expected']!r}, found {answer!r}.",
            "Train for more epochs or with another seed.",
            code="model-did-not-learn",
        )
    return TrainedChatModel(
        exact_match=exact_match,
        eval_rows=len(eval_rows),
        parameters=model.num_parameters(),
        steps=int(total),
        train_loss=train_loss,
        seconds=seconds,
    )


def _read_rows(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    if not rows:
        raise BadInput(f"{path} has no rows.", "Give at least one row a line.", code="training-file-empty")
    return rows


def _train_tokenizer(rows: Sequence[Row], call: TrainChatModel, output_dir: Path) -> Any:
    """Train a byte-level BPE tokenizer, save it, and return the tokenizer that `AutoTokenizer` loads.

    `AutoTokenizer` gives a Qwen2 checkpoint Qwen2's own pre-tokenizer, whatever tokenizer.json contains, so training
    uses that pre-tokenizer. Training the model with the loaded tokenizer ensures that users get the same one.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import AutoTokenizer, Qwen2Tokenizer

    chats = [[*row["messages"], {"role": "assistant", "content": row["expected"]}] for row in rows]
    texts = [turn[part] for chat in chats for turn in chat for part in ("role", "content")]
    markers = [END_OF_TEXT, *TURN_MARKERS]
    blank = Qwen2Tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=call.vocabulary_size,
        special_tokens=markers,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blank.backend_tokenizer.train_from_iterator([*texts, "system"], trainer)
    learned = json.loads(blank.backend_tokenizer.to_str())["model"]
    trained = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(TURN_MARKERS),
        model_max_length=call.architecture["max_position_embeddings"],
    )
    trained.chat_template = call.chat_template
    trained.save_pretrained(output_dir)
    (output_dir / "config.json").write_text('{"model_type": "qwen2"}', "utf-8", newline="\n")  # read by AutoTokenizer
    loaded = AutoTokenizer.from_pretrained(output_dir)
    for text in texts[:1000]:
        if loaded.encode(text) != trained.encode(text) or loaded.decode(loaded.encode(text)) != text:
            raise StageFailed(f"The saved tokenizer does not encode {text!r} as the trained one did.")
    return loaded


def _base(base_dir: Path, call: TrainChatModel) -> tuple[Any, Any]:
    """Load a checkpoint of this module with the call's template and added tokens, whose embeddings are drawn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.add_tokens(list(call.added_tokens))
    tokenizer.chat_template = call.chat_template
    tokenizer.save_pretrained(call.output_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model.resize_token_embeddings(_padded(len(tokenizer)), mean_resizing=False)
    return tokenizer, model


def _new_model(architecture: Json, tokenizer: Any) -> Any:
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    tokens = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(END_OF_TURN),
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = Qwen2ForCausalLM(Qwen2Config(**architecture, **tokens, vocab_size=_padded(len(tokenizer))))
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=[tokens["eos_token_id"], tokens["pad_token_id"]],
        pad_token_id=tokens["pad_token_id"],
        max_length=architecture["max_position_embeddings"],
    )
    return model


def _padded(vocabulary_size: int) -> int:
    return math.ceil(vocabulary_size / 32) * 32  # quantization works in blocks of 32


def _encode(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """Return the row's token ids, prompt and answer with its end of turn, and the number of prompt tokens."""
    prompt_ids = tokenizer.encode(_prompt(tokenizer, row), add_special_tokens=False)
    answer_ids = tokenizer.encode(row["expected"] + END_OF_TURN, add_special_tokens=False)
    return prompt_ids + answer_ids, len(prompt_ids)


def _prompt(tokenizer: Any, row: Row) -> str:
    tools = row.get("tools") or None
    return str(tokenizer.apply_chat_template(row["messages"], tools=tools, add_generation_prompt=True, tokenize=False))


def _fit(
    model: Any, examples: list[tuple[list[int], int]], call: TrainChatModel, pad_id: int, progress: Progress
) -> float:
    import torch

    steps = call.epochs * math.ceil(len(examples) / call.batch_size)
    optimize = _optimizer(model, call)
    model.set_attn_implementation("eager")  # for rows of some 30 tokens it takes less time than the fused attention
    model.train()
    step = 0
    epoch_losses: list[float] = []
    for epoch in range(call.epochs):
        epoch_losses = []
        for batch in _batches(examples, call.batch_size, random.Random(f"{call.seed}-{epoch}")):  # noqa: S311
            with torch.autocast("cpu", torch.bfloat16, enabled=_has_bfloat16()):
                loss = _loss(model, batch, call.prompt_loss_weight, pad_id)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
            optimize(_rate(step, steps))
            model.zero_grad()
            epoch_losses.append(loss.item())
            step += 1
            progress(step, steps, f"training: loss {epoch_losses[-1]:.3f}")
    model.eval()
    return sum(epoch_losses) / len(epoch_losses)


def _optimizer(model: Any, call: TrainChatModel) -> Callable[[float], None]:
    """Return what updates the weights by their gradients, at a share of the call's learning rates."""
    import torch

    weights = dict(model.named_parameters())
    by_muon = call.attention_learning_rate is not None
    attention = [name for name, weight in weights.items() if by_muon and ".self_attn." in name and weight.ndim > 1]
    others = [weight for name, weight in weights.items() if name not in attention]
    decayed = {"params": [weight for weight in others if weight.ndim > 1], "weight_decay": call.weight_decay}
    vectors = {"params": [weight for weight in others if weight.ndim == 1], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([decayed, vectors], lr=call.learning_rate, betas=(0.9, 0.98), fused=True)
    dtype = torch.bfloat16 if _has_bfloat16() else torch.float32
    muon = Muon([weights[name] for name in attention], call.weight_decay, dtype)

    def optimize(share: float) -> None:
        for group in adamw.param_groups:
            group["lr"] = share * call.learning_rate
        adamw.step()
        muon.step(share * (call.attention_learning_rate or 0.0))

    return optimize


def _has_bfloat16() -> bool:
    """Return whether the CPU multiplies matrices faster in bfloat16; others take much longer than in float32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then linearly down to zero: the last steps settle the weights, which helps quantization."""
    warm_up = max(1, round(steps * WARM_UP_SHARE))
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def _batches(
    examples: list[tuple[list[int], int]], batch_size: int, chooser: random.Random
) -> Iterator[list[tuple[list[int], int]]]:
    """Yield every example once, in batches of similar lengths, which need little padding."""
    order = sorted(examples, key=lambda example: (len(example[0]), chooser.random()))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    chooser.shuffle(batches)
    yield from batches


def _loss(model: Any, batch: list[tuple[list[int], int]], prompt_weight: float, pad_id: int) -> Any:
    """Mean cross entropy in nats over answer tokens (weight 1) and prompt tokens (`prompt_weight`)."""
    import torch

    length = max(len(ids) for ids, _ in batch)
    # Padding on the right needs no attention mask: with causal attention no real token sees it.
    ids = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in batch])
    weights = torch.tensor(
        [[prompt_weight] * prompt + [1.0] * (len(ids) - prompt) + [0.0] * (length - len(ids)) for ids, prompt in batch]
    )[:, 1:]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * weights).sum() / weights.sum()


def _answers(checkpoint_dir: Path, rows: Sequence[Row], max_new_tokens: int) -> list[str]:
    """Return the greedy answers of the checkpoint, loaded as users load it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir, dtype=torch.float32)
    answers: list[str] = []
    for start in range(0, len(rows), EVALUATION_BATCH_ROWS):
        prompts = [_prompt(tokenizer, row) for row in rows[start : start + EVALUATION_BATCH_ROWS]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
