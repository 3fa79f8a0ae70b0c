"""All kinds of evidence that a version can have: the records that slmops stores for a manifest and reads again.

A kind is declared with its record's type; this module lists each by its name on disk. Two kinds of the same name would
read each other's records.
"""

from typing import Any

from slmops.infra.storage.evidence import BUILD, DEPLOY, LICENSE, NOTE, SBOM, SELECTION, SIGNATURE, TAG, Kind
from slmops.tasks.build.climbing import CLIMB
from slmops.tasks.build.search import SEARCH
from slmops.tasks.exams.answers import EVALUATION
from slmops.tasks.exams.constraint import CONSTRAINT, RESPONSE_FORMAT
from slmops.tasks.exams.endurance import ENDURANCE
from slmops.tasks.exams.lm_eval import LM_EVAL
from slmops.tasks.exams.measurement import MEASUREMENT
from slmops.tasks.exams.source_lengths import SOURCE_LENGTHS
from slmops.tasks.exams.template_parity import PARITY
from slmops.tasks.exams.text import TEXT
from slmops.tasks.foundry.proof import proof_of
from slmops.tasks.request.parameters import PRECISIONS
from slmops.tasks.training.comparison import RETRAIN
from slmops.tasks.verdict.gate import VERDICT

OF_THE_STORE: tuple[Kind[Any], ...] = (BUILD, DEPLOY, LICENSE, NOTE, RESPONSE_FORMAT, SBOM, SELECTION, SIGNATURE, TAG)
OF_EXAMS: tuple[Kind[Any], ...] = (
    CONSTRAINT,
    ENDURANCE,
    EVALUATION,
    LM_EVAL,
    MEASUREMENT,
    PARITY,
    SOURCE_LENGTHS,
    TEXT,
)
OF_STAGES: tuple[Kind[Any], ...] = (CLIMB, RETRAIN, SEARCH, VERDICT, *map(proof_of, ("fp32", *PRECISIONS)))

KINDS = {kind.name: kind for kind in (*OF_THE_STORE, *OF_EXAMS, *OF_STAGES)}
