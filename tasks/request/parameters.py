"""The parameters of runs. A parameter is declared only here.

A record's fields are the parameters of its flow (`declaration.takes`) and the options of its command
(`slmops.deployments.cli.options`), in the order of the form and of the command's help. Nothing heavy is imported:
`slmops --help` reads this module.
"""

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from slmops.tasks.request.declaration import Parameter

Precision = Literal["fp16", "int8", "int4"]
Device = Literal["cpu", "gpu", "npu"]
ExecutionProvider = Literal["cpu", "cuda", "dml", "webgpu"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def _rows(description: str, help_: str = "JSONL rows {id, messages, expected}.") -> Parameter:
    return Parameter(description, help_, "--eval")


def _scorer(description: str) -> Parameter:
    names = "exact_match (default), normalized_match, contains, regex, json_equality, rouge_l or numeric"
    return Parameter(description, names + '; or JSON {"name": ..., options}.')


def _schema(description: str) -> Parameter:
    return Parameter(description, "JSON Schema file that every answer must conform to.", "--output-schema")


def _regex(description: str) -> Parameter:
    return Parameter(description, "Regular expression that every answer must match.")


def _budget(description: str) -> Parameter:
    limits = "max-size=300MB, max-rss=1GB, max-ttft=200ms, min-tps=20, max-quality-loss=0.02"
    return Parameter(description, f"{limits}; repeatable.", metavar="KEY=VALUE")


def _generation(description: str) -> Parameter:
    return Parameter(description, option="--model-config", key=True)


TextFile = Annotated[
    str | None,
    Parameter(
        "UTF-8 text on which perplexity and distributions are compared too.",
        "UTF-8 text for perplexity and distributions.",
        "--text",
    ),
]
MinTop1Agreement = Annotated[
    float | None,
    Parameter("Gate: smallest share of positions with the reference's most likely token (0 to 1).", "Gate, 0 to 1."),
]
MaxKlDivergence = Annotated[
    float | None,
    Parameter("Gate: largest mean KL divergence from the reference, in nats per token.", "Gate, nats per token."),
]
MaxQualityLoss = Annotated[
    float | None,
    Parameter("Gate: largest drop of the task score below the reference's (0 to 1).", "Gate, 0 to 1."),
]
Allow = Annotated[
    tuple[str, ...],
    Parameter(
        "Checks of the gate that may fail, such as kl_divergence: a variant is registered in spite of them, and its "
        "report, evidence and model card show this.",
        "Register although this check failed; repeatable.",
        metavar="CHECK",
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
        ),
    ]
    name: Annotated[str, Parameter("Name of the model: lower-case letters, digits and hyphens.", "Name of the model.")]
    precisions: Annotated[
        tuple[Precision, ...],
        Parameter("Precisions to build.", "Several with commas, or repeated. Default: all.", "--precision"),
    ] = PRECISIONS
    device: Annotated[
        Device, Parameter("Device that will serve the model.", "Device that will serve.", not_offered=("npu",))
    ] = "cpu"
    execution_provider: Annotated[
        ExecutionProvider,
        Parameter(
            "ONNX Runtime's execution provider on that device.",
            "Execution provider on that device.",
            "--provider",
        ),
    ] = "cpu"
    evaluation_file: Annotated[
        str | None,
        _rows(
            "JSONL rows {id, messages, expected}; default: eval.jsonl in the checkpoint's folder, else a built-in set "
            "of prompts, of which only the distributions are compared."
        ),
    ] = None
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
    text_file: TextFile = None
    max_thought_tokens: Annotated[
        int,
        Parameter(
            "Longest thoughts before an evaluated answer of a reasoning model, in tokens; behind them begins the limit "
            "of the answer itself.",
            "Longest thoughts of a reasoning model, in tokens.",
        ),
    ] = 1024
    base: Annotated[
        str | None,
        Parameter(
            "Base of a LoRA adapter (folder or Hub id); default: the one that the adapter names.",
            "Base of a LoRA adapter: folder or Hub id.",
        ),
    ] = None
    revision: Annotated[
        str | None,
        Parameter("Revision of a Hub id: branch, tag or commit.", "Branch, tag or commit of a Hub id."),
    ] = None
    chat_template_file: Annotated[
        str | None,
        Parameter(
            "Jinja file to use in place of the tokenizer's chat template.",
            "Jinja file in place of the tokenizer's own.",
            "--chat-template",
        ),
    ] = None
    max_length: Annotated[int | None, _generation("Longest prompt plus answer, in tokens.")] = None
    temperature: Annotated[float | None, _generation("Sampling temperature that the model is registered with.")] = None
    top_p: Annotated[float | None, _generation("Nucleus sampling threshold that the model is registered with.")] = None
    repetition_penalty: Annotated[
        float | None, _generation("Repetition penalty that the model is registered with.")
    ] = None
    description: Annotated[str, Parameter("Purpose of the model; shown by Foundry Local.", "Purpose of the model.")] = (
        ""
    )
    olive_config_file: Annotated[
        str | None,
        Parameter(
            "Olive run configuration (JSON) to use in place of slmops' recipes.",
            "Olive run configuration in place of the recipes.",
            "--olive-config",
        ),
    ] = None
    output: Annotated[
        str | None,
        Parameter("New folder for a copy of the built variants.", "New folder for a copy of the built variants."),
    ] = None
    min_top1_agreement: MinTop1Agreement = None
    max_kl_divergence: MaxKlDivergence = None
    max_quality_loss: MaxQualityLoss = None
    allow: Allow = ()
    budget: Annotated[
        tuple[str, ...],
        _budget(
            "Limits of the chosen variant, each KEY=VALUE: max-size=300MB, max-rss=1GB, max-ttft=200ms, min-tps=20, "
            "max-quality-loss=0.02. Without one the smallest precision that passes the gate is chosen."
        ),
    ] = ()
    recipes: Annotated[
        tuple[str, ...],
        Parameter(
            "Recipes to use in place of a precision's default, such as int4-block128.",
            "Recipe in place of a precision's default; repeatable. See slmops recipes.",
            "--recipe",
            metavar="RECIPE",
        ),
    ] = ()
    no_climb: Annotated[
        bool,
        Parameter(
            "Keep each precision's first recipe; by default, recipes of higher fidelity are tried if its "
            "variant misses the gate.",
            "Do not try recipes of higher fidelity after a rejection.",
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
        ),
    ] = None
    search: Annotated[
        bool,
        Parameter(
            "Build and measure several recipes per precision, and keep the best.",
            "Try several recipes per precision; keep the best.",
        ),
    ] = False
    promote: Annotated[bool, Parameter("Make this version the champion.")] = False
    training_run: Annotated[
        str | None,
        Parameter(
            "Training run that made the checkpoint (an id or a URL), for the version's manifest.",
            "Training run that made the checkpoint: id or URL.",
        ),
    ] = None


@dataclass(frozen=True)
class RegateParameters:
    """The parameters of judging a version again."""

    reference: Annotated[
        str, Parameter("The version, NAME@VERSION.", "One version of a model.", metavar="NAME@VERSION", positional=True)
    ]
    evaluation_file: Annotated[
        str | None, _rows("JSONL rows {id, messages, expected}; default: the rows of the last evaluation.")
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
        ),
    ] = None
    budget: Annotated[
        tuple[str, ...] | None,
        _budget("Limits of the chosen variant, each KEY=VALUE; default: those of the last choice."),
    ] = None
    min_top1_agreement: MinTop1Agreement = None
    max_kl_divergence: MaxKlDivergence = None
    max_quality_loss: MaxQualityLoss = None
    allow: Allow = ()


