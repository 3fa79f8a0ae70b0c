"""What a checkpoint says of itself: in which file it was read, and what of it will be used."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.checkpoints.thinking_switch import thinking_switch
from slmops.infra.checkpoints.tokenizer import TOKENIZER, saved_by, trained_by_file
from slmops.infra.genai.template_files import mend_template
from slmops.infra.records import Json, Record
from slmops.tasks.checkpoint.inspection import Inspection
from slmops.tasks.exams.decoding import GENERATION_CONFIG, EndTokens, read_end_tokens, settle_decoding

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
# Keys of generation_config.json that say how answers are generated.
GENERATION = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "num_beams",
    "max_length", "max_new_tokens",
)  # fmt: skip
MAX_NAMED = 6


class Statement(Record):
    """One fact from a checkpoint's files: the `value` in the file `read_from`, and the `used` one."""

    name: str
    value: str
    read_from: str
    used: str


def statements_of(
    folder: Path, inspection: Inspection, given: Mapping[str, float] | None = None
) -> tuple[Statement, ...]:
    """Return the facts in a checkpoint's files that concern serving; empty for an adapter or an ONNX model.

    `given` are the user's generation parameters. Raises `BadInput` for a file that cannot be read.
    """
    if inspection.kind != "checkpoint" or not (folder / "config.json").is_file():
        return ()
    return (
        *_end_tokens(read_end_tokens(folder)),
        *_template(folder),
        *_thoughts(folder),
        *_tokenizer(folder),
        _tied(folder, inspection),
        _generation(folder, given or {}),
    )


def _end_tokens(ends: EndTokens) -> Iterator[Statement]:
    used = ", ".join(f"{ends.texts.get(token, '')} ({token})".strip() for token in ends.ids) or "none"
    for place, tokens in ends.places.items():
        if tokens:
            value = ", ".join(ends.texts.get(token, str(token)) for token in tokens)
            yield Statement(name="end of an answer", value=value, read_from=place, used=used)
    if not ends.ids:
        yield Statement(name="end of an answer", value="-", read_from="-", used="none: answers never end")


def _template(folder: Path) -> Iterator[Statement]:
    template = read_chat_template(folder)
    if template is None:
        return
    found = [file for file in TEMPLATE_FILES if (folder / file).is_file() and _has_template(folder / file)]
    mended = mend_template(template)
    used = "rewritten for the runtimes: " + "; ".join(mended.mends) if mended.mends else "as it is"
    value = f"{len(template):,} characters"
    yield Statement(name="chat template", value=value, read_from=found[0] if found else "-", used=used)


def _thoughts(folder: Path) -> Iterator[Statement]:
    marks, switch = settle_decoding(folder, {}).marks, thinking_switch(read_chat_template(folder))
    if marks is None:
        return
    place = "chat template" if marks.shown_by == "template" else TOKENIZER
    turned = f"; a row turns them on or off ({switch.variable})" if switch else ""
    value = f"{marks.start} ... {marks.end}".replace("\n", "\\n")
    yield Statement(name="thoughts", value=value, read_from=place, used=f"answers are scored without them{turned}")


def _has_template(path: Path) -> bool:
    return path.suffix == ".jinja" or bool(read_json(path).get("chat_template"))


def _tokenizer(folder: Path) -> Iterator[Statement]:
    if not (folder / TOKENIZER).is_file():
        yield Statement(name="tokenizer", value="vocabulary and merges", read_from="vocab.json", used="converted")
        return
    release = saved_by(folder)
    used = "tokenizer.json" if trained_by_file(folder) else "the tokenizer of transformers' class"
    value = f"trained with transformers {release}" if release else "no release of transformers is named"
    yield Statement(name="tokenizer", value=value, read_from="config.json", used=used)
    added = [token for token in read_json(folder / TOKENIZER).get("added_tokens") or () if isinstance(token, dict)]
    names = [str(token.get("content")) for token in added]
    shown = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else "")
    yield Statement(name="added tokens", value=shown or "none", read_from=TOKENIZER, used="all")


def _tied(folder: Path, inspection: Inspection) -> Statement:
    said = _read(folder / "config.json").get("tie_word_embeddings")
    used = "one matrix for both" if inspection.tied_embeddings else "separate matrices"
    value = "not stated" if said is None else f"tie_word_embeddings: {str(said).lower()}"
    if inspection.own_lm_head:
        value, used = "tie_word_embeddings: true", f"{used}: the weights have an lm_head that differs"
    return Statement(name="embedding and lm_head", value=value, read_from="config.json", used=used)


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
