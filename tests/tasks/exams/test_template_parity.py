import json
import re
import shutil
import unicodedata
from dataclasses import replace

import pytest

from slmops.infra.errors import StageFailed
from slmops.infra.genai.served_files import mend_files
from slmops.infra.storage.manifest import Source
from slmops.infra.storage.opening import open_registry
from slmops.tasks.exams.exam import Bench, examine
from slmops.tasks.exams.template_parity import ParityExam, TemplateParity, check_parity
from slmops.tasks.questions.chats import CONVERSATIONS, MARKS, NOTED_ONLY
from slmops.tasks.workshop import Workshop, working_in
from tests.support.checkpoints import make_tiny_checkpoint
from tests.support.errors import coded
from tests.support.family_tokenizers import FAMILIES, save_tokenizer, save_variant
from tests.support.genai_models import build_genai_model
from tests.support.versions import evidence, stored_variant

SYSTEM = ["system and user", "several turns with system"]
JUDGED = [name for name in CONVERSATIONS if name not in NOTED_ONLY]
DATED = {"llama-3.2", "smollm3", "granite"}
# The conversations of which inference_model.json's static strings make another prompt than the template.
OTHERWISE = {
    **dict.fromkeys(
        ["qwen2.5", "llama-3.2", "smollm3", "granite"], "all but system and user, several turns with system"
    ),
    **dict.fromkeys(["llama-3", "gemma-2"], "white space around"),
    **dict.fromkeys(["mistral-v0.3", "gemma-3"], "system and user, several turns with system, white space around"),
    "mistral-v0.1": "system and user, several turns with system",
    "qwen3": "thoughts in the history",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    directory = tmp_path_factory.mktemp("built")
    return build_genai_model(make_tiny_checkpoint(directory / "checkpoint", "llama"), directory / "model")


class Case:
    """A checkpoint's tokenizer and a variant of it, both the test's own, to damage and to check."""

    def __init__(self, directory, built, settings, family):
        self.settings, self.directory = settings, directory
        self.checkpoint = save_tokenizer(directory / "checkpoint", family)
        self.variant = save_variant(directory / "variant", built, self.checkpoint)
        mend_files(self.variant, self.checkpoint)

    def check(self, *, with_checkpoint=True) -> TemplateParity:
        work = self.directory / "work"
        shutil.rmtree(work, ignore_errors=True)
        return check_parity(self.settings, Bench(self.variant, work), self.checkpoint if with_checkpoint else None)

    def set_template(self, template, folder=None):
        ((folder or self.variant) / "chat_template.jinja").write_text(template, "utf-8")

    def template(self):
        return (self.variant / "chat_template.jinja").read_text("utf-8")

    def edit(self, file, change):
        content = json.loads((self.variant / file).read_text("utf-8"))
        change(content)
        (self.variant / file).write_text(json.dumps(content), "utf-8")


@pytest.fixture
def case(tmp_path, built, settings, torch_stays):
    def make(family="qwen2.5"):
        return Case(tmp_path, built, settings, FAMILIES[family] if isinstance(family, str) else family)

    return make


def names_of(parity, runtime="genai"):
    return [mismatch.conversation for mismatch in parity.mismatches if mismatch.runtime == runtime]


def mentions(parity, text):
    return any(text in note for note in parity.notes)


def test_conversations_are_what_the_check_needs():
    for name, messages in CONVERSATIONS.items():
        assert messages[-1]["role"] == "user"
        text = "".join(message["content"] for message in messages)
        assert bool(re.search(MARKS, text)) == (name == "thoughts in the history")
        assert unicodedata.is_normalized("NFC", text) == (name != "letters with separate marks")
    assert set(NOTED_ONLY) < set(CONVERSATIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_runtimes_agree_on_a_family(case, family):
    parity = case(family).check()
    assert parity.broken_control_tokens == ()
    assert parity.holds, parity.mismatches
    refused = SYSTEM if FAMILIES[family].refuses_system else []
    assert parity.conversations == len(CONVERSATIONS) - len(refused)
    assert mentions(parity, "System role not supported): system and user, several turns with system.") == bool(refused)
    assert mentions(parity, "writes the date") == (family in DATED)
    plain = ", ".join(FAMILIES[family].plain_marks)
    assert mentions(parity, "look like control tokens") == bool(plain)
    assert mentions(parity, plain)
    otherwise = f"other prompts than the chat template: {OTHERWISE.get(family)}."
    assert mentions(parity, "PromptTemplate gives") == mentions(parity, otherwise) == (family in OTHERWISE)
    assert mentions(parity, "Unicode normalization is not applied") == (FAMILIES[family].kind == "qwen")


@pytest.mark.parametrize(
    ("family", "begins", "why"),
    [
        (
            "llama-3",
            False,
            "the strings have no <|begin_of_text|>, and the tokenizer adds none by itself (all but white",
        ),
        ("phi-3", True, "the tokenizer adds a begin token that the template does not write (all conversations)."),
    ],
)
def test_a_begin_token_that_static_strings_do_not_have_is_reported(case, family, begins, why):
    parity = case(replace(FAMILIES[family], begins=begins)).check()
    assert parity.holds
    assert mentions(parity, f"gives the chat template's text, but other tokens: {why}")


def test_a_swapped_template_is_caught_with_both_strings(case):
    swapped = case("chatml")
    swapped.set_template(swapped.template().replace("'<|im_end|>' + '\\n'", "'<|im_end|>'"))
    parity = swapped.check()
    assert not parity.holds
    assert names_of(parity) == names_of(parity, "foundry") == JUDGED
    genai, foundry = parity.mismatches[:2]
    question = "What is the capital of France?"
    assert genai.expected == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert genai.found == f"<|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"
    assert genai.found_tokens == genai.expected_tokens - 1 == foundry.found_tokens
    assert foundry.expected == genai.expected
    assert foundry.found.startswith("(Foundry Local tells only the number of tokens;")
    assert foundry.found.endswith(genai.found)
    assert not mentions(parity, "normalization")
    assert not parity.broken_control_tokens


def test_a_control_token_that_is_missing_in_the_variant_is_caught(case):
    damaged = case()

    def remove(tokenizer):
        tokenizer["added_tokens"] = [
            added_token for added_token in tokenizer["added_tokens"] if added_token["content"] != "<|im_end|>"
        ]

    damaged.edit("tokenizer.json", remove)
    parity = damaged.check()
    assert parity.broken_control_tokens == ("<|im_end|>",)
    assert names_of(parity) == names_of(parity, "foundry") == JUDGED
    first = parity.mismatches[0]
    text, _, ids = first.expected.partition("\n(tokens ")
    assert first.found.startswith(f"{text}\n(tokens ") and not first.found.endswith(ids)
    assert first.found_tokens > first.expected_tokens


def test_a_control_token_with_another_id_is_caught(case):
    damaged = case()

    def swap(tokenizer):
        start, end = (
            added_token
            for added_token in tokenizer["added_tokens"]
            if added_token["content"] in ("<|im_start|>", "<|im_end|>")
        )
        start["id"], end["id"] = end["id"], start["id"]

    damaged.edit("tokenizer.json", swap)
    parity = damaged.check()
    assert sorted(parity.broken_control_tokens) == ["<|im_end|>", "<|im_start|>"]
    assert names_of(parity) == JUDGED
    assert names_of(parity, "foundry") == []  # the number of tokens is the same


def test_a_begin_token_written_twice_is_caught(case):
    doubled = case("llama-3.2")
    doubled.set_template("{{- bos_token }}" + doubled.template())
    parity = doubled.check()
    assert names_of(parity) == names_of(parity, "foundry") == JUDGED
    assert parity.mismatches[0].found.startswith("<|begin_of_text|>" * 2 + "<|start_header_id|>")
    assert not parity.mismatches[0].expected.startswith("<|begin_of_text|>" * 2)


def test_a_template_beyond_genais_jinja_is_a_mismatch_with_its_error(case):
    beyond = case()
    template = "{% for message in messages %}{{ message.content | center(40) }}{% endfor %}<|im_end|>"
    for folder in (beyond.checkpoint, beyond.variant):
        beyond.set_template(template, folder)
    parity = beyond.check()
    assert names_of(parity) == names_of(parity, "foundry") == list(JUDGED)
    genai, foundry = parity.mismatches[:2]
    assert (genai.found_tokens, foundry.found_tokens) == (0, 0)
    assert genai.found.startswith("Value is not callable")
    assert foundry.found.startswith("Foundry Local cannot")
    assert genai.expected_tokens > 0


def test_lines_of_blocks_that_genai_does_not_trim_are_caught(case):
    # transformers removes the new line behind a block, genai leaves it.
    beyond = case("zephyr")
    for folder in (beyond.checkpoint, beyond.variant):
        beyond.set_template(beyond.template().replace("-%}", "%}").replace("{%-", "{%"), folder)
    parity = beyond.check()
    assert names_of(parity) == JUDGED
    first = parity.mismatches[0]
    assert first.found != first.expected
    assert first.found.split() == first.expected.split()


def test_a_tokenizer_that_genai_cannot_open_is_a_mismatch(case):
    damaged = case()
    named = [{"name": "default", "template": damaged.template()}]
    damaged.edit("tokenizer_config.json", lambda config: config.update(chat_template=named))
    parity = damaged.check()
    assert names_of(parity) == JUDGED
    assert names_of(parity, "foundry") == []
    assert all(mismatch.found.startswith("The tokenizer cannot be opened: ") for mismatch in parity.mismatches)
    assert parity.broken_control_tokens == ()


def test_two_templates_in_one_folder_are_caught_without_a_checkpoint(case):
    both = case("chatml")
    other = both.template().replace("'assistant\\n'", "'assistant: '").replace("assistant\\n", "assistant:")
    both.edit("tokenizer_config.json", lambda config: config.update(chat_template=other))
    parity = both.check(with_checkpoint=False)
    assert parity.notes[0].startswith("There is no source checkpoint")
    assert names_of(parity) == JUDGED
    assert mentions(parity, "tokenizer_config.json and chat_template.jinja have different templates")


def test_a_variant_without_a_template_is_caught(case):
    missing = case("chatml")
    (missing.variant / "chat_template.jinja").unlink()
    parity = missing.check()
    assert names_of(parity) == JUDGED
    assert parity.mismatches[0].found == "Empty chat template"
    assert mentions(parity, "There are no strings for inference_model.json")


def test_the_time_of_day_in_a_template_is_no_mismatch(case):
    timed = case("chatml")
    template = "{{ strftime_now('%A %d %B %Y, %H:%M:%S') }}\n" + timed.template()
    for folder in (timed.checkpoint, timed.variant):
        timed.set_template(template, folder)
    parity = timed.check()
    assert parity.holds, parity.mismatches[0]
    assert mentions(parity, "writes the date")
    timed.set_template(template.replace("%d", "%e."))
    assert names_of(timed.check()) == JUDGED


def test_a_template_that_renders_nothing_in_transformers_is_a_failed_stage(case):
    refusing = case("chatml")
    refusing.set_template("{{ raise_exception('Not today.') }}", refusing.checkpoint)
    with pytest.raises(StageFailed, check=coded("chat-template-does-not-render", ": Not today.")):
        refusing.check()


def test_a_tokenizer_that_transformers_cannot_load_is_a_failed_stage(case):
    damaged = case("chatml")
    (damaged.checkpoint / "tokenizer.json").write_text("{", "utf-8")
    with pytest.raises(StageFailed, check=coded("tokenizer-does-not-load")):
        damaged.check()


def test_a_tokenizer_that_transformers_rebuilds_is_compared_with_its_file(case):
    # transformers 5's LlamaTokenizer puts a space before the first text only, the file before every one.
    parity = case(replace(FAMILIES["mistral-v0.3"], tokenizer_class="LlamaTokenizer")).check()
    assert parity.holds, parity.mismatches[0]
    assert mentions(parity, "LlamaTokenizer in transformers 5 splits texts differently from tokenizer.json")


def test_variants_with_the_same_tokenizer_are_compared_once(case, settings):
    made, registry = case("chatml"), open_registry(settings)
    variants = [stored_variant(registry, made.variant, "int4")]
    (made.variant / "notes.txt").write_text("another weight", "utf-8")
    variants.append(stored_variant(registry, made.variant, "int8"))
    made.set_template(made.template() + " ")
    variants.append(stored_variant(registry, made.variant, "fp16"))
    source = Source(digest="a" * 64, origin="here", architecture="LlamaForCausalLM", parameters=1)
    manifest, _ = registry.commit("home", source, {"olive-ai": "0.13"}, variants)

    def compared(precision, checkpoint):
        with working_in(Workshop(settings, registry)):
            return examine.fn(ParityExam(checkpoint), registry.of(manifest).variant(precision))

    own = compared("int4", None)
    assert own.holds and "no source checkpoint" in own.notes[0]
    first = compared("int4", made.checkpoint)
    assert first.holds and not mentions(first, "no source checkpoint")
    (made.checkpoint / "tokenizer.json").write_text("{", "utf-8")  # nothing can be compared any more
    for checkpoint in (made.checkpoint, None):
        assert compared("int8", checkpoint) == first
    with pytest.raises(StageFailed, check=coded("tokenizer-does-not-load")):
        compared("fp16", made.checkpoint)
    assert len(list(evidence(registry, manifest, "parity"))) == 2
    assert not list((settings.cache_dir / "work").iterdir())
