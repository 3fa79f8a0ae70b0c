"""Advice on a rejection: for each check of the gate, what its failure means and what would most likely help."""

import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from slmops.infra.records import Record
from slmops.tasks.exams.estimates import CONFIDENCE
from slmops.tasks.exams.evaluation import Evaluation
from slmops.tasks.request.parameters import PRECISIONS
from slmops.tasks.verdict.checks import NEVER_ALLOWED, CheckName, GateCheck
from slmops.tasks.verdict.thresholds import DEFAULT_THRESHOLDS

WIDER = {"int4": "int8", "int8": "fp16"}


class Step(Record):
    """Something to do, and the command that does it, if one does."""

    text: str
    command: str = ""


class Advice(Record):
    """Advice on a failed check: what the failure means, and the steps that would help, the most promising first."""

    check: CheckName
    meaning: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Rejection:
    """A rejected variant, with what was tried and measured.

    `deploy` is the command that makes its version again, with `precisions`, those of the version. `ladder` has the
    precision's default recipe and those that a deploy tries after it; it is empty for a model that came as ONNX.
    `tried` are the recipes that were tried, and `calibrated` those of both that are calibrated. `registered` are the
    version's precisions that passed. `valid_lengths` are the prompt lengths with valid answers, in tokens.
    """

    reference: str
    checkpoint: str
    deploy: tuple[str, ...]
    precision: str
    precisions: tuple[str, ...]
    ladder: tuple[str, ...]
    tried: tuple[str, ...]
    calibrated: frozenset[str]
    registered: tuple[str, ...]
    failed: tuple[GateCheck, ...]
    evaluation: Evaluation | None = None
    most_rows: int = 200
    valid_lengths: tuple[int, ...] = ()
    reliable: bool = True

    def again(self, *options: str, precisions: Sequence[str] = ()) -> str:
        """Return the command of another deploy with further options, and with these precisions if any are given."""
        named = precisions or (() if set(self.precisions) == set(PRECISIONS) else self.precisions)
        chosen = ("--precision", ",".join(named)) if named else ()
        return shlex.join((*self.deploy, *chosen, *options))

    def regate(self, *options: str) -> str:
        """Return the command that judges the version again without a build."""
        return shlex.join(("slmops", "regate", self.reference, *options))


Steps = Callable[[Rejection, GateCheck], Iterator[Step]]


@dataclass(frozen=True)
class Guidance:
    """What the failure of a check means, and its steps, beside that of allowing it."""

    meaning: str
    steps: Steps


def advice_on(rejection: Rejection) -> tuple[Advice, ...]:
    """Return the advice on each failed check of a variant; the last step of each is to serve it in spite of it."""
    accepting = tuple(_accepting(rejection))
    return tuple(
        Advice(
            check=check.name,
            meaning=GUIDANCE[check.name].meaning,
            steps=(*GUIDANCE[check.name].steps(rejection, check), *accepting),
        )
        for check in rejection.failed
    )


def first_step(advice: Sequence[Advice]) -> str:
    """Return the most promising step of all in one line, with its command; empty without advice."""
    step = next((step for found in advice for step in found.steps), None)
    return " ".join(filter(None, (step.text, step.command))) if step else ""


def rows_to_decide(evaluation: Evaluation | None, margin: float) -> int | None:
    """Return about how many rows let the task score show that the loss is within a margin; None if none can.

    The interval is that of `slmops.tasks.exams.estimates.paired_loss`, for more rows that differ as often as those
    evaluated. Without scored rows, equal answers are assumed: it is the least number.
    """
    differences = _losses(evaluation)
    mean = statistics.fmean(differences) if differences else 0.0
    square = statistics.fmean(difference**2 for difference in differences) if differences else 0.0
    if mean >= margin:
        return None
    rows = max(len(differences), 1)
    while _reaches(rows, mean, square) > margin:
        rows += 1 + rows // 50
    return rows


def _losses(evaluation: Evaluation | None) -> list[float]:
    return [
        row.reference_score - row.score
        for row in (evaluation.rows if evaluation else ())
        if row.score is not None and row.reference_score is not None
    ]


def _reaches(rows: int, mean: float, square: float) -> float:
    centre = mean * rows / (rows + 2)
    spread = (square * rows + 1) / (rows + 2) - centre**2
    return centre + statistics.NormalDist().inv_cdf(CONFIDENCE) * math.sqrt(spread / (rows + 2))


def _accepting(rejection: Rejection) -> Iterator[Step]:
    names = [check.name for check in rejection.failed]
    if not set(names) & set(NEVER_ALLOWED):
        options = [word for name in dict.fromkeys(names) for word in ("--allow", name)]
        yield Step(
            text="Serve it in spite of this, which its report and its model card will say:",
            command=rejection.regate(*options),
        )


