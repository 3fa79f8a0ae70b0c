"""The decoding of a checkpoint's answers: end tokens from four places, and its generation_config.json."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from slmops.infra.checkpoints.chat_template import NOT_JINJA
from slmops.infra.checkpoints.folder import read_chat_template, read_json
from slmops.infra.checkpoints.rendering import rendered_in_child
from slmops.infra.checkpoints.vocabulary import added_tokens
from slmops.infra.errors import BadInput
from slmops.infra.model_screening import GENAI_CONFIG
from slmops.infra.reasoning import ThoughtMarks, thought_marks
from slmops.infra.records import Record
from slmops.infra.reference.decoding import Decoding
from slmops.infra.reference.thinking import Thinking
from slmops.tasks.foundry.prompt_template import special_tokens

Content = Mapping[str, Any]  # of a JSON file
TOKENIZER = "tokenizer"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TEMPLATE = "chat template"
# The places in which transformers looks for end tokens, in this order; the first place that names any applies.
IN_TRANSFORMERS = (GENERATION_CONFIG, CONFIG, TOKENIZER)
SAMPLING = ("temperature", "top_p", "top_k")
STRONGEST_PENALTY = 2.0  # a stronger penalty gives no sensible text
_ANSWER = "slmops-answer-7f3c"  # a text that no template contains or changes


class EndTokens(Record):
    """The ids of the tokens that end an answer, by the places that name them, and their texts if known.

    The places are the tokenizer's `eos_token`, `eos_token_id` of config.json and generation_config.json, and the token
    that the chat template writes after an answer. All of these end an answer that are tokens of the model, which has
    `vocabulary` tokens (None: config.json does not say).
    """

    places: dict[str, tuple[int, ...]]
    texts: dict[int, str]
    vocabulary: int | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """All that are tokens of the model, in ascending order."""
        return tuple(sorted({token for tokens in self.places.values() for token in tokens if self._is_token(token)}))

    @property
    def left_out(self) -> str | None:
        """A warning about numbers that are no tokens of the model, with which no runtime would run it."""
        named = [
            f"{place}: {token}"
            for place, tokens in self.places.items()
            for token in tokens
            if not self._is_token(token)
        ]
        if not named:
            return None
        return f"Numbers that are no tokens of the model are left out of its end tokens ({', '.join(named)})."

    def _is_token(self, token: int) -> bool:
        return token >= 0 and (self.vocabulary is None or token < self.vocabulary)

    @property
    def in_transformers(self) -> tuple[int, ...]:
        """Those that end an answer in transformers."""
        return next((tuple(sorted(set(self.places[place]))) for place in IN_TRANSFORMERS if self.places[place]), ())

    @property
    def warning(self) -> str | None:
        """A warning if the places name different tokens."""
        named = {place: tokens for place, tokens in self.places.items() if tokens}
        ends = [set(tokens) for tokens in named.values()]
        if all(end <= other or other <= end for end in ends for other in ends):
            return None
        told = "; ".join(f"{place}: {', '.join(map(self._shown, tokens))}" for place, tokens in named.items())
        return f"The checkpoint's files name different tokens as the end of an answer ({told}). All of them end one."

    def _shown(self, token: int) -> str:
        return f"{self.texts[token]} ({token})" if token in self.texts else str(token)


def read_end_tokens(folder: Path) -> EndTokens:
    """Read a checkpoint's end tokens from its files; cached, because parsing a large vocabulary takes a second."""
    stats = {path: path.stat() for path in sorted(folder.glob("*.j*"))}
    return _read_end_tokens(folder, tuple((path.name, stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()))


@lru_cache(maxsize=16)
def _read_end_tokens(folder: Path, _stamps: tuple[tuple[str, int, int], ...]) -> EndTokens:
    tokenizer_config = _json_or_nothing(folder / "tokenizer_config.json")
    tokenizer = _json_or_nothing(folder / "tokenizer.json")
    added = _added_tokens(tokenizer, tokenizer_config)
    config = _json_or_nothing(folder / CONFIG)
    text_config = config.get("text_config")
    in_config = config if config.get("eos_token_id") is not None or not isinstance(text_config, dict) else text_config
    names = special_tokens(tokenizer_config)
    rows = in_config.get("vocab_size", config.get("vocab_size"))
    special = {text: token for text, (token, is_special) in added.items() if is_special}
    end = _id_of(names["eos_token"], added, tokenizer)
    return EndTokens(
        places={
            TOKENIZER: () if end is None else (end,),
            CONFIG: _ids(in_config.get("eos_token_id")),
            GENERATION_CONFIG: _ids(_json_or_nothing(folder / GENERATION_CONFIG).get("eos_token_id")),
            TEMPLATE: _end_in_template(folder, names, special),
        },
        texts={token: text for text, (token, _) in added.items()},
        vocabulary=rows if isinstance(rows, int) and rows > 0 else None,
    )


def _json_or_nothing(path: Path) -> Content:
    return read_json(path) if path.is_file() else {}


def _added_tokens(tokenizer: Content, tokenizer_config: Content) -> dict[str, tuple[int, bool]]:
    """Return text -> id and whether it is special."""
    listed = [(token.get("id"), token) for token in tokenizer.get("added_tokens") or () if isinstance(token, dict)]
    decoder = tokenizer_config.get("added_tokens_decoder")
    listed += [(int(number), token) for number, token in decoder.items()] if isinstance(decoder, dict) else []
    return {
        token["content"]: (number, bool(token.get("special")))
        for number, token in listed
        if isinstance(number, int) and isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def _id_of(text: str | None, added: Mapping[str, tuple[int, bool]], tokenizer: Content) -> int | None:
    if text is None or text in added:
        return added[text][0] if text else None
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found = vocabulary.get(text) if isinstance(vocabulary, dict) else None
    return found if isinstance(found, int) else None


def _ids(value: object) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(value for value in values if isinstance(value, int) and not isinstance(value, bool))


def _end_in_template(folder: Path, names: Mapping[str, str | None], special: Mapping[str, int]) -> tuple[int, ...]:
    """Return the special token that the chat template writes directly after the last answer of a conversation."""
    template = read_chat_template(folder)
    if template is None:
        return ()
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        (text,) = rendered_in_child(template, names, [(messages, False)])
    except BadInput as error:
        if error.code == NOT_JINJA:  # nothing can use it
            raise
        text = None
    if text is None:  # a refusal of the template is reported at its use
        return ()
    behind = text.rpartition(_ANSWER)[2].lstrip() if _ANSWER in text else ""
    found = max((token for token in special if token and behind.startswith(token)), key=len, default=None)
    return () if found is None else (special[found],)


class Settled(Record):
    """The decoding of a checkpoint's answers, and warnings for the user.

    `end_token_ids` are all of its end tokens, `decoding` has the differences from transformers' default. `marks` are
    those of the model's thoughts (None: it has none).
    """

    end_token_ids: tuple[int, ...]
    decoding: Decoding
    marks: ThoughtMarks | None
    warnings: tuple[str, ...]

    def answering(self, max_thought_tokens: int) -> Decoding:
        """Return the decoding of evaluated answers, whose thoughts may have so many tokens."""
        thinking = Thinking(marks=self.marks, max_tokens=max_thought_tokens) if self.marks else None
        return self.decoding.model_copy(update={"thinking": thinking})


def settle_decoding(folder: Path, given: Mapping[str, float]) -> Settled:
    """Determine the decoding of a checkpoint's answers; `given` are the user's generation parameters, with priority.

    The source and its variants are judged greedily, with the repetition penalty of generation_config.json and until
    the same end tokens; the file's sampling parameters are kept for serving, and reported. An onnxruntime-genai folder
    has no source; its own penalty applies.
    """
    template = read_chat_template(folder)
    if (folder / GENAI_CONFIG).is_file():
        search = read_json(folder / GENAI_CONFIG).get("search")
        penalty = _penalty(search if isinstance(search, dict) else {}, given)
        decoding, marks = Decoding(repetition_penalty=penalty or 1.0), thought_marks(template, added_tokens(folder))
        return Settled(end_token_ids=(), decoding=decoding, marks=marks, warnings=())
    ends, generation = read_end_tokens(folder), _json_or_nothing(folder / GENERATION_CONFIG)
    penalty, warnings = _penalty(generation, given), [said for said in (ends.warning, ends.left_out) if said]
    if penalty is None:
        warnings.append(
            f"The repetition penalty of {GENERATION_CONFIG} is {generation['repetition_penalty']!r}: it was left out, "
            f"because it is not a number above 0 and up to {STRONGEST_PENALTY:g}."
        )
    warnings += _on_sampling(generation, given)
    decoding = Decoding(
        end_token_ids=ends.ids if ends.ids != ends.in_transformers else None, repetition_penalty=penalty or 1.0
    )
    marks = thought_marks(template, ends.texts.values())
    return Settled(end_token_ids=ends.ids, decoding=decoding, marks=marks, warnings=tuple(warnings))


def _penalty(generation: Content, given: Mapping[str, float]) -> float | None:
    found = given.get("repetition_penalty", generation.get("repetition_penalty"))
    if found is None:
        return 1.0
    valid = isinstance(found, int | float) and not isinstance(found, bool) and 0 < found <= STRONGEST_PENALTY
    return float(found) if valid else None


def _on_sampling(generation: Content, given: Mapping[str, float]) -> Iterator[str]:
    if not generation.get("do_sample") or "temperature" in given:
        return
    values = {name: given.get(name, generation.get(name)) for name in SAMPLING}
    shown = ", ".join(f"{name} {value:g}" for name, value in values.items() if isinstance(value, int | float))
    yield (
        f"{GENERATION_CONFIG} requests sampling{f' ({shown})' if shown else ''}: that is kept as the model's default, "
        "and the answers that were judged are greedy."
    )
