"""A variant's tokenizer.json, rewritten so that onnxruntime-genai gives the tokens of the checkpoint's tokenizer.

genai 0.18 and Foundry Local read the file in their own way. `tests/infra/genai/test_tokenizer_files.py` fails for
a correction that a newer runtime no longer needs.
"""

from slmops.infra.checkpoints.tokenizer import SPLITTING_PARTS, TokenizerFile, splitting_parts

OWN_PARTS = "the checkpoint's own {parts} replace those of transformers' class"
NO_STRIP = "the decoder's step Strip, for which genai adds a space after every control token, is left out"
METASPACE = "a space before every text is written as Metaspace, so that genai merges pieces as transformers does"


def mend_tokenizer(built: TokenizerFile, own: TokenizerFile | None) -> tuple[TokenizerFile, tuple[str, ...]]:
    """Return a tokenizer.json for the runtimes, and the corrections.

    `built` is the model builder's file, `own` the checkpoint's file if the model was trained with it, else None.
    Vocabulary, merges and added tokens stay as they are.
    """
    mended, mends = dict(built), list[str]()
    if own is not None and splitting_parts(own) != splitting_parts(built):
        if _begins_texts_with_a_space(own):
            mended |= {"normalizer": None, "pre_tokenizer": _metaspace("always")}
            mends.append(METASPACE)
        else:
            mended |= {part: own.get(part) for part in (*SPLITTING_PARTS, "decoder")}
            mends.append(OWN_PARTS.format(parts=" and ".join(SPLITTING_PARTS)))
    if _scheme(mended) in ("first", "never") and _steps(mended) != _steps(mended, without="Strip"):
        mended["decoder"] = {**mended["decoder"], "decoders": _steps(mended, without="Strip")}
        mends.append(NO_STRIP)
    return mended, tuple(mends)


def _begins_texts_with_a_space(tokenizer: TokenizerFile) -> bool:
    """Whether a space is added before every text between control tokens, as in SentencePiece models such as Llama 2."""
    normalizer: TokenizerFile = tokenizer.get("normalizer") or {}
    kinds = [part.get("type") for part in normalizer.get("normalizers", [])]
    return kinds == ["Prepend", "Replace"] and tokenizer.get("pre_tokenizer") is None


def _metaspace(scheme: str) -> TokenizerFile:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}


def _scheme(tokenizer: TokenizerFile) -> str | None:
    splitter: TokenizerFile = tokenizer.get("pre_tokenizer") or {}
    return splitter.get("prepend_scheme") if splitter.get("type") == "Metaspace" else None


def _steps(tokenizer: TokenizerFile, without: str = "") -> list[TokenizerFile]:
    decoder: TokenizerFile = tokenizer.get("decoder") or {}
    return [step for step in decoder.get("decoders", []) if step.get("type") != without]
