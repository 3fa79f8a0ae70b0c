"""lm-eval tasks on local files, and a checkpoint whose tokenizer puts a begin token before every text."""

import json
from pathlib import Path

QUESTIONS = [
    {"question": "Turn on the lights in the", "choices": ["kitchen", "bedroom", "lazy dog"], "answer": 0},
    {"question": "The capital of France is", "choices": ["Paris", "a quick fox", "345"], "answer": 0},
    {"question": "The quick brown fox jumps over the", "choices": ["models", "lazy dog", "kitchen"], "answer": 1},
    {"question": "Set the bedroom temperature to", "choices": ["Paris", "21", "fox"], "answer": 1},
    {"question": "Übergrößen, naïve", "choices": ["café", "東京", "Ελλάδα"], "answer": 2},
    {"question": "You answer with", "choices": ["JSON", "def add", "dog"], "answer": 0},
]

MULTIPLE_CHOICE = """
task: house_choice
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 2.0}
"""
GENERATION = """
task: house_answer
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: house_text
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


def write_tasks(folder: Path) -> Path:
    """Write the three tasks and their questions into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(lines), "utf-8")
    for name, content in (("choice", MULTIPLE_CHOICE), ("answer", GENERATION), ("text", ROLLING)):
        (folder / f"{name}.yaml").write_text(content, "utf-8")
    return folder


def add_begin_token(checkpoint: Path, token: str) -> Path:
    """Let a checkpoint's tokenizer put `token` before every text, as Llama's does."""
    path = checkpoint / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    token_id = next(added_token["id"] for added_token in content["added_tokens"] if added_token["content"] == token)
    special, first, second = {"SpecialToken": {"id": token, "type_id": 0}}, {"id": "A", "type_id": 0}, {"id": "B"}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": first}],
        "pair": [special, {"Sequence": first}, {"Sequence": {**second, "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
    path.write_text(json.dumps(content), "utf-8")
    return checkpoint
