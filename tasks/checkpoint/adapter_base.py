"""The base of a LoRA adapter: the model in floating point that the adapter is merged into."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slmops.infra.errors import BadInput
from slmops.infra.transformers.adapters import read_adapter_config, tokenizer_folder
from slmops.tasks.checkpoint.inspection import Inspection, check_tokenizer_files, inspect_checkpoint

# Endings of names on the Hub of copies that QLoRA loads in four bits; the model itself has the name without.
QUANTIZED_COPIES = ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit")


def base_of(adapter: Path, given: str | None) -> str:
    """Return the base that is given, or that the adapter names; raises `BadInput` if there is none."""
    base = given or read_adapter_config(adapter)
    if not base:
        raise BadInput(
            f"{adapter} does not say which base it belongs to.", "Name it with --base.", code="adapter-base-unknown"
        )
    return base


@contextmanager
def usable_base(base: str) -> Iterator[None]:
    """Turn a `BadInput` about the base into one that says whose base it is, and what to give with --base.

    A quantized copy is refused by its name before it is fetched: only a model in floating point can be merged.
    """
    whole = next((base.removesuffix(ending) for ending in QUANTIZED_COPIES if base.endswith(ending)), None)
    advice = f"Name the model in floating point that the adapter was trained on: --base {whole or 'FOLDER_OR_HUB_ID'}."
    if whole and not Path(base).expanduser().exists():
        raise BadInput(
            f"The adapter's base {base} is a quantized copy, and only a model in floating point can be merged.",
            advice,
            code="checkpoint-quantized",
        )
    try:
        yield
    except BadInput as error:
        raise BadInput(f"The adapter's base {base} cannot be used: {error.message}", advice, code=error.code) from error


def inspect_for_merge(adapter: Path, base: Path, *, chat_template_given: bool = False) -> Inspection:
    """Inspect the base on this machine that an adapter is merged into, and the tokenizer that the result will have.

    Raises `BadInput` for a base that cannot be used, and for a tokenizer that cannot.
    """
    with usable_base(str(base)):
        inspection = inspect_checkpoint(base, chat_template_given=True)
        if inspection.kind != "checkpoint":
            raise BadInput("It is not a whole checkpoint.", code="adapter-base-not-whole")
    if tokenizer_folder(adapter, base) == adapter:
        check_tokenizer_files(adapter, chat_template_given)
    else:
        inspect_checkpoint(base, chat_template_given=chat_template_given)
    return inspection
