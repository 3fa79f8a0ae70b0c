"""What a checkpoint says of itself: in which file it was read, and what of it will be used."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.checkpoints.thinking_switch import thinking_switch
from slmops.infra.checkpoints.tokenizer import TOKENIZER, saved_by, trained_by_file
from slmops.infra.genai.template_files import mend_template
from slmops.infra.gguf.conversion import ORIGIN_FILE
from slmops.infra.records import Json, Record
from slmops.infra.storage.version import Version
from slmops.tasks.checkpoint.inspection import Inspection
from slmops.tasks.exams.decoding import CONFIG, GENERATION_CONFIG, TEMPLATE, EndTokens, read_end_tokens, settle_decoding
from slmops.tasks.exams.decoding import TOKENIZER as NAMED_END

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
# Keys of generation_config.json that say how answers are generated.
GENERATION = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams",
    "max_length", "max_new_tokens",
)  # fmt: skip
MAX_NAMED = 6
END, CHAT_TEMPLATE, THOUGHTS, ADDED = "end of an answer", "chat template", "thoughts", "added tokens"
TIED, SPLITTING = "embedding and lm_head", "tokenizer"
# Where a GGUF file has what its conversion writes into a file, by the fact and that file.
IN_GGUF = {
    (END, NAMED_END): "tokenizer.ggml.eos_token_id",
    (END, CONFIG): "tokenizer.ggml.eos_token_id",
    (END, GENERATION_CONFIG): "tokenizer.ggml.eos_token_id, eot_token_id, eom_token_id",
    (END, TEMPLATE): "tokenizer.chat_template",
    (CHAT_TEMPLATE, "tokenizer_config.json"): "tokenizer.chat_template",
    (THOUGHTS, TEMPLATE): "tokenizer.chat_template",
    (THOUGHTS, TOKENIZER): "tokenizer.ggml.tokens",
    (ADDED, TOKENIZER): "tokenizer.ggml.token_type",
}


class Statement(Record):
    """One fact from a checkpoint's files: the `value` in the file `read_from`, and the `used` one."""

    name: str
    value: str
    read_from: str
    used: str


STATEMENTS = TypeAdapter(tuple[Statement, ...] | None)


def statements_of(
    folder: Path, inspection: Inspection, given: Mapping[str, float] | None = None
) -> tuple[Statement, ...]:
    """Return the facts in a checkpoint's files that concern serving; empty for an adapter or an ONNX model.

    `given` are the user's generation parameters. The facts of a converted GGUF file name the keys of its metadata.
    Raises `BadInput` for a file that cannot be read.
    """
    if inspection.kind != "checkpoint" or not (folder / CONFIG).is_file():
        return ()
    if (folder / ORIGIN_FILE).is_file():
        return _of_gguf(folder, inspection, given or {})
    return (
        *tokenizer_statements(folder),
        splitting(folder),
        _tied(folder, inspection),
        _generation(folder, given or {}),
    )


def recorded_statements(version: Version) -> tuple[Statement, ...] | None:
    """Return the facts in the report of a version's last deploy, with the generation parameters that were given then.

    None if there are none, or if another version of slmops recorded them in another form.
    """
    try:
        return STATEMENTS.validate_python((version.deployed.model_extra or {}).get("statements") or None)
    except ValidationError:
        return None


def tokenizer_statements(folder: Path) -> tuple[Statement, ...]:
    """Return the facts in the files of a tokenizer, which needs no model beside it."""
    return (*_end_tokens(read_end_tokens(folder)), *_template(folder), *_thoughts(folder), *_added(folder))


def _of_gguf(folder: Path, inspection: Inspection, given: Mapping[str, float]) -> tuple[Statement, ...]:
    quantization = read_json(folder / ORIGIN_FILE).get("quantization")
    found = (
        said.model_copy(update={"read_from": IN_GGUF.get((said.name, said.read_from), said.read_from)})
        for said in tokenizer_statements(folder)
    )
    used = f"turned into {inspection.dtype}" if quantization else "as they are"
    converted = {"read_from": "tokenizer.ggml.tokens", "used": "converted to tokenizer.json"}
    tied = inspection.tied_embeddings
    return (
        *dict.fromkeys(found),  # config.json and the tokenizer name the same end
        Statement(name=SPLITTING, value="vocabulary and merges", **converted),
        Statement(
            name=TIED,
            value="no tensor output.weight" if tied else "a tensor output.weight",
            read_from="tensors",
            used="one matrix for both" if tied else "separate matrices",
        ),
        Statement(name="weights", value=quantization or inspection.dtype, read_from="tensors", used=used),
        _generation(folder, given),
    )


