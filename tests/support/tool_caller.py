"""A tiny model that has learned to call two tools in Qwen3's form, by Qwen3's own template; some ten seconds of a core.

`python -m tests.support.tool_caller FOLDER` writes its checkpoint.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

STEPS = 240
ROWS_PER_STEP = 2
LEARNING_RATE = 5e-3
IGNORED_LABEL = -100
ROOMS = ("kitchen", "garage")
HEAT = 9  # always: so small a model copies nothing reliably


def _tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": f"{name}.", "parameters": parameters}}


_ROOM = {"type": "string", "enum": list(ROOMS)}
TOOLS = [_tool("set_light", room=_ROOM, on={"type": "boolean"}), _tool("get_heat", room=_ROOM)]


def exchange(chooser: random.Random) -> list[dict[str, Any]]:
    """Return a question, the call that is due, its result, and the answer."""
    room = chooser.choice(ROOMS)
    if chooser.random() < 0.5:
        name, arguments = "get_heat", {"room": room}
        question, result, answer = f"What is the heat in the {room}?", str(HEAT), f"It is {HEAT}."
    else:
        name, arguments = "set_light", {"room": room, "on": chooser.random() < 0.5}
        state = "on" if arguments["on"] else "off"
        question, result, answer = f"Turn {state} the light in the {room}.", "set", "Done."
    call = {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": result},
        {"role": "assistant", "content": answer},
    ]


def written(message: dict[str, Any]) -> str:
    """Return an assistant's message as the model writes it."""
    if not message.get("tool_calls"):
        return str(message["content"])
    called = [call["function"] for call in message["tool_calls"]]
    return "\n".join(f"<tool_call>\n{json.dumps(function)}\n</tool_call>" for function in called)


def train(folder: Path, template: str) -> None:
    """Write the checkpoint of a model that was trained on conversations of one to three exchanges."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.support.checkpoints import make_tiny_checkpoint

    torch.set_num_threads(1)
    make_tiny_checkpoint(folder, "qwen3", dtype="float32", max_position_embeddings=2048)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chooser = random.Random(0)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(STEPS):
        rows = [_row(tokenizer, chooser) for _ in range(ROWS_PER_STEP)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [IGNORED_LABEL] * (width - len(labels)) for _, labels in rows])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            sys.stderr.write(f"{step} {loss.item():.4f}\n")
    model.save_pretrained(folder)


def _row(tokenizer: Any, chooser: random.Random) -> tuple[list[int], list[int]]:
    """Return a conversation's ids and labels; the assistant's turns after the last question are learned."""
    earlier = [message for _ in range(chooser.choice((0, 1, 2))) for message in exchange(chooser)]
    ids, labels, done = list[int](), list[int](), ""
    messages = [*earlier, *exchange(chooser)]
    for index in range(len(earlier), len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:index], tools=TOOLS, tokenize=False, add_generation_prompt=True
        )
        answer = f"{written(messages[index])}<|im_end|>"
        for text, is_learned in ((prompt.removeprefix(done), False), (answer, True)):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if is_learned else [IGNORED_LABEL] * len(tokens)
        done = prompt + answer
    return ids, labels


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]).read_text("utf-8"))
