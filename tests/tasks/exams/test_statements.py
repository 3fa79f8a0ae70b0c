"""Facts from a checkpoint's files, each with its file and the used value."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.tasks.checkpoint.from_gguf import from_gguf
from slmops.tasks.checkpoint.inspection import inspect_checkpoint
from slmops.tasks.checkup import check_files
from slmops.tasks.exams.statements import Statement, statements_of
from slmops.tasks.plan import plan_deploy
from tests.infra.gguf.test_file import write_gguf
from tests.support.errors import coded
from tests.tasks.chat_templates import TEMPLATES
from tests.tasks.checkpoint.test_adapter_base import adapter_of


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


def planned(settings: Settings, checkpoint: Path, **parameters: Any) -> tuple[Statement, ...]:
    """What the dry run shows."""
    return plan_deploy(settings, {"checkpoint": str(checkpoint), "name": "tiny", **parameters}).statements


def with_tokenizer(adapter: Path, base: Path) -> Path:
    """An adapter that was saved with the tokenizer of its base, and a template of its own."""
    for path in (*base.glob("tokenizer*"), base / "generation_config.json"):
        shutil.copy2(path, adapter)
    shutil.copy2(TEMPLATES / "qwen3.jinja", adapter / "chat_template.jinja")
    return adapter


def test_an_adapters_plan_shows_the_merged_model(tiny_checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path / "adapter", str(tiny_checkpoint))
    found = planned(settings, adapter)
    assert found == check_files(settings, str(adapter))[1]
    first, *others = found
    assert (first.read_from, first.used) == ("adapter_config.json", f"merged into {tiny_checkpoint}")
    of_base = statements_of(tiny_checkpoint, inspect_checkpoint(tiny_checkpoint))
    assert [(said.name, said.value, said.used) for said in others] == [
        (said.name, said.value, said.used) for said in of_base
    ]
    assert {said.read_from for said in others} == {
        said.read_from if said.read_from == "-" else f"{said.read_from} of the base" for said in of_base
    }


def test_an_adapters_own_tokenizer_is_shown_as_its(tiny_checkpoint: Path, settings: Settings, tmp_path: Path) -> None:
    adapter = with_tokenizer(adapter_of(tmp_path / "adapter", str(tiny_checkpoint)), tiny_checkpoint)
    change(adapter / "generation_config.json", temperature=0.123)  # transformers saves the base's
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8-sig"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}), "utf-8")
    said = {statement.name: statement for statement in planned(settings, adapter)}
    assert said["chat template"].read_from == "chat_template.jinja of the adapter"
    assert said["thoughts"].read_from == "chat template of the adapter"
    assert said["tokenizer"].used == "tokenizer.json"
    assert said["embedding and lm_head"].read_from == "config.json of the base"
    assert said["embedding and lm_head"].used == "separate matrices: the adapter changes one of the two"
    assert "0.123" not in said["generation defaults"].value


def test_an_adapter_whose_base_is_elsewhere_shows_its_own_files(
    tiny_checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    adapter = with_tokenizer(adapter_of(tmp_path / "adapter", "s3://models/base"), tiny_checkpoint)
    plan = plan_deploy(settings, {"checkpoint": str(adapter), "name": "tiny"})
    assert plan.statements == check_files(settings, str(adapter))[1]
    assert {said.read_from.partition(" of the ")[2] for said in plan.statements[1:]} == {"adapter"}
    assert {said.name for said in plan.statements} >= {"adapter", "end of an answer", "chat template", "added tokens"}
    assert "The adapter's base is fetched first: what its files say is known after that." in plan.warnings


def test_a_gguf_files_plan_shows_what_it_is_converted_to(settings: Settings, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf", **{"tokenizer.ggml.eos_token_id": 3})
    found = planned(settings, file)
    assert not settings.home.exists()
    assert found == statements_of(from_gguf(file, settings), inspect_checkpoint(file))
    said = {statement.name: statement for statement in found}
    assert said["end of an answer"].read_from.startswith("tokenizer.ggml.eos_token_id")
    assert said["chat template"].read_from == "tokenizer.chat_template"
    assert (said["weights"].value, said["weights"].used) == ("F32", "as they are")
    assert said["embedding and lm_head"].used == "one matrix for both"


@pytest.mark.parametrize("kind", ["checkpoint", "adapter", "gguf"])
def test_the_users_template_is_shown_in_place_of_the_own(
    kind: str, tiny_checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    source = tiny_checkpoint
    if kind == "adapter":
        source = adapter_of(tmp_path / "adapter", str(tiny_checkpoint))
    elif kind == "gguf":
        source = write_gguf(tmp_path / "model.gguf")
    given = tmp_path / "given.jinja"
    given.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", "utf-8")
    before = (tiny_checkpoint / "chat_template.jinja").read_text("utf-8")
    (said,) = [
        said for said in planned(settings, source, chat_template_file=str(given)) if said.name == "chat template"
    ]
    assert (said.value, said.read_from) == (f"{len(given.read_text('utf-8'))} characters", "--chat-template")
    assert (tiny_checkpoint / "chat_template.jinja").read_text("utf-8") == before


def test_an_adapter_without_a_template_is_refused_before_the_merge(
    tiny_checkpoint: Path, settings: Settings, tmp_path: Path
) -> None:
    adapter = with_tokenizer(adapter_of(tmp_path / "adapter", str(tiny_checkpoint)), tiny_checkpoint)
    (adapter / "chat_template.jinja").unlink()
    with pytest.raises(BadInput, check=coded("chat-template-missing", "--chat-template")):
        planned(settings, adapter)
