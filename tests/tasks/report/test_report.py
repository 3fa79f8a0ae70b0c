"""The report's text and the status of a deploy, from records alone."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from slmops.infra.storage.evidence import Selection
from slmops.tasks.exams.length_sweep import LengthFigures
from slmops.tasks.exams.template_parity import ParityMismatch, TemplateParity
from slmops.tasks.report.assemble import in_order_of_size, overall_status
from slmops.tasks.report.blocks import visible
from slmops.tasks.report.markdown import code_span, escaped, fenced, to_markdown, variant_rows
from slmops.tasks.report.records import DeployReport, VariantDetails, VariantReport
from slmops.tasks.verdict.checks import GateCheck
from slmops.tasks.verdict.gate import GateVerdict
from tests.support.reports import FIGURES, endurance, evaluation, full_report, full_variant, length_sweep, parity

METRICS = {"load_ms": 40.0, "ttft_ms": 5.25, "peak_rss_bytes": 78e6, "top1_agreement": 0.97, "kl_divergence": 0.0312}
# What browsers, terminals and Markdown parsers would act upon if it were not kept from them.
HOSTILE = (
    "<script>window.hacked=1</script><img src=x onerror=window.hacked=1>",
    "![p](http://127.0.0.1:9/p.png) [l](javascript:window.hacked=1) <http://127.0.0.1:9/>",
    "a | b\n# heading\n\n</details>\n\n```\n~~~\n````` x",
    "\x1b[31mred\x07 \u202ereversed ``` ` \\| \\",
)
PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


def variant(precision: str, status: str = "registered", **changes: object) -> VariantReport:
    given = {
        "precision": precision,
        "status": status,
        "size_bytes": 500_000_000,
        "foundry_model_id": f"home-{precision}-generic-cpu:2" if status == "registered" else None,
        "metrics": METRICS,
    }
    return VariantReport.model_validate(given | changes)


def report(*variants: VariantReport, **changes: object) -> DeployReport:
    given = {
        "name": "home",
        "version": 2,
        "status": "registered",
        "variants": variants,
        "checkpoint": "./home",
        "parameters": 494_000_000,
        "evaluation": "200 rows of eval.jsonl",
        "foundry_dir": "/data/foundry",
    }
    return DeployReport.model_validate(given | changes)


def check(name: str, value: float | None, threshold: float, passed: bool, bound: str = "at most") -> GateCheck:
    return GateCheck.model_validate(
        {"name": name, "value": value, "threshold": threshold, "bound": bound, "passed": passed}
    )


def tokens_of(text: str) -> list[Token]:
    """All tokens of a Markdown text, those within lines included."""
    found = []
    for token in PARSER.parse(text):
        found += [token, *(token.children or [])]
    return found


def texts_of(text: str) -> str:
    """What a reader of the rendered Markdown sees."""
    return "\n".join(token.content for token in tokens_of(text) if token.type in ("text", "code_inline", "fence"))


@pytest.mark.parametrize(
    ("statuses", "selected", "unchanged", "expected"),
    [
        (["registered", "registered"], "int4", False, "registered"),
        (["registered", "registered"], "int4", True, "unchanged"),
        (["registered", "rejected"], "int4", False, "registered"),
        (["registered", "registered"], None, False, "rejected"),  # none keeps the budget
        (["rejected", "rejected"], None, False, "rejected"),
        (["rejected"], None, True, "rejected"),
        (["registered", "failed"], "int4", True, "failed"),
        (["rejected", "failed"], None, False, "failed"),
    ],
)
def test_a_deploys_status_is_that_of_its_gravest_variant(
    statuses: list[str], selected: str | None, unchanged: bool, expected: str
) -> None:
    variants = [variant("int4", status) for status in statuses]
    choice = Selection(selected=selected, reason="")
    assert overall_status(variants, choice, unchanged=unchanged) == expected


def test_variants_stand_from_large_to_small() -> None:
    given = [variant(precision) for precision in ("int4", "fp16", "int8")]
    assert [one.precision for one in in_order_of_size(given)] == ["fp16", "int8", "int4"]


def test_the_table_sets_sizes_beside_what_the_tutorial_promises() -> None:
    (row,) = variant_rows(report(variant("int4")))
    assert (row["size"], row["of fp32"]) == ("500.0 MB", "0.253 (0.125)")
    assert (row["load ms"], row["TTFT ms"], row["peak RSS"]) == ("40.0", "5.2", "78.0 MB")
    assert (row["prompt tok/s"], row["score"]) == ("-", "-")


def test_it_reads_from_the_verdict_to_the_provenance() -> None:
    headings = re.findall(r"^(#+ .*)$", to_markdown(full_report(), {}), re.MULTILINE)
    assert headings == [
        "# home@3: registered",
        "## The choice: int4",
        "### How to call it",
        "## Why not the others",
        "## Size and quality",
        "## Speed and memory",
        "## Quality",
        "### Domain answers",
        "#### Where the reference is right and int4 is wrong",
        "### Output format",
        "### Memory in long use",
        "### Speed over prompt lengths",
        "### Edge input",
        "### Distance from the checkpoint",
        "### Template parity",
        "## Since home@2",
        "## Warnings",
        "## Provenance",
    ]


def test_the_verdict_comes_first_with_the_choice_and_its_reason() -> None:
    title, verdict, *_ = to_markdown(full_report()).split("\n\n")
    assert title == "# home@3: registered"
    assert verdict == ("**int4 is chosen and serves as home:3.** int4 is the smallest precision that passed the gate.")


def test_it_says_why_the_others_were_not_chosen() -> None:
    failed = check("kl_divergence", 0.25, 0.02, passed=False)
    rejected = full_variant("int8", status="rejected", gate=GateVerdict(passed=False, checks=(failed,)))
    broken = variant("fp16", "failed", error="Olive could not build the model.")
    text = to_markdown(full_report(broken, rejected, full_variant("int4")))
    assert "- **fp16** (failed): `Olive could not build the model.`" in text
    assert "- **int8** (rejected): kl divergence 0.25, at most 0.02 is required" in text
    assert "- **int4** (" not in text


@pytest.mark.parametrize(
    ("status", "version", "headline"),
    [
        ("failed", None, "No variant could be built, so there is no version."),
        ("rejected", 2, "No variant may serve."),
        ("registered", 2, "No variant was chosen."),
    ],
)
def test_without_a_choice_the_verdict_says_so(status: str, version: int | None, headline: str) -> None:
    shown = report(variant("int4", status), status=status, version=version, reason="No variant keeps the budget.")
    assert f"**{headline}** No variant keeps the budget." in to_markdown(shown)


def test_a_variant_that_was_not_built_has_a_row_too() -> None:
    failed = variant("int4", "failed", size_bytes=None, metrics={}, error="Olive could not build the model.")
    text = to_markdown(report(failed, status="failed", version=None))
    assert text.startswith("# home: failed")
    assert "| **int4** | failed | - | - |" in text
    assert "## Failures\n\n- **int4**: `Olive could not build the model.`" in text
    assert "How to call it" not in text


def test_every_check_has_its_figure_and_threshold_and_what_failed_stands_out() -> None:
    checks = (
        check("top1_agreement", 0.97, 0.9, passed=True, bound="at least"),
        check("kl_divergence", 0.25, 0.1, passed=False),
        check("memory_growth_foundry", 90_000, 65_536, passed=False),
        check("finite_logits", None, 1.0, passed=False, bound="at least"),
    )
    rejected = variant("int4", "rejected", gate=GateVerdict(passed=False, checks=checks))
    text = to_markdown(report(variant("fp16"), rejected, reference_exact_match=0.985))
    assert "answers 98.5% of the evaluation set exactly." in text
    assert "| top1 agreement | 97.0% | at least 90.0% | passed |" in text
    assert "| kl divergence | **0.25** | at most 0.1 | **failed** |" in text
    assert "| memory growth foundry | **90.0 kB** | at most 65.5 kB | **failed** |" in text
    assert "| finite logits | **not finite** | at least 100.0% | **failed** |" in text
    assert "| Memory in long use | **failed** |" in text


def test_a_check_whose_interval_holds_the_threshold_is_not_decided() -> None:
    open_check = check("quality_loss", 0.04, 0.05, passed=True)
    gate = GateVerdict(
        passed=True, checks=(open_check.model_copy(update={"low": 0.01, "high": 0.09, "decided": False}),)
    )
    text = to_markdown(report(variant("int4", gate=gate)))
    assert "| Domain answers | not decided |" in text
    assert "| quality loss | 4.0% (1.0 to 9.0) | at most 5.0% | not decided |" in text


def test_it_says_how_to_call_what_was_registered() -> None:
    shown = report(variant("int4", answer='{"a":1}'), foundry_model_id="home:2", question="On?", selected="int4")
    text = to_markdown(shown)
    assert "Registered with Foundry Local:\n\n```\nhome-int4-generic-cpu:2\nhome:2\n```" in text
    assert "slmops chat home@2" in text
    assert 'model_cache_dir="/data/foundry"' in text
    assert 'get_model_variant("home:2")' in text
    assert 'Asked `On?`, int4 answered `{"a":1}`.' in text


def test_the_python_example_is_python_with_any_folder() -> None:
    text = to_markdown(report(variant("int4"), foundry_dir='C:\\Users\\"me"\\ü'))
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(program, "example", "exec")
    assert eval(re.search(r"model_cache_dir=(\".*\")\)", program)[1]) == 'C:\\Users\\"me"\\ü'  # type: ignore[index]


def test_worst_examples_stand_line_by_line_under_each_other() -> None:
    text = to_markdown(full_report())
    assert (
        "Row `home-041`, `light`:\n\n```text\n"
        "asked      Please turn the bedroom lamp to 51 percent\n"
        'expected   {"device":"bedroom lamp","action":"set","level":51}\n'
        'reference  {"device":"bedroom lamp","action":"set","level":51}\n'
        'int4       {"device":"bedroom lamp","action":"set","level":99}\n```'
    ) in text


def test_figures_come_with_units_and_intervals() -> None:
    text = to_markdown(full_report())
    assert "| **int4** | 96.7% (93.3 to 99.2) | 1.7% (-0.7 to 4.0) | at most 5.0% |" in text
    assert "| **int4** | 1.07 (1.02 to 1.12) | 1.13x at 2,048 | 7 of 7 |" in text
    assert re.search(r"\| int4, Foundry \| 48 \| -?\d+\.\d kB \(-?\d+\.\d to -?\d+\.\d\) \| at most 65\.5 kB \|", text)
    assert "| **int4** | 97.7% (97.1 to 98.2) | 0.0467 (0.0374 to 0.056), p99 0.42 | 1.0467 |" in text
    assert "On `/data/manuals/home.txt` (8,192 tokens):" in text


def test_what_a_leak_a_cliff_and_a_crash_look_like() -> None:
    genai, foundry = endurance("int4")
    crashed = foundry.edge_inputs[0].model_copy(update={"outcome": "crashed", "detail": "signal 11"})
    sick = foundry.edge_inputs[1].model_copy(update={"alive": False, "detail": ""})
    foundry = foundry.model_copy(
        update={"memory": None, "edge_inputs": (crashed, sick), "notes": ("The soak ended after 3 requests.",)}
    )
    swept = length_sweep("int4")
    broken = LengthFigures(prompt_tokens=4096, ttft_ms=9000, token_generation_throughput_tps=9, valid=False)
    swept = swept.model_copy(update={"lengths": (*swept.lengths, broken), "notes": ("The sweep ended at 4,096.",)})
    details = VariantDetails(length_sweep=swept, endurance=(genai, foundry))
    text = to_markdown(report(variant("int4", details=details)))
    assert "| int4, Foundry | - | did not end | - |" in text
    assert "- The soak ended after 3 requests. (int4 in Foundry)" in text
    assert "| 4,096 | 9,000 | 9.0 | **no** |" in text
    assert "| 1.13x at 2,048 | 7 of 8 |" in text
    assert "- The sweep ended at 4,096. (int4)" in text
    assert "| int4, Foundry | 1 | 0 | **2** |" in text
    assert "- int4, Foundry: `empty` crashed: `signal 11`" in text
    assert "- int4, Foundry: `white space` answered, and the runtime did not work afterwards" in text
    assert "Control tokens typed by a user reach the model as control tokens in genai (int4)." in text


def test_a_template_mismatch_shows_both_strings() -> None:
    start = "<|im_start|>system\n" + "You are kind. " * 100
    mismatch = ParityMismatch(
        conversation="two turns",
        runtime="foundry",
        expected=f"{start}<|im_end|>\n",
        found=f"{start}</s>",
        expected_tokens=9,
        found_tokens=8,
    )
    found = TemplateParity(
        conversations=9, mismatches=(mismatch,), broken_control_tokens=("<|im_end|>",), notes=("No system role.",)
    )
    text = to_markdown(report(variant("int4", details=VariantDetails(parity=found))))
    assert "**int4**: 1 of 9 conversations differ." in text
    assert "In Foundry, conversation `two turns`:" in text
    lines = [line for line in text.splitlines() if line.startswith(("expected from", "found from"))]
    assert [line.endswith(ending) for line, ending in zip(lines, ('<|im_end|>\\n"', '</s>"'), strict=True)] == [
        True
    ] * 2
    assert "9 tokens" in lines[0]
    assert "**int4**: not one token in every runtime: `<|im_end|>`." in text
    assert "- No system role." in text


def test_history_names_what_changed_beyond_noise() -> None:
    text = to_markdown(full_report())
    assert "1 better and 1 worse beyond noise, of 4 figures." in text
    assert "| int4: new tokens, tok/s | 611 | 801 | **better** 1.31x (1.27 to 1.36) |" in text
    assert "| int4: peak memory | 121.0 MB | 148.0 MB | **worse** 1.22x (1.20 to 1.24) |" in text
    assert "| int8: score | 1 | 0.983 | same -1.7% (-4.1 to +0.8) |" in text


@pytest.mark.parametrize("kept", [[], *([name] for name in VariantDetails.model_fields)])
def test_every_part_may_be_missing(kept: list[str]) -> None:
    whole = full_variant("int4")
    details = VariantDetails.model_validate({name: getattr(whole.details, name) for name in kept})
    bare = whole.model_copy(update={"details": details, "metrics": {}, "gate": None, "answer": None})
    shown = report(bare, variant("int8", "failed", size_bytes=None, metrics={}), parameters=0, selected="int4")
    assert to_markdown(shown).startswith("# home@2: registered")
    assert to_markdown(shown, {"quality": "data:,"})


def test_a_model_without_a_reference_has_its_own_figures() -> None:
    alone = evaluation("int4").model_copy(
        update={
            "vocabulary": evaluation("int4").vocabulary.model_copy(update={"reference": None}),
            **dict.fromkeys(("top1_agreement", "kl_divergence", "kl_divergence_p99", "reference_perplexity")),
            **dict.fromkeys(("top1_agreement_interval", "kl_divergence_interval", "quality_loss", "reference_score")),
            "worst_examples": (),
        }
    )
    text = to_markdown(report(variant("int4", details=VariantDetails(evaluation=alone))))
    assert "| **int4** | 96.7% (93.3 to 99.2) | - | - |" in text
    assert "Distance from the checkpoint" not in text


def hostile_report(text: str) -> DeployReport:
    """A report in which everything that others wrote is this text."""
    evaluated = evaluation("int4")
    rows = tuple(
        row.model_copy(update={"id": text, "answer": text, "category": text, "output_fault": text})
        for row in evaluated.rows[:2]
    )
    categories = tuple(one.model_copy(update={"category": text}) for one in evaluated.categories)
    examples = {"rows": rows, "categories": categories, "worst_examples": (text,)}
    genai, _ = endurance("int4")
    outcome = genai.edge_inputs[0].model_copy(update={"name": text, "detail": text, "outcome": "crashed"})
    mismatch = ParityMismatch(
        conversation=text, runtime="genai", expected=text, found=f"{text}.", expected_tokens=1, found_tokens=2
    )
    details = full_variant("int4").details.model_copy(
        update={
            "evaluation": evaluated.model_copy(update=examples),
            "endurance": (genai.model_copy(update={"edge_inputs": (outcome,)}),),
            "parity": parity(mismatch).model_copy(update={"broken_control_tokens": (text,), "notes": (text,)}),
        }
    )
    said = {"answer": text, "error": text, "warnings": (text,), "notes": (text,), "reason": text}
    shown = full_variant("int4").model_copy(update={**said, "details": details})
    told = {"checkpoint": text, "question": text, "description": text, "warnings": (text,), "reason": text}
    return full_report(full_variant("int8", reason=text), shown, **told, foundry_dir=text)


@pytest.mark.parametrize("images", [None, {}])
@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_others_wrote_is_markup(text: str, images: dict[str, str] | None) -> None:
    assert markup_of(to_markdown(hostile_report(text), images)) <= {"<details>", "</details>", "<code>", "</code>"}


@given(st.text(max_size=60))
def test_no_text_of_others_is_markup(text: str) -> None:
    shown = full_report(variant("int4", answer=text or "x", error=text, warnings=(text,)), question=text, reason=text)
    plain = shown.model_copy(update={"history": None, "provenance": None, "description": text})
    assert markup_of(to_markdown(plain, {})) <= {"<details>", "</details>"}


def markup_of(text: str) -> set[str]:
    """The HTML, links and images that a parser finds in a Markdown text."""
    found = set()
    for token in tokens_of(text):
        if token.type in ("html_block", "html_inline"):
            found.add(re.sub(r"<summary>[^<]*</summary>", "", token.content).strip().replace("\n", ""))
        elif token.type in ("image", "link_open"):
            found.add(token.type)
    return found


@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=80))
def test_escaped_text_reads_as_it_was(text: str) -> None:
    children = [child for token in PARSER.parse(f"x {escaped(text)} x") for child in token.children or []]
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children).split() == ["x", *text.split(), "x"]


@given(st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=40))
def test_code_spans_and_blocks_hold_any_text(text: str) -> None:
    (line,) = [token for token in PARSER.parse(f"x{code_span(text)}x") if token.type == "inline"]
    spans = [child.content for child in line.children or [] if child.type == "code_inline"]
    assert spans == [text] or not text.strip()
    assert [token.content for token in PARSER.parse(fenced(text)) if token.type == "fence"] == [f"{text}\n"]


@given(st.text(st.characters()))
def test_shown_text_has_no_controls_and_can_be_written(text: str) -> None:
    shown = visible(text)
    assert not [one for one in shown if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f")
    shown.encode()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31m", "\\u001b[31m"),
        ("\u202eabc", "\\u202eabc"),
        ("\ud800", "\\ud800"),
        ("👩\u200d💻 שלום", "👩\u200d💻 שלום"),
    ],
)
def test_controls_are_spelled_and_letters_are_not(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_a_table_cell_cannot_break_the_table() -> None:
    categories = tuple(one.model_copy(update={"category": "a|b \\| c"}) for one in evaluation("int4").categories)
    evaluated = evaluation("int4").model_copy(update={"categories": categories})
    text = to_markdown(report(variant("int4", details=VariantDetails(evaluation=evaluated))))
    html = PARSER.render(text)
    assert "<td><code>a|b \\| c</code></td>\n<td>30</td>" in html


def test_it_stays_a_page_with_much_to_tell() -> None:
    variants = []
    for precision in FIGURES:
        whole = full_variant(precision, warnings=["w" * 300] * 200, notes=["n" * 300] * 200, error="e" * 100_000)
        evaluated = evaluation(precision)
        long = [row.model_copy(update={"answer": "a" * 50_000, "output_fault": "f" * 50_000}) for row in evaluated.rows]
        many = {
            "rows": long,
            "categories": evaluated.categories * 500,
            "worst_examples": [row.id for row in evaluated.rows],
        }
        details = whole.details.model_copy(update={"evaluation": evaluated.model_copy(update=many)})
        variants.append(whole.model_copy(update={"details": details}))
    text = to_markdown(full_report(*variants, question="q" * 100_000, description="d" * 100_000), {})
    assert len(text) < 100_000
    assert "1,476 more" in text


def test_on_the_page_long_words_can_break_and_what_is_to_be_copied_stays() -> None:
    word = "w" * 200
    digest = "d" * 64
    shown = report(variant("int4", answer=word, digest=digest), question="On?", warnings=(word,))
    page = to_markdown(shown, {})
    assert max(len(part) for part in re.split(r"[\s\u200b]", re.sub("```.*?```", "", page, flags=re.DOTALL))) < 40
    assert f"sha256:{digest}" in page
    assert word in to_markdown(shown)


def test_as_a_file_nothing_is_folded_away() -> None:
    plain, folded = to_markdown(full_report()), to_markdown(full_report(), {})
    assert "<" not in re.sub(r"`[^`]*`", "", plain)
    assert "#### Every prompt length" in plain
    assert "<summary>Every prompt length</summary>" in folded
