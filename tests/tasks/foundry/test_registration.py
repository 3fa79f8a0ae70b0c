import pytest
from jinja2.sandbox import SecurityError

from slmops.infra.checkpoints import rendering
from slmops.infra.checkpoints.chat_template import chat_template_renderer
from slmops.infra.checkpoints.rendering import rendered_in_child
from slmops.infra.checkpoints.thinking_switch import thinking_switch
from slmops.infra.errors import BadInput
from slmops.infra.genai.template_files import mend_template
from slmops.tasks.foundry.ids import champion_model_id, foundry_model_id
from slmops.tasks.foundry.prompt_template import (
    derive_prompt_template,
    generation_defaults,
    inference_model,
)
from tests.support.checkpoints import BEGIN_AND_END_TOKENS
from tests.support.errors import coded
from tests.tasks.chat_templates import FAMILIES, TEMPLATES

CHATML = {
    "system": "<|im_start|>system\n{Content}<|im_end|>\n",
    "user": "<|im_start|>user\n{Content}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{Content}<|im_end|>\n",
    "prompt": "<|im_start|>user\n{Content}<|im_end|>\n<|im_start|>assistant\n",
}
LLAMA = {
    "system": "<|start_header_id|>system<|end_header_id|>\n\n{Content}<|eot_id|>",
    "user": "<|start_header_id|>user<|end_header_id|>\n\n{Content}<|eot_id|>",
    "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n{Content}<|eot_id|>",
    "prompt": "<|start_header_id|>user<|end_header_id|>\n\n{Content}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
GEMMA = {
    "system": None,
    "user": "<start_of_turn>user\n{Content}<end_of_turn>\n",
    "assistant": "<start_of_turn>model\n{Content}<end_of_turn>\n",
    "prompt": "<start_of_turn>user\n{Content}<end_of_turn>\n<start_of_turn>model\n",
}
EXPECTED = {
    "chatml": CHATML,
    "qwen2.5": CHATML,
    "qwen3": CHATML,
    "llama-3": LLAMA,
    "phi-3": {
        "system": "<|system|>\n{Content}<|end|>\n",
        "user": "<|user|>\n{Content}<|end|>\n",
        "assistant": "<|assistant|>\n{Content}<|end|>\n",
        "prompt": "<|user|>\n{Content}<|end|>\n<|assistant|>\n",
    },
    "mistral-v0.1": {
        "system": "{Content}\n\n",
        "user": " [INST] {Content} [/INST]",
        "assistant": " {Content}</s>",
        "prompt": " [INST] {Content} [/INST]",
    },
    "mistral-v0.3": {
        "system": "{Content}\n\n",
        "user": "[INST] {Content}[/INST]",
        "assistant": " {Content}</s>",
        "prompt": "[INST] {Content}[/INST]",
    },
    "gemma-2": GEMMA,
    "gemma-3": GEMMA | {"system": "{Content}\n\n"},
}

USER = {"role": "user", "content": "Turn on the lights"}
TURNS = [USER, {"role": "assistant", "content": '{"on": true}'}, {"role": "user", "content": "And {off}?\nPlease"}]
SYSTEM = {"role": "system", "content": "Answer with JSON."}


def template_of(family):
    begin, end = BEGIN_AND_END_TOKENS[FAMILIES[family][0]]
    return (TEMPLATES / f"{family}.jinja").read_text("utf-8"), {"bos_token": begin, "eos_token": end}


def derive(family):
    return derive_prompt_template(*template_of(family))


@pytest.mark.parametrize("family", EXPECTED)
def test_static_strings_of_a_family(family):
    assert derive(family).model_dump(exclude={"notes"}) == EXPECTED[family]


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama-3", "phi-3"])
def test_strings_without_notes_compose_the_templates_own_prompt(family):
    template = derive(family)
    assert template.notes == ()
    render = chat_template_renderer(*template_of(family))
    begin = BEGIN_AND_END_TOKENS[FAMILIES[family][0]][0] or ""
    for messages in ([USER], TURNS, [SYSTEM, USER], [SYSTEM, *TURNS]):
        assert template.compose(messages) == render(messages, True).removeprefix(begin)


@pytest.mark.parametrize(
    ("family", "notes"),
    [
        ("qwen2.5", ["You are Qwen", "differ from the template's own rendering for a single message, several turns."]),
        ("llama-3.2", ["Cutting Knowledge Date", "keep the date", "for a single message, several turns."]),
        (
            "mistral-v0.1",
            ["inside the first user message", "for a system message, a system message and several turns."],
        ),
        (
            "mistral-v0.3",
            ["inside the first user message", "for a system message, a system message and several turns."],
        ),
        ("gemma-2", ["no system role"]),
        ("gemma-3", ["inside the first user message", "for a system message, a system message and several turns."]),
    ],
)
def test_notes_say_what_the_strings_cannot_express(family, notes):
    found = derive(family).notes
    assert len(found) == len(notes)
    for note, expected in zip(found, notes, strict=True):
        assert expected in note


def test_a_dated_system_message_composes_with_todays_date():
    template, render = derive("llama-3.2"), chat_template_renderer(*template_of("llama-3.2"))
    assert "<|begin_of_text|>" + template.compose([SYSTEM, *TURNS]) == render([SYSTEM, *TURNS], True)


def test_an_end_token_behind_a_finished_conversation_is_no_part_of_a_message():
    chat_template, tokens = template_of("phi-3")
    template = derive_prompt_template(chat_template, tokens | {"eos_token": "<|endoftext|>"})
    assert template.model_dump(exclude={"notes"}) == EXPECTED["phi-3"]
    assert template.notes == ()


def test_a_template_of_one_turn_is_used_as_far_as_it_goes():
    template = derive_prompt_template("{{ '### ' + messages[0]['content'] + '\n> ' }}", {})
    assert template.prompt == "### {Content}\n> "
    assert any("no conversation of several turns" in note for note in template.notes)


@pytest.mark.parametrize(
    "chat_template",
    ["{{ 'constant' }}", "{{ raise_exception('no') }}", "{{ messages[0].text.x }}", "{{ range(9 ** 9) }}"],
)
def test_a_template_that_renders_no_user_message_is_refused(chat_template):
    with pytest.raises(BadInput, check=coded("chat-template-does-not-render")):
        derive_prompt_template(chat_template, {})


def test_the_mark_of_what_is_trained_on_changes_no_prompt():
    # As TRL's assistant_only_loss asks for it, and SmolLM3's own template has it.
    chat_template, tokens = template_of("chatml")
    marked = chat_template.replace("{{ '<|im_start|>'", "{% generation %}{{ '<|im_start|>'", 1)
    marked = marked.replace("{% endfor %}", "{% endgeneration %}{% endfor %}", 1)
    assert marked.count("generation %}") == 2
    assert derive_prompt_template(marked, tokens) == derive_prompt_template(chat_template, tokens)


def test_a_template_that_is_not_jinja_is_refused():
    with pytest.raises(BadInput, check=coded("chat-template-not-jinja", "line 2")):
        derive_prompt_template("\n{% for %}", {})


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_render_as_transformers_renders_them(family):
    from transformers.utils.chat_template_utils import render_jinja_template

    chat_template, tokens = template_of(family)
    render = chat_template_renderer(chat_template, tokens)
    conversations = [[USER], TURNS] + ([[SYSTEM, *TURNS]] if FAMILIES[family][1] else [])
    known = {key: token for key, token in tokens.items() if token}
    for generation in (True, False):
        expected, _ = render_jinja_template(
            conversations=conversations, chat_template=chat_template, add_generation_prompt=generation, **known
        )
        assert [render(messages, generation) for messages in conversations] == expected


def test_a_template_runs_in_a_sandbox():
    render = chat_template_renderer("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    with pytest.raises(SecurityError):
        render([USER], True)
    with pytest.raises(OverflowError):
        chat_template_renderer("{% for i in range(10 ** 9) %}{% endfor %}", {})([USER], True)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
PLAIN = "{{ messages[0]['content'] }}"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (ENDLESS, "2 s"),
        ("{{ 7 ** 99999999 ** 9 }}", "2 s"),  # evaluated by Jinja's compiler
        (f"{{% if messages|length > 1 %}}{ENDLESS}{{% endif %}}{PLAIN}", "2 s"),  # in one conversation only
        (DOUBLED, "memory"),
        ("{{ 'a' * 9999999 }}" + PLAIN, "characters"),
    ],
)
def test_a_template_that_loops_or_grows_is_stopped(monkeypatch, template, what):
    monkeypatch.setattr(rendering, "DEADLINE_S", 2.0 if what == "2 s" else 60.0)
    with pytest.raises(BadInput, check=coded("chat-template-unbounded", f"more than {'' if what != '2 s' else what}")):
        derive_prompt_template(template, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 9_000 + "1" + ")" * 9_000 + " }}",
        "{{ x" + ".a" * 9_000 + " }}",
        "{{ " + "+".join(["1"] * 9_000) + " }}",
        "{{ a" + "|upper" * 9_000 + " }}",
        "{% if x %}" * 9_000 + "{% endif %}" * 9_000,
    ],
    ids=["brackets", "attributes", "sums", "filters", "blocks"],
)
def test_a_template_that_is_too_deep_to_be_walked_is_refused(template):
    for use in (thinking_switch, mend_template, lambda text: derive_prompt_template(text, {})):
        with pytest.raises(BadInput, check=coded("chat-template-not-jinja", "nested too deeply")):
            use(template)