def _end_tokens(ends: EndTokens) -> Iterator[Statement]:
    used = ", ".join(f"{ends.texts.get(token, '')} ({token})".strip() for token in ends.ids) or "none"
    for place, tokens in ends.places.items():
        if tokens:
            value = ", ".join(ends.texts.get(token, str(token)) for token in tokens)
            yield Statement(name=END, value=value, read_from=place, used=used)
    if not ends.ids:
        yield Statement(name=END, value="-", read_from="-", used="none: answers never end")


def _template(folder: Path) -> Iterator[Statement]:
    template = read_chat_template(folder)
    if template is None:
        return
    found = [file for file in TEMPLATE_FILES if (folder / file).is_file() and _has_template(folder / file)]
    mended = mend_template(template)
    used = "rewritten for the runtimes: " + "; ".join(mended.mends) if mended.mends else "as it is"
    value = f"{len(template):,} characters"
    yield Statement(name=CHAT_TEMPLATE, value=value, read_from=found[0] if found else "-", used=used)


def _thoughts(folder: Path) -> Iterator[Statement]:
    marks, switch = settle_decoding(folder, {}).marks, thinking_switch(read_chat_template(folder))
    if marks is None:
        return
    place = TEMPLATE if marks.shown_by == "template" else TOKENIZER
    turned = f"; a row turns them on or off ({switch.variable})" if switch else ""
    value = f"{marks.start} ... {marks.end}".replace("\n", "\\n")
    yield Statement(name=THOUGHTS, value=value, read_from=place, used=f"answers are scored without them{turned}")


def _has_template(path: Path) -> bool:
    return path.suffix == ".jinja" or bool(read_json(path).get("chat_template"))


def splitting(folder: Path) -> Statement:
    """Return by which file or class the tokenizer of a folder splits texts."""
    if not (folder / TOKENIZER).is_file():
        return Statement(name=SPLITTING, value="vocabulary and merges", read_from="vocab.json", used="converted")
    release = saved_by(folder)
    used = "tokenizer.json" if trained_by_file(folder) else "the tokenizer of transformers' class"
    value = f"trained with transformers {release}" if release else "no release of transformers is named"
    return Statement(name=SPLITTING, value=value, read_from=CONFIG if release else "-", used=used)


def _added(folder: Path) -> Iterator[Statement]:
    if not (folder / TOKENIZER).is_file():
        return
    added = [token for token in read_json(folder / TOKENIZER).get("added_tokens") or () if isinstance(token, dict)]
    names = [str(token.get("content")) for token in added]
    shown = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else "")
    yield Statement(name=ADDED, value=shown or "none", read_from=TOKENIZER, used="all")


def _tied(folder: Path, inspection: Inspection) -> Statement:
    said = _read(folder / CONFIG).get("tie_word_embeddings")
    used = "one matrix for both" if inspection.tied_embeddings else "separate matrices"
    value = "not stated" if said is None else f"tie_word_embeddings: {str(said).lower()}"
    if inspection.own_lm_head:
        value, used = "tie_word_embeddings: true", f"{used}: the weights have an lm_head that differs"
    return Statement(name=TIED, value=value, read_from=CONFIG, used=used)


def _generation(folder: Path, given: Mapping[str, float]) -> Statement:
    said = {key: value for key, value in _read(folder / GENERATION_CONFIG).items() if key in GENERATION}
    settled = settle_decoding(folder, given)
    penalty = settled.decoding.repetition_penalty
    judged = "judged greedily" + (f" with repetition penalty {penalty:g}" if penalty != 1 else "")
    served = ", ".join(f"{key} {value:g}" for key, value in given.items())
    return Statement(
        name="generation defaults",
        value=", ".join(f"{key}: {value}" for key, value in said.items()) or "none",
        read_from=GENERATION_CONFIG if said else "-",
        used=f"{judged}; served with {served}" if served else f"{judged}; the file's are the served model's",
    )


def _read(path: Path) -> Json:
    return read_json(path) if path.is_file() else {}
