"""The report's text and the status of a deploy, from records alone."""

import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from syrupy.assertion import SnapshotAssertion

from slmops.infra.storage.evidence import Selection
from slmops.tasks.exams.length_sweep import LengthFigures
from slmops.tasks.exams.template_parity import ParityMismatch, TemplateParity
from slmops.tasks.report.assemble import in_order_of_size, overall_status
from slmops.tasks.report.blocks import visible
from slmops.tasks.report.markdown import code_span, escaped, fenced, to_markdown, variant_rows
from slmops.tasks.report.records import DeployReport, VariantDetails, VariantReport
from slmops.tasks.report.wording import signed_percent
from slmops.tasks.verdict.advice import Advice, Step
from slmops.tasks.verdict.checks import GateCheck
from slmops.tasks.verdict.gate import GateVerdict
from tests.support.reports import FIGURES, endurance, evaluation, full_report, full_variant, length_sweep, parity
from tests.support.snapshots import Markdown

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
    assert [variant.precision for variant in in_order_of_size(given)] == ["fp16", "int8", "int4"]


def test_the_table_compares_sizes_with_those_of_the_tutorial() -> None:
    (row,) = variant_rows(report(variant("int4")))
    assert (row["size"], row["of fp32"]) == ("500.0 MB", "0.253 (0.125)")
    assert (row["load ms"], row["TTFT ms"], row["peak RSS"]) == ("40.0", "5.2", "78.0 MB")
    assert (row["prompt tok/s"], row["score"]) == ("-", "-")


def with_checks() -> DeployReport:
    """One check of each form: a share, a number, bytes, a figure that is not finite, and one that is not decided."""
    open_check = check("quality_loss", 0.04, 0.05, passed=True)
    checks = (
        check("top1_agreement", 0.97, 0.9, passed=True, bound="at least"),
        check("kl_divergence", 0.25, 0.1, passed=False),
        check("memory_growth_foundry", 90_000, 65_536, passed=False),
        check("finite_logits", None, 1.0, passed=False, bound="at least"),
        open_check.model_copy(update={"low": 0.01, "high": 0.09, "decided": False}),
    )
    rejected = variant("int4", "rejected", gate=GateVerdict(passed=False, checks=checks))
    return report(variant("fp16"), rejected, reference_exact_match=0.985)


def with_faults() -> DeployReport:
    """A leak, a cliff, a crash, and input after which the runtime does not work."""
    genai, foundry = endurance("int4")
    crashed = foundry.edge_inputs[0].model_copy(update={"outcome": "crashed", "detail": "signal 11"})
    sick = foundry.edge_inputs[1].model_copy(update={"alive": False, "detail": ""})
    foundry = foundry.model_copy(
        update={"memory": None, "edge_inputs": (crashed, sick), "notes": ("The soak ended after 3 requests.",)}
    )
    swept = length_sweep("int4")
    broken = LengthFigures(prompt_tokens=4096, ttft_ms=9000, token_generation_throughput_tps=9, valid=False)
    swept = swept.model_copy(update={"lengths": (*swept.lengths, broken), "notes": ("The sweep ended at 4,096.",)})
    details = VariantDetails(length_sweep=swept, endurance=(genai.model_copy(update={"extent": "short"}), foundry))
    return report(variant("int4", details=details))


def with_mismatches() -> DeployReport:
    """A long prompt that differs at its end, and a control token that is not one."""
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
    return report(variant("int4", details=VariantDetails(parity=found)))


def without_reference() -> DeployReport:
    """A model without a checkpoint that it could be compared with: its own figures."""
    alone = evaluation("int4").model_copy(
        update={
            "vocabulary": evaluation("int4").vocabulary.model_copy(update={"reference": None}),
            **dict.fromkeys(("top1_agreement", "kl_divergence", "kl_divergence_p99", "reference_perplexity")),
            **dict.fromkeys(("top1_agreement_interval", "kl_divergence_interval", "quality_loss", "reference_score")),
            "worst_examples": (),
        }
    )
    return report(variant("int4", details=VariantDetails(evaluation=alone)))


