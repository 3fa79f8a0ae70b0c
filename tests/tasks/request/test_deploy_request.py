"""A deploy's request is checked before anything is written."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.infra.errors import BadInput
from slmops.tasks.plan import parse_request
from slmops.tasks.request.deploy_request import (
    DeployRequest,
    check_output,
    check_precisions,
    read_chat_template_file,
)
from slmops.tasks.request.parameters import PRECISIONS
from tests.support.checkpoints import CHAT_TEMPLATES
from tests.support.errors import coded

ALLOWED = "abcdefghijklmnopqrstuvwxyz0123456789-"


def parse(**parameters: Any) -> DeployRequest:
    return parse_request({"checkpoint": "here", "name": "home", **parameters})


class TestNames:
    @pytest.mark.parametrize(
        "name",
        ["", "..", ".", "a/b", "a\\b", "a b", "a:b", "a@1", "-a", "A", "ä", "東京", "a\n", "\na", "a\0", "a_b", "a.b",
         "a" * 64, "a" * 300, " a", "٣"],
    )  # fmt: skip
    def test_these_are_refused(self, name: str) -> None:
        with pytest.raises(BadInput, check=coded("name-not-valid")) as caught:
            parse(name=name)
        assert len(caught.value.message) < 200
        assert "\n" not in caught.value.message
        assert "lower-case letters" in caught.value.what_to_do

    @given(st.one_of(st.text(max_size=80), st.text(ALLOWED, max_size=70), st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}\n?")))
    def test_only_names_of_the_contract_pass(self, name: str) -> None:
        if 1 <= len(name) <= 63 and all(letter in ALLOWED for letter in name) and name[0] != "-":
            assert parse(name=name).name == name
        else:
            with pytest.raises(BadInput):
                parse(name=name)


class TestPrecisions:
    def test_all_by_default_and_each_once_in_the_order_given(self) -> None:
        assert parse().precisions == PRECISIONS == ("fp16", "int8", "int4")
        assert parse(precisions=["int4", "fp16", "int4"]).precisions == ("int4", "fp16")

    @pytest.mark.parametrize("precision", ["int3", "INT4", "fp32", "", "int4 "])
    def test_an_unknown_one_is_named(self, precision: str) -> None:
        with pytest.raises(BadInput, check=coded("precision-unknown", repr(precision))) as caught:
            parse(precisions=["int4", precision])
        assert "fp16, int8, int4" in caught.value.what_to_do
        with pytest.raises(BadInput):
            check_precisions([precision])

    def test_none_is_refused(self) -> None:
        with pytest.raises(BadInput, check=coded("precision-not-named")):
            parse(precisions=[])


class TestDevices:
    @pytest.mark.parametrize(
        ("device", "provider"), [("cpu", "cpu"), ("gpu", "cuda"), ("gpu", "dml"), ("gpu", "webgpu")]
    )
    def test_these_go_together(self, device: str, provider: str) -> None:
        assert parse(device=device, execution_provider=provider).device == device

    @pytest.mark.parametrize(
        ("device", "provider", "refused"),
        [
            ("gpu", "cpu", coded("provider-of-other-device", "'cpu'", "'gpu'")),
            ("cpu", "cuda", coded("provider-of-other-device", "'cuda'", "'cpu'")),
            ("npu", "cpu", coded("no-recipe-for-npu")),
            ("tpu", "cpu", coded("parameter-not-valid", "device: ", "found 'tpu'")),
            ("cpu", "tensorrt", coded("parameter-not-valid", "execution_provider: ", "found 'tensorrt'")),
        ],
    )
    def test_these_do_not(self, device: str, provider: str, refused: coded) -> None:
        with pytest.raises(BadInput, check=refused) as caught:
            parse(device=device, execution_provider=provider)
        assert caught.value.what_to_do


@pytest.mark.parametrize("option", ["quick", "search", "promote"])
def test_what_is_only_built_cannot_be_looked_at_searched_or_promoted(option: str) -> None:
    with pytest.raises(BadInput, check=coded("build-only-asks-for-more", f"--{option}")):
        parse(build_only=True, **{option: True})


BOUNDS = {
    "min_top1_agreement": (0, 1),
    "max_quality_loss": (0, 1),
    "temperature": (0, 2),
    "top_p": (0.001, 1),
    "repetition_penalty": (0.1, 2),
}


class TestRanges:
    @given(st.sampled_from(sorted(BOUNDS)), st.floats())
    def test_only_values_in_range_pass(self, name: str, value: float) -> None:
        lowest, highest = BOUNDS[name]
        if lowest <= value <= highest:
            assert getattr(parse(**{name: value}), name) == value
        else:
            with pytest.raises(BadInput, check=coded("parameter-out-of-range", name)):
                parse(**{name: value})

    @given(st.floats())
    def test_a_threshold_of_divergence_is_a_finite_number(self, value: float) -> None:
        if 0 <= value < float("inf"):
            assert parse(max_kl_divergence=value).max_kl_divergence == value
        else:
            with pytest.raises(BadInput, check=coded("parameter-out-of-range", "max_kl_divergence")):
                parse(max_kl_divergence=value)

    @pytest.mark.parametrize(
        ("value", "code"),
        [
            *((value, "parameter-out-of-range") for value in (0, -1, 10**9)),
            *((value, "parameter-not-valid") for value in (1.5, "many")),
        ],
    )
    def test_a_length_is_a_positive_integer(self, value: Any, code: str) -> None:
        with pytest.raises(BadInput, check=coded(code, "max_length")):
            parse(max_length=value)

    def test_generation_defaults_are_those_given(self) -> None:
        assert parse().generation_defaults == {}
        assert parse(temperature=0.0, max_length=99).generation_defaults == {"max_length": 99, "temperature": 0.0}

    def test_an_unknown_parameter_is_refused(self) -> None:
        with pytest.raises(BadInput, check=coded("parameter-not-valid", "temprature")):
            parse(temprature=0.5)


class TestChatTemplateFile:
    @pytest.mark.parametrize("template", [*CHAT_TEMPLATES.values(), "{% generation %}x{% endgeneration %}{% break %}"])
    def test_what_hugging_face_writes_is_read(self, template: str, tmp_path: Path) -> None:
        template = template.replace("{% break %}", "{% for x in [] %}{% break %}{% endfor %}")
        path = tmp_path / "chat.jinja"
        path.write_text(template, "utf-8", newline="\n")
        assert read_chat_template_file(path) == template
        assert parse(chat_template_file=str(path)).chat_template_file == str(path)

    def test_the_marks_of_windows_editors_are_no_part_of_it(self, tmp_path: Path) -> None:
        (tmp_path / "chat.jinja").write_bytes(b"\xef\xbb\xbf{{ 'a' }}\r\nb")
        assert read_chat_template_file(tmp_path / "chat.jinja") == "{{ 'a' }}\nb"

    @pytest.mark.parametrize(
        ("content", "refused"),
        [
            (b"\n{% for message in messages %}", coded("chat-template-not-jinja", ", line 2")),
            (b"{{ messages[ }}", coded("chat-template-not-jinja")),
            (b"{% unknown %}", coded("chat-template-not-jinja")),
            (b"\xff\xfe{", coded("chat-template-not-utf8")),
            (b"", coded("chat-template-empty")),
            (b" \n", coded("chat-template-empty")),
        ],
    )
    def test_what_is_no_template_is_refused(self, content: bytes, refused: coded, tmp_path: Path) -> None:
        (tmp_path / "chat.jinja").write_bytes(content)
        with pytest.raises(BadInput, check=refused):
            parse(chat_template_file=str(tmp_path / "chat.jinja"))

    def test_a_missing_file_and_a_folder_are_refused(self, tmp_path: Path) -> None:
        for path in (tmp_path / "gone.jinja", tmp_path):
            with pytest.raises(BadInput, check=coded("chat-template-unreadable")):
                parse(chat_template_file=str(path))


class TestOutput:
    def test_it_is_new_or_empty(self, tmp_path: Path) -> None:
        check_output(tmp_path / "new")
        (tmp_path / "empty").mkdir()
        check_output(tmp_path / "empty")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        with pytest.raises(BadInput, check=coded("output-not-empty")):
            parse(output=str(tmp_path / "full"))
        assert not (tmp_path / "new").exists()

    def test_a_file_and_a_folder_below_one_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for output in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
            with pytest.raises(BadInput, check=coded("output-is-file")):
                parse(output=str(output))
