"""Answers that a JSON Schema constrains, as a grammar that the runtime follows, beside the same answers without it."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from slmops.infra.errors import reason_of
from slmops.infra.genai.constraint_calls import AnswerBySchema, BoundAnswer, FindSchemaFault, TimedAnswer
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.process.call import Progress
from slmops.infra.records import Json

BY_SCHEMA = "json_schema"  # the runtime's name of this kind of guidance


def answer_by_schema(call: AnswerBySchema, progress: Progress) -> tuple[BoundAnswer, ...]:
    """Answer questions greedily, each with the schema and without; raises `StageFailed` for a model that cannot run."""
    progress(0, len(call.rows), "loading the model")
    model = GenaiModel(call.model_dir, threads=call.threads, repetition_penalty=call.decoding.repetition_penalty)
    thinking, schema = call.decoding.thinking, json.dumps(call.json_schema)
    most = call.max_new_tokens + (thinking.max_tokens if thinking else 0)
    answers = []
    for done, question in enumerate(call.rows):
        progress(done, len(call.rows), "answers by the schema")
        prompt, prompt_ids = model.render(question.messages, question.tools, question.template_prefix)
        free = _timed(model, prompt_ids, most)
        if thinking:
            split = thinking.marks.split(free.answer, opened=thinking.marks.is_opened_by(prompt))
            free = free.model_copy(update={"answer": split.text})
        bound = _timed(model, prompt_ids, call.max_new_tokens, schema)
        answers.append(BoundAnswer(id=question.id, free=free, bound=bound))
    return tuple(answers)


def _timed(model: GenaiModel, prompt_ids: Sequence[int], max_new_tokens: int, schema: str | None = None) -> TimedAnswer:
    room = model.room_after(prompt_ids, max_new_tokens)
    try:
        begun = time.perf_counter()
        generator = model.start(len(prompt_ids) + room, guidance=(BY_SCHEMA, schema) if schema else None)
        made = time.perf_counter()
        generator.append_tokens(np.asarray(prompt_ids, np.int32))
        started = time.perf_counter()
        while not generator.is_done():
            generator.generate_next_token()
        seconds = time.perf_counter() - started
        generated = [int(token) for token in generator.get_sequence(0)[len(prompt_ids) :]]
    except Exception as error:
        raise model.broken(error) from error
    return TimedAnswer(
        answer=model.decode(model.without_end(generated)),
        new_tokens=len(generated),
        seconds=seconds,
        start_ms=(made - begun) * 1000,
    )


def schema_fault(call: FindSchemaFault, progress: Progress) -> tuple[str, ...]:
    """Return why the runtime makes no grammar of a schema; nothing if it does.

    It tells this only when a model is about to answer, so it is given the smallest one: of bytes, without weights.
    """
    import onnxruntime_genai as og

    progress(0, 1, "the output schema")
    with TemporaryDirectory() as folder:
        write_smallest_model(Path(folder))
        model = og.Model(folder)
        params = og.GeneratorParams(model)
        params.set_guidance(BY_SCHEMA, json.dumps(call.json_schema))
        try:
            og.Generator(model, params)
        except Exception as error:  # the binding raises RuntimeError and, for some faults, bare exceptions
            return (reason_of(error).removeprefix("Error creating grammar: "),)
        finally:
            del params, model  # it keeps files open, which Windows could not remove
    return ()


def write_smallest_model(folder: Path, context_length: int = 8) -> None:
    """Write a model folder of the runtime whose tokens are bytes, and whose logits are all equal."""
    import onnx
    from onnx import TensorProto, helper
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    end = "<|end|>"
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), end]
    tokenizer = Tokenizer(models.BPE(vocab={text: token for token, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), "utf-8", newline="\n")
    size, end_id = len(alphabet), len(alphabet) - 1
    nodes = [
        helper.make_node("Unsqueeze", ["input_ids", "axis"], ["column"]),
        helper.make_node("Cast", ["column"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["numbers", "zeros"], ["logits"]),
    ]
    shape = ["batch", "length"]
    graph = helper.make_graph(
        nodes,
        "smallest",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, size])],
        [
            helper.make_tensor("axis", TensorProto.INT64, [1], [2]),
            helper.make_tensor("zeros", TensorProto.FLOAT, [1, 1, size], [0.0] * size),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(_config(context_length, size, end_id)), "utf-8", newline="\n")


def _config(context_length: int, vocabulary_size: int, end_id: int) -> Json:
    decoder: Json = {
        "filename": "model.onnx",
        **dict.fromkeys(("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads"), 1),
        "num_hidden_layers": 0,
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"logits": "logits"},
    }
    tokens: Json = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end_id)
    sizes: Json = {"context_length": context_length, "vocab_size": vocabulary_size}
    return {"model": {"type": "qwen2", **sizes, **tokens, "decoder": decoder}, "search": {"max_length": context_length}}