def with_others() -> DeployReport:
    """Of three variants one failed, one was rejected, and one was chosen."""
    failed = check("kl_divergence", 0.25, 0.02, passed=False)
    step = Step(text="Build it by the recipe int8-block128:", command="slmops deploy 'my home' --recipe int8-block128")
    accept = Step(text="Or serve it in spite of this:", command="slmops regate home@3 --allow kl_divergence")
    advice = Advice(check="kl_divergence", meaning="It is far from its checkpoint.", steps=(step, accept))
    gate = GateVerdict(passed=False, checks=(failed,))
    rejected = full_variant("int8", status="rejected", gate=gate, advice=(advice,))
    return full_report(
        variant("fp16", "failed", error="Olive could not build the model."), rejected, full_variant("int4")
    )


def unchosen(status: str, version: int | None) -> DeployReport:
    built = variant("int4", status) if version else variant("int4", status, size_bytes=None, metrics={}, error="No.")
    return report(built, status=status, version=version, reason="No variant keeps the budget.")


def climbed() -> DeployReport:
    """A variant of a recipe of higher fidelity, and one of a fallback, measured on a busy machine."""
    near = {"recipe": "int4-mixed", "status": "passed", "metrics": {"kl_divergence": 0.04, "size_bytes": 123e6}}
    far = {"recipe": "int4", "status": "rejected", "metrics": {"kl_divergence": 0.13, "size_bytes": 111e6}}
    missed = {**far, "failed_checks": ["top1_agreement", "kl_divergence"]}
    failed = {"recipe": "int8", "status": "failed", "error": "80 is not divisible by 32."}
    built = {"recipe": "int8-block128", "status": "passed"}
    return report(
        variant("int8", recipe="cpu-int8-block128", attempts=[failed, built], reliable=True),
        variant("int4", recipe="cpu-int4-mixed", attempts=[missed, near], reliable=False),
        selected="int4",
    )


def called() -> DeployReport:
    return report(variant("int4", answer='{"a":1}'), foundry_model_id="home:2", question="On?", selected="int4")


REPORTS: dict[str, Callable[[], DeployReport]] = {
    "whole": full_report,
    "others": with_others,
    "not-built": lambda: unchosen("failed", None),
    "rejected": lambda: unchosen("rejected", 2),
    "not-chosen": lambda: unchosen("registered", 2),
    "checks": with_checks,
    "faults": with_faults,
    "mismatches": with_mismatches,
    "without-reference": without_reference,
    "called": called,
    "climbed": climbed,
}


@pytest.mark.parametrize("name", REPORTS)
def test_it_reads_as_it_is_recorded(name: str, snapshot: SnapshotAssertion) -> None:
    assert to_markdown(REPORTS[name]()) == snapshot(extension_class=Markdown)


def test_on_the_page_it_is_folded_as_it_is_recorded(snapshot: SnapshotAssertion) -> None:
    assert to_markdown(full_report(), {}) == snapshot(extension_class=Markdown)


def test_the_python_example_is_python_with_any_folder() -> None:
    text = to_markdown(report(variant("int4"), foundry_dir='C:\\Users\\"me"\\ü'))
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(program, "example", "exec")
    assert eval(re.search(r"model_cache_dir=(\".*\")\)", program)[1]) == 'C:\\Users\\"me"\\ü'  # type: ignore[index]


@pytest.mark.parametrize("kept", [[], *([name] for name in VariantDetails.model_fields)])
def test_every_part_may_be_missing(kept: list[str]) -> None:
    whole = full_variant("int4")
    details = VariantDetails.model_validate({name: getattr(whole.details, name) for name in kept})
    bare = whole.model_copy(update={"details": details, "metrics": {}, "gate": None, "answer": None})
    shown = report(bare, variant("int8", "failed", size_bytes=None, metrics={}), parameters=0, selected="int4")
    assert to_markdown(shown).startswith("# home@2: registered")
    assert to_markdown(shown, {"quality": "data:,"})


