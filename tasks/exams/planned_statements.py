"""What a checkpoint says of itself before it is converted or merged, for the dry run and `slmops check`."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops.infra.checkpoints.folder import read_json, read_tensor_headers
from slmops.infra.gguf.conversion import ORIGIN_FILE, write_text_files
from slmops.infra.gguf.file import gguf_of, read_gguf
from slmops.infra.storage.folders import link_or_copy
from slmops.infra.transformers.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, changes_one_of_two, tokenizer_folder
from slmops.tasks.checkpoint.inspection import Inspection
from slmops.tasks.exams.decoding import CONFIG, GENERATION_CONFIG, TEMPLATE
from slmops.tasks.exams.statements import (
    CHAT_TEMPLATE,
    IN_GGUF,
    SPLITTING,
    TEMPLATE_FILES,
    TIED,
    Statement,
    splitting,
    statements_of,
    tokenizer_statements,
)

OF_THE_MODEL = (CONFIG, GENERATION_CONFIG)  # a merged model has those of the base
TEMPLATE_PLACES = (TEMPLATE, IN_GGUF[CHAT_TEMPLATE, TEMPLATE_FILES[-1]])


def planned_statements(
    source: Path,
    inspection: Inspection,
    given: Mapping[str, float] | None = None,
    *,
    template: str | None = None,
    base: Path | None = None,
) -> tuple[Statement, ...]:
    """Return the facts of the checkpoint that a folder or a GGUF file becomes, without its weights.

    `given` are the user's generation parameters, `template` is the user's chat template. With an adapter's `base`, its
    `inspection` is the base's; without it, only what the adapter's own files say is known. Raises `BadInput` for a
    file that cannot be read.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        if base is not None:
            found = _merged(source, base, folder, inspection, given, template)
        elif inspection.kind == "adapter":
            found = _adapter_alone(source, folder, template)
        else:
            _place_texts(source, folder)
            _place_template(folder, template)
            found = iter(statements_of(folder, inspection, given))
        return tuple(found if template is None else map(_with_the_users_template, found))


def _merged(
    adapter: Path,
    base: Path,
    folder: Path,
    inspection: Inspection,
    given: Mapping[str, float] | None,
    template: str | None,
) -> Iterator[Statement]:
    tokenizer, changes = tokenizer_folder(adapter, base), changes_one_of_two(adapter, _tensors_of(adapter))
    if tokenizer == adapter:
        _place_texts(base, folder, OF_THE_MODEL.__contains__)
        _place_texts(adapter, folder, _is_of_a_tokenizer)
    else:
        _place_texts(base, folder)
    _place_template(folder, template)
    (folder / ORIGIN_FILE).unlink(missing_ok=True)
    if changes:
        inspection = inspection.model_copy(update={"tied_embeddings": False})
    yield _adapter(adapter, f"merged into {base}")
    for said in statements_of(folder, inspection, given):
        if said.name == SPLITTING and tokenizer == adapter:
            yield _at(splitting(adapter), "adapter")
        elif said.name == TIED and changes:
            yield _at(said.model_copy(update={"used": f"{said.used}: the adapter changes one of the two"}), "base")
        else:
            yield _at(said, "base" if tokenizer == base or said.read_from in OF_THE_MODEL else "adapter")


def _adapter_alone(adapter: Path, folder: Path, template: str | None) -> Iterator[Statement]:
    yield _adapter(adapter, "merged into its base")
    if tokenizer_folder(adapter, folder) == adapter:
        _place_texts(adapter, folder, _is_of_a_tokenizer)
        _place_template(folder, template)
        yield from (_at(said, "adapter") for said in tokenizer_statements(folder))


def _adapter(adapter: Path, used: str) -> Statement:
    config = read_json(adapter / ADAPTER_CONFIG)
    targets = config.get("target_modules")
    layers = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets or "-")
    value = f"{config.get('peft_type')} of rank {config.get('r', '-')} on {layers}"
    return Statement(name="adapter", value=value, read_from=ADAPTER_CONFIG, used=used)


def _tensors_of(adapter: Path) -> Collection[str]:
    return read_tensor_headers(adapter, ADAPTER_WEIGHTS).keys()


def _at(said: Statement, whose: str) -> Statement:
    """Return a statement that says in whose files it was read."""
    if said.read_from == "-":
        return said
    return said.model_copy(update={"read_from": f"{said.read_from} of the {whose}"})


def _with_the_users_template(said: Statement) -> Statement:
    place = said.read_from.partition(" of the ")[0]
    is_of_it = said.name == CHAT_TEMPLATE or place in TEMPLATE_PLACES
    return said.model_copy(update={"read_from": "--chat-template"}) if is_of_it else said


def _is_of_a_tokenizer(name: str) -> bool:
    return name not in (*OF_THE_MODEL, ADAPTER_CONFIG)


def _place_texts(source: Path, folder: Path, is_wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Place the text files of a checkpoint with wanted names in a folder; a GGUF file's are written."""
    if (gguf := gguf_of(source)) is not None:
        write_text_files(read_gguf(gguf), folder)
        for path in [path for path in folder.iterdir() if not is_wanted(path.name)]:
            path.unlink()
        return
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.is_file() and is_wanted(path.name):
            link_or_copy(path, folder / path.name)


def _place_template(folder: Path, template: str | None) -> None:
    if template is None:
        return
    path = folder / TEMPLATE_FILES[-1]
    config = read_json(path) if path.is_file() else {}
    for name in TEMPLATE_FILES:
        (folder / name).unlink(missing_ok=True)
    path.write_text(json.dumps(config | {"chat_template": template}), "utf-8", newline="\n")
