"""A checkpoint's templates before the build: what would keep its variants from serving ends the deploy."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slmops.infra.checkpoints.folder import read_chat_template
from slmops.infra.errors import BadInput
from slmops.infra.settings import Settings
from slmops.infra.storage.opening import open_registry
from slmops.tasks.exams.early_parity import check_templates, parity_of, tool_conversations, users_conversations
from slmops.tasks.exams.template_parity import TemplateParity
from slmops.tasks.questions.evaluation_set import EvaluationRow
from slmops.tasks.questions.tool_chats import tool_chats
from slmops.tasks.questions.tool_prompts import form_for
from slmops.tasks.workshop import Workshop, working_in
from tests.support.errors import coded
from tests.support.family_tokenizers import FAMILIES, save_tokenizer
from tests.support.real_models import real_model


def asked(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


def differing(parity: TemplateParity) -> list[str]:
    return [mismatch.conversation for mismatch in parity.mismatches]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = save_tokenizer(tmp_path / "checkpoint", FAMILIES["qwen3"])
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}), "utf-8")
    return folder


def test_rare_characters_reject_only_where_the_user_has_them(settings: Settings) -> None:
    # SmolLM2's tokenizer takes every numeric character apart, the runtimes ASCII's digits alone.
    smollm2 = real_model("smollm2")
    plain = {f"calibration chat {number}": asked(f"Add {number} and 2.") for number in range(199)}
    rare = {"calibration chat 199": asked("Take ½ of it.")}
    parity = parity_of(smollm2, plain | rare, settings)
    assert parity.holds, parity.cause
    assert any("split rare characters into other tokens" in note and "'right-to-left'" in note for note in parity.notes)
    both = {"row 7": asked("Take ½ of it."), "row 8": asked("Take 1/2 of it."), "calibration chat 0": asked("And ²?")}
    parity = parity_of(smollm2, both, settings)
    assert differing(parity) == ["row 7", "calibration chat 0"]
    assert parity.cause.startswith("onnxruntime-genai gives other tokens for 'row 7' and 1 more: ")


def test_what_no_runtime_renders_is_reported_before_a_build(checkpoint: Path, settings: Settings) -> None:
    template = "{% for message in messages %}<|im_start|>{{ message.content|upper }}<|im_end|>{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template, "utf-8")
    prepared: Any = SimpleNamespace(folder=checkpoint, origin="./home", inspection=SimpleNamespace(kind="checkpoint"))
    with working_in(Workshop(settings, open_registry(settings))):
        with pytest.raises(BadInput, check=coded("template-parity", "there is no filter upper", "slmops check ./home")):
            check_templates.fn(prepared, ())
        shutil.rmtree(checkpoint)  # it was compared before
        checkpoint.mkdir()
        prepared.inspection.kind = "genai"
        check_templates.fn(prepared, ())


def test_a_difference_can_be_allowed_and_a_row_that_is_refused_cannot(checkpoint: Path, settings: Settings) -> None:
    template = (
        "{% for message in messages %}{{ raise_exception('no!') if '!' in message.content }}a{% endfor %}{{ 3 / 2 }}"
    )
    (checkpoint / "chat_template.jinja").write_text(template, "utf-8")
    prepared: Any = SimpleNamespace(folder=checkpoint, origin="./home", inspection=SimpleNamespace(kind="checkpoint"))
    rows = [EvaluationRow.model_validate({"id": 1, "messages": asked("Stop!")})]
    with working_in(Workshop(settings, open_registry(settings))):
        check_templates.fn(prepared, (), None, ("template_parity",))
        with pytest.raises(BadInput, check=coded("row-does-not-render", "row 1", "no!")):
            check_templates.fn(prepared, rows)


def with_tools(folder: Path, settings: Settings) -> TemplateParity:
    """Compare the built-in conversations with tools, as a deploy with rows with tools does."""
    template = read_chat_template(folder)
    rows = tuple(tool_chats().values())[:1]
    assert form_for(template, rows)
    asked = tool_conversations(rows, template)
    assert {"parallel calls", "row tools on offer"} <= set(asked)
    return parity_of(folder, {}, settings, with_tools=asked)


def test_prompts_with_tools_have_the_same_tokens(tmp_path: Path, settings: Settings) -> None:
    folder = tmp_path / "qwen3"
    shutil.copytree(real_model("tokenizers/qwen3"), folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3"}), "utf-8")
    parity = with_tools(folder, settings)
    assert parity.holds, parity.cause
    template = (read_chat_template(folder) or "").replace("tool | tojson", "tool.function.name|upper")
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    assert "row tools on offer" in differing(with_tools(folder, settings))


def test_rows_with_tools_are_refused_before_a_build(checkpoint: Path, settings: Settings) -> None:
    (checkpoint / "chat_template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    prepared: Any = SimpleNamespace(folder=checkpoint, origin="./home", inspection=SimpleNamespace(kind="genai"))
    with (
        working_in(Workshop(settings, open_registry(settings))),
        pytest.raises(BadInput, check=coded("template-without-tools", "tools on offer")),
    ):
        check_templates.fn(prepared, tuple(tool_chats().values()))


def test_a_row_that_switches_thoughts_needs_a_template_with_a_switch(checkpoint: Path, settings: Settings) -> None:
    row = EvaluationRow.model_validate({"id": "at once", "messages": asked("Hello?"), "enable_thinking": False})
    prepared: Any = SimpleNamespace(folder=checkpoint, origin="./home", inspection=SimpleNamespace(kind="genai"))
    with working_in(Workshop(settings, open_registry(settings))):
        check_templates.fn(prepared, (row,))  # Qwen3's template has one
        (checkpoint / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn.content }}{% endfor %}")
        with pytest.raises(BadInput, check=coded("template-without-switch", "at once")):
            check_templates.fn(prepared, (row,))


def test_calibration_chats_are_compared_up_to_their_answers(tmp_path: Path) -> None:
    chat = {"messages": [*asked("Hello?"), {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "calibration.jsonl").write_text(json.dumps(chat) + "\n", "utf-8")
    found = users_conversations((), str(tmp_path / "calibration.jsonl"))
    assert found == {"calibration chat 1": asked("Hello?")}
