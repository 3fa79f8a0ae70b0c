"""The parameters of runs. A parameter is declared only here.

A record's fields are the parameters of its flow (`declaration.takes`) and the options of its command
(`slmops.deployments.cli.options`), in the order of the form and of the command's help. Nothing heavy is imported:
`slmops --help` reads this module.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from slmops.infra.storage.names import LONGEST_TRAINING_RUN, NAME_PATTERN
from slmops.tasks.request.declaration import Parameter
from slmops.tasks.request.values import NOT_BLANK, Values

Precision = Literal["fp16", "int8", "int4"]
Device = Literal["cpu", "gpu", "npu"]
ThoughtModes = Literal["default", "on", "off", "both"]
ExecutionProvider = Literal["cpu", "cuda", "dml", "webgpu"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
MODEL = Values(pattern=f"^{NAME_PATTERN}$")
VERSION = Values(pattern=f"^{NAME_PATTERN}@{NAME_PATTERN}$")
MODEL_OR_VERSION = Values(pattern=f"^{NAME_PATTERN}(@{NAME_PATTERN})?$")
SHARE = Values(0, 1)
THOUGHTS = Values(1, 131_072)  # tokens


def evaluation_rows(description: str, help_: str = "JSONL rows {id, messages, expected}.") -> Parameter:
    return Parameter(description, help_, "--eval")


# The groups of a form, whose names are before those of their parameters. Without one: what most runs name.
EVALUATION, GATE, CHOICE, BUILD = "Evaluation", "Gate", "Choice", "Build"
CHECKPOINT, REGISTERED = "Checkpoint", "Registered model"


def _scorer(description: str) -> Parameter:
    names = "exact_match (default), normalized_match, contains, regex, json_equality, rouge_l or numeric"
    help_ = names + '; or JSON {"name": ..., options}.'
    return Parameter(description, help_, values=Values(pattern=r"^\s*\{"), group=EVALUATION)


def _schema(description: str) -> Parameter:
    help_ = "JSON Schema file that every answer must conform to."
    return Parameter(description, help_, "--output-schema", group=EVALUATION)


def _regex(description: str) -> Parameter:
    return Parameter(description, "Regular expression that every answer must match.", group=EVALUATION)


def _budget(description: str) -> Parameter:
    limits = "max-size=300MB, max-rss=1GB, max-ttft=200ms, min-tps=20, max-quality-loss=0.02"
    known = Values(pattern=r"^\s*(max[-_](size|rss|ttft|quality[-_]loss)|min[-_]tps)\s*=.*[0-9]")
    return Parameter(description, f"{limits}; repeatable.", metavar="KEY=VALUE", values=known, group=CHOICE)


def _generation(description: str, lowest: float, highest: float) -> Parameter:
    return Parameter(description, option="--model-config", key=True, values=Values(lowest, highest), group=REGISTERED)


TextFile = Annotated[
    str | None,
    Parameter(
        "UTF-8 text on which perplexity and distributions are compared too.",
        "UTF-8 text for perplexity and distributions.",
        "--text",
        group=EVALUATION,
    ),
]


def _limit(description: str, unit: str, values: Values) -> Parameter:
    return Parameter(description, f"Gate, {unit}.", values=values, group=GATE)


MinTop1Agreement = Annotated[
    float | None,
    _limit("Smallest share of positions with the reference's most likely token (0 to 1).", "0 to 1", SHARE),
]
MaxKlDivergence = Annotated[
    float | None,
    _limit("Largest mean KL divergence from the reference, in nats per token.", "nats per token", Values(minimum=0)),
]
MaxQualityLoss = Annotated[
    float | None, _limit("Largest drop of the task score below the reference's (0 to 1).", "0 to 1", SHARE)
]
MinOutputConformity = Annotated[
    float | None,
    _limit(
        "Smallest share of answers in the requested output format (0 to 1); default: 0.95, without rows in which the "
        "checkpoint's answer has another format too.",
        "0 to 1",
        SHARE,
    ),
]
MaxMemoryGrowth = Annotated[
    int | None,
    _limit(
        "Largest growth of the resident memory in the soak, in bytes per request; default: 65,536.",
        "bytes per request",
        Values(minimum=0),
    ),
]
MaxCliffRatio = Annotated[
    float | None,
    _limit(
        "Largest loss of throughput from one prompt length to the next, as a factor above 1; default: 4.",
        "a factor above 1",
        Values(above=1),
    ),
]
Thinking = Annotated[
    ThoughtModes,
    Parameter(
        "Whether the evaluated rows are asked with the model's thoughts on, off, or both, each with figures and checks "
        "of its own; a row's own `enable_thinking` has priority. By default the chat template decides.",
        "Thoughts of a reasoning model in the evaluation.",
        group=EVALUATION,
    ),
]
Allow = Annotated[
    tuple[str, ...],
    Parameter(
        "Checks of the gate that may fail, such as kl_divergence: a variant is registered in spite of them, and its "
        "report, evidence and model card show this.",
        "Register although this check failed; repeatable.",
        metavar="CHECK",
        group=GATE,
    ),
]


@dataclass(frozen=True)
class DeployParameters:
    """The parameters of a deploy."""

    checkpoint: Annotated[
        str,
        Parameter(
            "Folder of the checkpoint, Hub id (owner/name), s3:// folder, or store:// address. A LoRA adapter is "
            "merged into its base first; a folder that already is an onnxruntime-genai model is not built again.",
            "Folder, Hub id (owner/name), s3:// folder or store:// address.",
            positional=True,
            values=Values(pattern=NOT_BLANK),
        ),
    ]
    name: Annotated[
        str,
        Parameter("Name of the model: lower-case letters, digits and hyphens.", "Name of the model.", values=MODEL),
    ]
    precisions: Annotated[
        tuple[Precision, ...],
        Parameter(
            "Precisions to build.",
            "Several with commas, or repeated. Default: all.",
            "--precision",
            values=Values(elements=1),
        ),
    ] = PRECISIONS
    evaluation_file: Annotated[
        str | None,
        evaluation_rows(
            "JSONL rows {id, messages, expected}; default: eval.jsonl in the checkpoint's folder, else a built-in set "
            "of prompts, of which only the distributions are compared."
        ),
    ] = None
    promote: Annotated[bool, Parameter("Make this version the champion.")] = False
    quick: Annotated[
        bool,
        Parameter(
            "A first look: one precision (default: int8), a tenth of the evaluation rows, no soak, no long prompts; "
            "the version does not become the champion.",
            "A first look: one precision, few rows, no soak, no champion.",
        ),
    ] = False
    scorer: Annotated[
        str | None,
        _scorer(
            "Scorer of rows that name none: exact_match, normalized_match, contains, regex, "
            'json_equality, rouge_l or numeric, or a JSON object {"name": ..., options}; default: exact_match.'
        ),
    ] = None
    output_schema_file: Annotated[
        str | None,
        _schema(
            "JSON Schema that every answer must conform to; default: output_schema.json in the checkpoint's folder."
        ),
    ] = None
    output_regex: Annotated[str | None, _regex("Regular expression that every answer must match as a whole.")] = None
    constrain: Annotated[
        bool,
        Parameter(
            "Answer the evaluation with the output schema as a grammar too, and make it the version's default response "
            "format, which slmops serve applies to requests that name none.",
            "Serve with the output schema as default response format; evaluate both.",
            group=EVALUATION,
        ),
    ] = False
    text_file: TextFile = None
    max_thought_tokens: Annotated[
        int,
        Parameter(
            "Longest thoughts before an evaluated answer of a reasoning model, in tokens; behind them begins the limit "
            "of the answer itself.",
            "Longest thoughts of a reasoning model, in tokens.",
            values=THOUGHTS,
            group=EVALUATION,
        ),
    ] = 1024
    thinking: Thinking = "default"
    min_top1_agreement: MinTop1Agreement = None
    max_kl_divergence: MaxKlDivergence = None
    max_quality_loss: MaxQualityLoss = None
    min_output_conformity: MinOutputConformity = None
    max_memory_growth_bytes_per_request: MaxMemoryGrowth = None
    max_cliff_ratio: MaxCliffRatio = None
    allow: Allow = ()
    budget: Annotated[
        tuple[str, ...],
        _budget(
            "Limits of the chosen variant, each KEY=VALUE: max-size=300MB, max-rss=1GB, max-ttft=200ms, min-tps=20, "
            "max-quality-loss=0.02. Without one the smallest precision that passes the gate is chosen."
        ),
    ] = ()
    device: Annotated[
        Device,
        Parameter("Device that will serve the model.", "Device that will serve.", not_offered=("npu",), group=BUILD),
    ] = "cpu"
    execution_provider: Annotated[
        ExecutionProvider,
        Parameter(
            "ONNX Runtime's execution provider on that device.",
            "Execution provider on that device.",
            "--provider",
            group=BUILD,
        ),
    ] = "cpu"
    recipes: Annotated[
        tuple[str, ...],
        Parameter(
            "Recipes to use in place of a precision's default, such as int4-block128.",
            "Recipe in place of a precision's default; repeatable. See slmops recipes.",
            "--recipe",
            metavar="RECIPE",
            group=BUILD,
        ),
    ] = ()
    no_climb: Annotated[
        bool,
        Parameter(
            "Keep each precision's first recipe; by default, recipes of higher fidelity are tried if its "
            "variant misses the gate.",
            "Do not try recipes of higher fidelity after a rejection.",
            group=BUILD,
        ),
    ] = False
    search: Annotated[
        bool,
        Parameter(
            "Build and measure several recipes per precision, and keep the best.",
            "Try several recipes per precision; keep the best.",
            group=BUILD,
        ),
    ] = False
    calibration_file: Annotated[
        str | None,
        Parameter(
            "JSONL chats {messages}, each ending with an answer, for the calibration of quantized weights; if they are "
            "too few, and by default, the checkpoint's own answers to built-in prompts. No chat may be an evaluation "
            "row.",
            "JSONL chats for the calibration of quantized weights.",
            "--calibration",
            group=BUILD,
        ),
    ] = None
    olive_config_file: Annotated[
        str | None,
        Parameter(
            "Olive run configuration (JSON) to use in place of slmops' recipes.",
            "Olive run configuration in place of the recipes.",
            "--olive-config",
            group=BUILD,
        ),
    ] = None
    build_only: Annotated[
        bool,
        Parameter(
            "Build and store the variants without measuring or judging them, for an execution provider that this "
            "machine lacks; regate judges them on a machine that has it.",
            "Build and store only; slmops regate judges, where the provider is.",
            group=BUILD,
        ),
    ] = False
    output: Annotated[
        str | None,
        Parameter(
            "New folder for a copy of the built variants.", "New folder for a copy of the built variants.", group=BUILD
        ),
    ] = None
    base: Annotated[
        str | None,
        Parameter(
            "Base of a LoRA adapter (folder or Hub id); default: the one that the adapter names.",
            "Base of a LoRA adapter: folder or Hub id.",
            group=CHECKPOINT,
        ),
    ] = None
    revision: Annotated[
        str | None,
        Parameter(
            "Revision of a Hub id: branch, tag or commit.", "Branch, tag or commit of a Hub id.", group=CHECKPOINT
        ),
    ] = None
    chat_template_file: Annotated[
        str | None,
        Parameter(
            "Jinja file to use in place of the tokenizer's chat template.",
            "Jinja file in place of the tokenizer's own.",
            "--chat-template",
            group=CHECKPOINT,
        ),
    ] = None
    training_run: Annotated[
        str | None,
        Parameter(
            "Training run that made the checkpoint (an id or a URL), for the version's manifest.",
            "Training run that made the checkpoint: id or URL.",
            values=Values(pattern=NOT_BLANK, longest=LONGEST_TRAINING_RUN),
            group=CHECKPOINT,
        ),
    ] = None
    description: Annotated[
        str, Parameter("Purpose of the model; shown by Foundry Local.", "Purpose of the model.", group=REGISTERED)
    ] = ""
    max_length: Annotated[int | None, _generation("Longest prompt plus answer, in tokens.", 1, 10_000_000)] = None
    temperature: Annotated[
        float | None, _generation("Sampling temperature that the model is registered with.", 0, 2)
    ] = None
    top_p: Annotated[
        float | None, _generation("Nucleus sampling threshold that the model is registered with.", 0.001, 1)
    ] = None
    repetition_penalty: Annotated[
        float | None, _generation("Repetition penalty that the model is registered with.", 0.1, 2)
    ] = None


@dataclass(frozen=True)
class RegateParameters:
    """The parameters of judging a version again."""

    reference: Annotated[
        str,
        Parameter(
            "The version, NAME@VERSION.",
            "One version of a model.",
            metavar="NAME@VERSION",
            positional=True,
            values=MODEL_OR_VERSION,
        ),
    ]
    evaluation_file: Annotated[
        str | None, evaluation_rows("JSONL rows {id, messages, expected}; default: the rows of the last evaluation.")
    ] = None
    scorer: Annotated[str | None, _scorer("Scorer of the rows in `evaluation_file` that name none.")] = None
    output_schema_file: Annotated[
        str | None, _schema("JSON Schema that every answer must conform to; with `evaluation_file`.")
    ] = None
    output_regex: Annotated[
        str | None, _regex("Regular expression that every answer must match as a whole; with `evaluation_file`.")
    ] = None
    text_file: TextFile = None
    max_thought_tokens: Annotated[
        int | None,
        Parameter(
            "Longest thoughts before an evaluated answer of a reasoning model, in tokens; default: as in the last "
            "evaluation.",
            "Longest thoughts of a reasoning model, in tokens.",
            values=THOUGHTS,
        ),
    ] = None
    thinking: Thinking = "default"
    budget: Annotated[
        tuple[str, ...] | None,
        _budget("Limits of the chosen variant, each KEY=VALUE; default: those of the last choice."),
    ] = None
    min_top1_agreement: MinTop1Agreement = None
    max_kl_divergence: MaxKlDivergence = None
    max_quality_loss: MaxQualityLoss = None
    min_output_conformity: MinOutputConformity = None
    max_memory_growth_bytes_per_request: MaxMemoryGrowth = None
    max_cliff_ratio: MaxCliffRatio = None
    allow: Allow = ()
