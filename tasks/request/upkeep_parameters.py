"""The parameters of runs on models that are stored: benchmark, retrain, promote, rollback and gc.

They are declared as those of `slmops.tasks.request.parameters` are.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from slmops.tasks.request.declaration import Parameter
from slmops.tasks.request.parameters import (
    BUILD,
    MODEL,
    MODEL_OR_VERSION,
    VERSION,
    MaxCliffRatio,
    MaxKlDivergence,
    MaxMemoryGrowth,
    MaxQualityLoss,
    MinOutputConformity,
    MinTop1Agreement,
    Precision,
    evaluation_rows,
)
from slmops.tasks.request.values import NOT_BLANK, Values

Reason = Annotated[str, Parameter("Kept in the history of the name's champions.", "Reason; kept in the history.")]
Approval = Annotated[
    bool,
    Parameter(
        "Wait until a person approves the new champion in Prefect's UI, at most SLMOPS_TIMEOUT__APPROVAL_S (a day); "
        "without an answer the champion stays.",
        "Ask a person first: in Prefect's UI, or here if no server is set.",
    ),
]


TRAINING, CHAMPION = "Training", "Champion"  # groups of a form


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
            values=MODEL_OR_VERSION,
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
        int | None,
        Parameter("Documents of each lm-eval task; default: all.", option="--limit", values=Values(minimum=1)),
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
            values=Values(pattern=NOT_BLANK),
        ),
    ]
    base: Annotated[
        str,
        Parameter(
            "Checkpoint to fine-tune: folder, Hub id (owner/name), s3:// folder, or store:// address.",
            "Checkpoint to fine-tune: folder, Hub id, s3:// folder or store://.",
            values=Values(pattern=NOT_BLANK),
        ),
    ]
    name: Annotated[str, Parameter("Name of the model.", values=MODEL)]
    evaluation_file: Annotated[
        str | None,
        evaluation_rows(
            "JSONL rows {id, messages, expected} that champion and candidate are compared on; default: eval.jsonl in "
            "the base's folder.",
            "Rows that both versions answer.",
        ),
    ] = None
    approval: Approval = False
    method: Annotated[
        Literal["lora", "full"],
        Parameter("Train a LoRA adapter, which is merged into the base, or all weights.", group=TRAINING),
    ] = "lora"
    epochs: Annotated[int, Parameter("Passes over the dataset, at most.", values=Values(1, 1000), group=TRAINING)] = 3
    learning_rate: Annotated[
        float,
        Parameter(
            "Highest learning rate; full fine-tuning needs a smaller one than LoRA.",
            "Highest learning rate.",
            values=Values(above=0, maximum=1),
            group=TRAINING,
        ),
    ] = 2e-4
    batch_size: Annotated[int, Parameter("Chats per step.", values=Values(1, 4096), group=TRAINING)] = 8
    lora_rank: Annotated[int, Parameter("Rank of the adapter's matrices.", values=Values(1, 1024), group=TRAINING)] = 16
    early_stopping_patience: Annotated[
        int,
        Parameter(
            "Epochs without improvement on held-out chats after which training stops.",
            "Epochs without improvement before training stops.",
            "--patience",
            values=Values(1, 1000),
            group=TRAINING,
        ),
    ] = 2
    max_length: Annotated[
        int | None,
        Parameter(
            "Longest chat, in tokens; default: the base's context.",
            "Longest chat, in tokens.",
            values=Values(8, 10_000_000),
            group=TRAINING,
        ),
    ] = None
    seed: Annotated[int, Parameter("Seed of all random choices.", values=Values(0, 2**32 - 1), group=TRAINING)] = 0
    revision: Annotated[
        str | None,
        Parameter(
            "Revision of a base from the Hub: branch, tag or commit.",
            "Revision of a base from the Hub.",
            group=TRAINING,
        ),
    ] = None
    precisions: Annotated[
        tuple[Precision, ...] | None,
        Parameter(
            "Precisions to build; default: all.",
            "Several with commas, or repeated.",
            "--precision",
            values=Values(elements=1),
            group=BUILD,
        ),
    ] = None
    min_top1_agreement: MinTop1Agreement = None
    max_kl_divergence: MaxKlDivergence = None
    max_quality_loss: MaxQualityLoss = None
    min_output_conformity: MinOutputConformity = None
    max_memory_growth_bytes_per_request: MaxMemoryGrowth = None
    max_cliff_ratio: MaxCliffRatio = None
    promotion: Annotated[
        Literal["if better", "never"],
        Parameter(
            "Promote a candidate that is better than the champion, or never.",
            "Never promote; only compare.",
            "--no-promotion",
            switch="never",
            group=CHAMPION,
        ),
    ] = "if better"
    force: Annotated[
        bool,
        Parameter(
            "Train and deploy even if nothing has changed.", "Train even if nothing has changed.", group=CHAMPION
        ),
    ] = False


@dataclass(frozen=True)
class PromoteParameters:
    """The parameters of a promotion."""

    reference: Annotated[
        str,
        Parameter("The version, NAME@VERSION, or NAME@ALIAS such as home@candidate.", positional=True, values=VERSION),
    ]
    reason: Reason = ""
    approval: Approval = False


@dataclass(frozen=True)
class RollbackParameters:
    """The parameters of a rollback."""

    name: Annotated[str, Parameter("Name of the model.", positional=True, values=MODEL)]
    to: Annotated[
        int | None,
        Parameter(
            "Number of the version to go back to; default: the previous champion. After a rollback, the next one goes "
            "one champion further back, never to a version that was rolled back from.",
            "Version to go back to; default: the previous champion.",
            values=Values(minimum=1),
        ),
    ] = None
    reason: Reason = ""


@dataclass(frozen=True)
class GcParameters:
    """The parameters of a collection."""

    keep: Annotated[
        int | None,
        Parameter(
            "Newest versions of each name that stay; versions with an alias stay too. Default: all versions stay.",
            values=Values(minimum=1),
        ),
    ] = None
    dry_run: Annotated[bool, Parameter("Only report what would be removed.")] = False
