"""Facts from a checkpoint's files, each with its file and the used value."""

import json
import shutil
from pathlib import Path
from typing import Any

from slmops.infra.settings import Settings
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.checkup import check_files
from slmops.tasks.exams.statements import statements_of
from tests.tasks.chat_templates import TEMPLATES


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def test_files_that_disagree_are_shown_side_by_side(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    change(folder / "config.json", eos_token_id=0, transformers_version="4.57.1")
    change(folder / "generation_config.json", eos_token_id=[0], do_sample=True, temperature=0.7, repetition_penalty=1.1)
    template = (folder / "chat_template.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").write_text(f"{{% if true %}}\n{{% endif %}}{template}", "utf-8")
    found = statements_of(folder, inspect_checkpoint(folder), {"temperature": 0.5})
    ends = {said.read_from: (said.value, said.used) for said in found if said.name == "end of an answer"}
    assert set(ends) == {"tokenizer", "config.json", "generation_config.json", "chat template"}
    assert ends["tokenizer"][0] == ends["chat template"][0] == "<|im_end|>" != ends["config.json"][0]
    assert len({used for _, used in ends.values()}) == 1
    said = {statement.name: statement for statement in found}
    assert said["chat template"].read_from == "chat_template.jinja"
    assert said["chat template"].used.startswith("rewritten for the runtimes: ")
    assert (said["tokenizer"].value, said["tokenizer"].used) == ("trained with transformers 4.57.1", "tokenizer.json")
    assert said["embedding and lm_head"].value == "tie_word_embeddings: true"
    assert said["embedding and lm_head"].used == "one matrix for both"
    assert said["added tokens"].value.endswith(" more")
    assert "temperature: 0.7" in said["generation defaults"].value
    assert (
        said["generation defaults"].used == "judged greedily with repetition penalty 1.1; served with temperature 0.5"
    )


def test_thoughts_and_their_switch_are_shown(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    assert "thoughts" not in {said.name for said in statements_of(folder, inspect_checkpoint(folder))}
    shutil.copy2(TEMPLATES / "qwen3.jinja", folder / "chat_template.jinja")
    (said,) = [said for said in statements_of(folder, inspect_checkpoint(folder)) if said.name == "thoughts"]
    assert (said.value, said.read_from) == ("<think> ... </think>", "chat template")
    assert said.used == "answers are scored without them; a row turns them on or off (enable_thinking)"


def test_check_compares_the_prompts(tiny_checkpoint: Path, tmp_path: Path, settings: Settings) -> None:
    checks, statements = check_files(settings, str(tiny_checkpoint))
    assert [(check.name, check.ok) for check in checks if check.required != "no remarks"] == [("prompts", True)]
    assert "chat template" in {said.name for said in statements}
    assert check_files(settings, None) == ([], ())
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content|upper }}{% endfor %}", "utf-8")
    prompts = check_files(settings, str(folder))[0][0]
    assert not prompts.ok and "there is no filter upper" in prompts.found