def test_equal_conversations_are_rendered_once(monkeypatch):
    expected = rendered_in_child(PLAIN, {}, [([USER], True)])
    monkeypatch.delattr(rendering, "run_in_child")
    assert rendered_in_child(PLAIN, {}, [([USER], True)]) == expected == (USER["content"],)


def test_foundry_ids():
    assert foundry_model_id("home", "int4", "cpu", 3) == "home-int4-generic-cpu:3"
    assert champion_model_id("home", 3) == "home:3"


@pytest.mark.parametrize("name", ["home-int4-generic-cpu", "home-generic-gpu"])
def test_a_name_that_ends_like_an_id_is_refused(name):
    with pytest.raises(BadInput, check=coded("name-like-foundry-id", name)):
        foundry_model_id(name, "int4", "cpu", 1)


@pytest.mark.parametrize(
    ("generation_config", "overrides", "expected"),
    [
        ({}, {}, (2048, 0.0, 1.0, 1.0)),
        ({"temperature": 0.7, "do_sample": False}, {}, (2048, 0.0, 1.0, 1.0)),
        ({"temperature": 0.7, "do_sample": True, "top_p": 0.8, "repetition_penalty": 1.1}, {}, (2048, 0.7, 0.8, 1.1)),
        ({"do_sample": True, "max_length": 99999}, {}, (2048, 1.0, 1.0, 1.0)),
        ({"max_length": 512}, {"temperature": "0.5"}, (512, 0.5, 1.0, 1.0)),
        ({"max_length": 512}, {"max_length": "1024", "top_p": 0.9, "repetition_penalty": "1.2"}, (1024, 0.0, 0.9, 1.2)),
    ],
)
def test_generation_defaults(generation_config, overrides, expected):
    defaults = generation_defaults(generation_config, overrides, 2048)
    assert (defaults.max_length, defaults.temperature, defaults.top_p, defaults.repetition_penalty) == expected


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"max_length": 2049}, ["max_length is 2049", "2048 tokens"]),
        ({"max_length": 0}, ["max_length"]),
        ({"temperature": 2.1}, ["temperature", "found 2.1"]),
        ({"temperature": "nan"}, ["temperature"]),
        ({"temperature": "warm"}, ["temperature", "found 'warm'"]),
        ({"top_p": 0}, ["top_p"]),
        ({"repetition_penalty": -1}, ["repetition_penalty"]),
        ({"top_q": 1}, ["top_q"]),
    ],
)
def test_generation_defaults_out_of_bounds_are_refused(overrides, named):
    with pytest.raises(BadInput, check=coded("bad-input", *named)):
        generation_defaults({}, overrides, 2048)


def test_inference_model_has_foundrys_keys():
    defaults = generation_defaults({}, {}, 2048)
    assert inference_model("home-int4-generic-cpu:3", 3, "Smart home", derive("chatml"), defaults) == {
        "Name": "home-int4-generic-cpu:3",
        "Description": "Smart home",
        "Version": 3,
        "PromptTemplate": CHATML,
        "ModelConfig": {"max_length": 2048, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0},
    }
    assert "system" not in inference_model("x:1", 1, "", derive("gemma-2"), defaults)["PromptTemplate"]