@dataclass(frozen=True)
class BenchmarkParameters:
    """The parameters of measuring a version again."""

    reference: Annotated[
        str,
        Parameter(
            "The version, NAME@VERSION; NAME alone is its champion, or the newest version without one.",
            "Model, or one version (or alias) of it.",
            metavar="NAME[@VERSION]",
            positional=True,
        ),
    ]
    lm_eval_tasks: Annotated[
        tuple[str, ...],
        Parameter(
            "Tasks, groups or tags of lm-eval to run on every variant; recorded results are reused.",
            "Task of lm-eval, or of --lm-eval-include; repeatable.",
            "--lm-eval-task",
        ),
    ] = ()
    lm_eval_include: Annotated[str | None, Parameter("Folder with lm-eval tasks of your own.")] = None
    lm_eval_limit: Annotated[
        int | None, Parameter("Documents of each lm-eval task; default: all.", option="--limit")
    ] = None
    lm_eval_chat_template: Annotated[
        bool,
        Parameter("Render lm-eval's questions with the model's chat template.", "Use the model's chat template."),
    ] = False
    lm_eval_allow_network: Annotated[
        bool,
        Parameter("Let lm-eval fetch its tasks' data from the Hugging Face Hub.", "Let lm-eval fetch its data."),
    ] = False
    lm_eval_allow_code: Annotated[
        bool,
        Parameter(
            "Let the task files of `lm_eval_include` run Python code, with your own rights.",
            "Let the folder's tasks run Python code.",
        ),
    ] = False
    lm_eval_on_checkpoint: Annotated[
        bool,
        Parameter(
            "Run lm-eval's tasks on the source checkpoint too, for comparison with its variants.",
            "Run the tasks on the source checkpoint too.",
        ),
    ] = False