def hostile_report(text: str) -> DeployReport:
    """A report in which everything that others wrote is this text."""
    evaluated = evaluation("int4")
    rows = tuple(
        row.model_copy(update={"id": text, "answer": text, "category": text, "output_fault": text})
        for row in evaluated.rows[:2]
    )
    categories = tuple(category.model_copy(update={"category": text}) for category in evaluated.categories)
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
    assert markup_of(to_markdown(hostile_report(text), images)) <= OWN_MARKUP


@given(st.text(max_size=60))
def test_no_text_of_others_is_markup(text: str) -> None:
    shown = full_report(variant("int4", answer=text or "x", error=text, warnings=(text,)), question=text, reason=text)
    plain = shown.model_copy(update={"history": None, "provenance": None, "description": text})
    assert markup_of(to_markdown(plain, {})) <= OWN_MARKUP


# Of folds, of the words that may break, and of code in tables.
OWN_MARKUP = {
    *("details", "summary", "p", "ul", "li", "code", "strong", "pre", "wbr", "dl", "dt", "dd"),
    *(
        "table",
        "table cellpadding=4",
        "thead",
        "tbody",
        "tr",
        "th scope=col",
        "td",
        "div class=table",
        "div class=comparison",
        "h4",
    ),
}


class Tags(HTMLParser):
    """The elements of an HTML text, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.add(" ".join([tag, *(f"{name}={value}" for name, value in attributes)]))

    def handle_data(self, data: str) -> None:
        self.text += data


def markup_of(text: str) -> set[str]:
    """The HTML elements, links and images that a parser finds in a Markdown text."""
    found: set[str] = set()
    for token in tokens_of(text):
        if token.type in ("html_block", "html_inline"):
            found |= Tags(token.content).found
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
    assert not [character for character in shown if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")]
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
    categories = tuple(
        category.model_copy(update={"category": "a|b \\| c"}) for category in evaluation("int4").categories
    )
    evaluated = evaluation("int4").model_copy(update={"categories": categories})
    text = to_markdown(report(variant("int4", details=VariantDetails(evaluation=evaluated))))
    html = PARSER.render(text)
    assert "<td><code>a|b \\| c</code> (30 rows; reference 100.0%)</td>\n<td>" in html


def test_it_stays_one_page_with_many_findings() -> None:
    variants = []
    for precision in FIGURES:
        whole = full_variant(precision, warnings=["w" * 300] * 200, notes=["n" * 300] * 200, error="e" * 100_000)
        evaluated = evaluation(precision)
        long = [row.model_copy(update={"answer": "a" * 50_000, "output_fault": "f" * 50_000}) for row in evaluated.rows]
        many = {
            "rows": long,
            "categories": [
                part.model_copy(update={"category": f"{part.category} {number}"})
                for part in evaluated.categories
                for number in range(500)
            ],
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
    prose = re.sub("```.*?```|<pre>.*?</pre>", "", page, flags=re.DOTALL)
    assert max(len(part) for part in re.split(r"\s|<[^>]*>", prose)) < 40
    assert f"sha256:{digest}" in page
    assert "\u200b" not in page
    assert word in Tags(page).text
    assert word in to_markdown(shown)


def test_as_a_file_nothing_is_folded_away() -> None:
    plain, folded = to_markdown(full_report()), to_markdown(full_report(), {})
    assert "<" not in re.sub(r"`[^`]*`", "", plain)
    assert "#### Every prompt length" in plain
    assert "<summary>Every prompt length</summary>" in folded


@pytest.mark.parametrize(("value", "shown"), [(-0.0001, "+0.0%"), (0.0, "+0.0%"), (0.12, "+12.0%"), (-0.0123, "-1.2%")])
def test_a_change_has_a_sign_and_no_change_has_no_minus(value: float, shown: str) -> None:
    assert signed_percent(value) == shown