def _closer(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    """Yield the steps to a variant that is closer to its checkpoint."""
    yield from _another_recipe(rejection)
    yield from _calibration(rejection)
    yield from _wider(rejection)


def _another_recipe(rejection: Rejection) -> Iterator[Step]:
    untried = [recipe for recipe in rejection.ladder if recipe not in rejection.tried]
    if not untried:
        return
    if untried == list(rejection.ladder):
        default, *others = rejection.ladder
        after = f", and by itself of {' and '.join(others)} if it misses too" if others else ""
        yield Step(text=f"Build it by the default recipe {default}{after}:", command=rejection.again())
        return
    yield Step(
        text=f"Build it by the recipe {untried[-1]}, which is closer to the checkpoint and larger:",
        command=rejection.again("--recipe", untried[-1]),
    )


def _calibration(rejection: Rejection) -> Iterator[Step]:
    calibrated = [recipe for recipe in rejection.ladder if recipe in rejection.calibrated]
    if not calibrated or rejection.calibrated.isdisjoint(rejection.tried):
        return
    recipe = () if calibrated[-1] == rejection.ladder[0] else ("--recipe", calibrated[-1])
    yield Step(
        text="Calibrate it on chats like those in use: a file of rows {messages}, none of them an evaluation row:",
        command=rejection.again(*recipe, "--calibration", "chats.jsonl"),
    )


def _wider(rejection: Rejection) -> Iterator[Step]:
    wider = WIDER.get(rejection.precision)
    if not rejection.ladder or wider is None:
        return
    if wider in rejection.registered:
        yield Step(text=f"Leave it at that: {wider} of {rejection.reference} passed, and can serve.")
    elif wider not in rejection.precisions:
        precisions = [name for name in PRECISIONS if name in (*rejection.precisions, wider)]
        yield Step(text=f"Build {wider}, which is larger:", command=rejection.again(precisions=precisions))


def _distributions(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    yield from _closer(rejection, check)
    if rejection.precision not in WIDER or not rejection.ladder:
        yield from _whole_family(rejection, check)
    else:
        yield from _more_rows(rejection)


def _more_rows(rejection: Rejection) -> Iterator[Step]:
    """Yield the step to enough rows for the task score to decide: then the distributions decide nothing."""
    margin = DEFAULT_THRESHOLDS[rejection.precision]["max_quality_loss"]
    rows = rows_to_decide(rejection.evaluation, margin)
    found = len(_losses(rejection.evaluation))
    if rows is None or rows <= found:
        return
    beyond = f" with SLMOPS_EVALUATION__MAX_ROWS={rows}" if rows > rejection.most_rows else ""
    instead = f", instead of {found}," if found else ""
    yield Step(
        text=f"Let the task score decide: give at least {rows} rows with expected answers{instead}{beyond}:",
        command=rejection.regate("--eval", "rows.jsonl"),
    )


def _whole_family(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    yield Step(
        text="At this precision the cause is rarely rounding. See whether the model's family is built exactly:",
        command=shlex.join(("slmops", "check", rejection.checkpoint)),
    )


def _vocabulary(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    yield Step(
        text="Save tokenizer and model together, with `vocab_size` of config.json as the embedding's rows, then look:",
        command=shlex.join(("slmops", "check", rejection.checkpoint)),
    )


def _finite_logits(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    if rejection.precision == "fp16" and rejection.ladder:
        yield Step(
            text="Its numbers leave the range of fp16, which int8 and int4 do not use: build these only:",
            command=rejection.again(precisions=("int8", "int4")),
        )
    yield Step(
        text="See whether the checkpoint itself is sound: transformers must give finite numbers for it too:",
        command=shlex.join(("slmops", "check", rejection.checkpoint)),
    )


def _output_format(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    found = rejection.evaluation.reference_output_conformity if rejection.evaluation else None
    if found is not None and found.value < check.threshold:
        yield Step(
            text=f"The checkpoint itself has the format in only {found.value:.0%} of its answers: train it on the "
            "format, or ask for the one that it gives:",
            command=rejection.regate("--eval", "rows.jsonl", "--output-schema", "schema.json"),
        )
    yield from _closer(rejection, check)
    yield Step(
        text="If the format is a JSON Schema, slmops serve can hold the answers to it; the report then shows what they "
        "are worth:",
        command=rejection.again("--constrain", "--allow", "output_format"),
    )


def _template(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    yield Step(
        text="Change chat_template.jinja (or `chat_template` of tokenizer_config.json) there, and compare in seconds:",
        command=shlex.join(("slmops", "check", rejection.checkpoint)),
    )
    yield Step(
        text="Or give another file than the checkpoint's:",
        command=rejection.again("--chat-template", "chat_template.jinja"),
    )


def _empty_answers(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    yield Step(
        text="It ends its turn at once. Mostly the prompt is not the one of its training: give that chat template:",
        command=rejection.again("--chat-template", "chat_template.jinja"),
    )


def _memory(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    limit = math.ceil(check.value or 0)
    yield Step(
        text="If its server is started again often enough, set SLMOPS_GATE__MAX_MEMORY_GROWTH_BYTES_PER_REQUEST to "
        f"{limit} or more, and judge again:",
        command=rejection.regate(),
    )


def _lengths(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    broken = min((int(text.split()[0]) for text in check.detail.split("; ") if text[:1].isdigit()), default=0)
    longest = max((length for length in rejection.valid_lengths if length < broken), default=0)
    if longest and rejection.ladder:
        yield Step(
            text=f"It answers prompts of up to {longest} tokens. Register it with that limit:",
            command=rejection.again("--model-config", f"max_length={longest}"),
        )
    yield from _whole_family(rejection, check)


def _steadiness(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    if not rejection.reliable:
        yield Step(
            text="The machine was busy. Measure again when it is idle, then judge again:",
            command=f"slmops benchmark {rejection.reference} && {rejection.regate()}",
        )
    yield Step(
        text="If such prompts are rare in use, set SLMOPS_GATE__MAX_CLIFF_RATIO to "
        f"{math.ceil(check.value or 0)} or more, and judge again:",
        command=rejection.regate(),
    )


def _edge_inputs(rejection: Rejection, check: GateCheck) -> Iterator[Step]:
    yield Step(
        text=f"Keep such inputs from it ({check.detail}), and see whether the runtime is the proven version:",
        command="slmops check",
    )


FAR_FROM_CHECKPOINT = "It prefers other next tokens than its checkpoint more often than the limit allows"
GUIDANCE: dict[CheckName, Guidance] = {
    "vocabulary": Guidance(
        "It has another number of tokens than its checkpoint, so that its tokens mean other text.", _vocabulary
    ),
    "finite_logits": Guidance("It computes infinite or undefined numbers: its answers are noise.", _finite_logits),
    "top1_agreement": Guidance(f"{FAR_FROM_CHECKPOINT}: rounding its weights changed it too much.", _distributions),
    "kl_divergence": Guidance(
        "Its probabilities of the next token are farther from its checkpoint's than the limit allows: rounding its "
        "weights changed it too much.",
        _distributions,
    ),
    "quality_loss": Guidance("It answers fewer rows correctly than its checkpoint, and not by chance.", _closer),
    "ended_answers": Guidance(
        "Its answers run on to the limit of tokens where those of its checkpoint come to an end.", _closer
    ),
    "ended_thoughts": Guidance(
        "Its thoughts run on to their limit of tokens where those of its checkpoint come to an end.", _closer
    ),
    "repetition": Guidance(
        "Its answers fall into an endless loop where those of its checkpoint do not, as models of few bits do.", _closer
    ),
    "output_format": Guidance("Too many of its answers do not have the format that you asked for.", _output_format),
    "non_empty_answers": Guidance("Some of its answers are empty.", _empty_answers),
    "template_parity": Guidance(
        "A runtime makes other prompts of a chat than transformers, so that in use it would see prompts that it was "
        "not trained with.",
        _template,
    ),
    "memory_growth_genai": Guidance("In onnxruntime-genai, its memory grows with every request.", _memory),
    "memory_growth_foundry": Guidance("In Foundry Local, its memory grows with every request.", _memory),
    "valid_lengths": Guidance("At some prompt lengths it gives no valid answer.", _lengths),
    "steadiness": Guidance("From one prompt length to the next it becomes much slower.", _steadiness),
    "edge_input_genai": Guidance("An unusual input ends onnxruntime-genai or leaves it unusable.", _edge_inputs),
    "edge_input_foundry": Guidance("An unusual input ends Foundry Local or leaves it unusable.", _edge_inputs),
    "text_top1_agreement": Guidance(f"{FAR_FROM_CHECKPOINT}, on your text.", _closer),
    "text_kl_divergence": Guidance(
        "On your text, its probabilities of the next token are farther from its checkpoint's than the limit allows.",
        _closer,
    ),
    "tool_calls_lost": Guidance("It leaves out calls of tools that its checkpoint makes.", _closer),
    "tool_calls_invented": Guidance("It makes calls of tools where its checkpoint makes none.", _closer),
    "tool_arguments_changed": Guidance("It calls tools with other arguments than its checkpoint.", _closer),
}