@dataclass(frozen=True)
class RetrainParameters:
    """The parameters of a retrain."""

    dataset: Annotated[
        str,
        Parameter(
            "Chats to learn from: JSONL file, s3:// object, or Hugging Face dataset (Hub id or folder). A row is "
            "{messages} with the answer as its last turn, or {messages, expected}.",
            "Chats: JSONL file, s3:// object, or Hugging Face dataset.",
            positional=True,
        ),
    ]
    base: Annotated[
        str,
        Parameter(
            "Checkpoint to fine-tune: folder, Hub id (owner/name), s3:// folder, or store:// address.",
            "Checkpoint to fine-tune: folder, Hub id, s3:// folder or store://.",
        ),
    ]
    name: Annotated[str, Parameter("Name of the model.")]
    evaluation_file: Annotated[
        str | None,
        _rows(
            "JSONL rows {id, messages, expected} that champion and candidate are compared on; default: eval.jsonl in "
            "the base's folder.",
            "Rows that both versions answer.",
        ),
    ] = None
    method: Annotated[
        Literal["lora", "full"],
        Parameter("Train a LoRA adapter, which is merged into the base, or all weights."),
    ] = "lora"
    epochs: Annotated[int, Parameter("Passes over the dataset, at most.")] = 3
    learning_rate: Annotated[
        float,
        Parameter("Highest learning rate; full fine-tuning needs a smaller one than LoRA.", "Highest learning rate."),
    ] = 2e-4
    batch_size: Annotated[int, Parameter("Chats per step.")] = 8
    lora_rank: Annotated[int, Parameter("Rank of the adapter's matrices.")] = 16
    early_stopping_patience: Annotated[
        int,
        Parameter(
            "Epochs without improvement on held-out chats after which training stops.",
            "Epochs without improvement before training stops.",
            "--patience",
        ),
    ] = 2
    max_length: Annotated[
        int | None, Parameter("Longest chat, in tokens; default: the base's context.", "Longest chat, in tokens.")
    ] = None
    seed: Annotated[int, Parameter("Seed of all random choices.")] = 0
    revision: Annotated[
        str | None,
        Parameter("Revision of a base from the Hub: branch, tag or commit.", "Revision of a base from the Hub."),
    ] = None
    precisions: Annotated[
        tuple[Precision, ...] | None,
        Parameter("Precisions to build; default: all.", "Several with commas, or repeated.", "--precision"),
    ] = None
    promotion: Annotated[
        Literal["if better", "never"],
        Parameter(
            "Promote a candidate that is better than the champion, or never.",
            "Never promote; only compare.",
            "--no-promotion",
            switch="never",
        ),
    ] = "if better"
    force: Annotated[
        bool, Parameter("Train and deploy even if nothing has changed.", "Train even if nothing has changed.")
    ] = False
