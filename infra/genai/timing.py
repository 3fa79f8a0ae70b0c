"""One timed request to a model in onnxruntime-genai."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slmops.infra.errors import StageFailed
from slmops.infra.genai.runtime import GenaiModel
from slmops.infra.reference.chat_prompt import BENCHMARK_TEXT, ChatPrompt, find_chat_prompt

OnLogits = Callable[[NDArray[np.float32]], None]
OnAnswer = Callable[[list[int]], None]


def benchmark_prompt(model: GenaiModel, length: int) -> NDArray[np.int32]:
    """Token ids of a plain English text, repeated to exactly `length` tokens."""
    return np.resize(np.asarray(model.tokenizer.encode(BENCHMARK_TEXT), np.int32), length)


def chat_prompt(model: GenaiModel) -> ChatPrompt:
    """Return chats of any length for a model; raises `StageFailed` when the runtime cannot render a chat."""
    return find_chat_prompt(
        lambda messages: model.render(messages)[1], [int(token) for token in model.tokenizer.encode(BENCHMARK_TEXT)]
    )


@dataclass(frozen=True)
class Timing:
    """The figures of one request: times in ms, throughputs in tokens per s, the latencies after the first token."""

    ttft_ms: float
    prompt_processing_throughput_tps: float
    token_generation_throughput_tps: float
    inter_token_latency_ms: float
    inter_token_latencies_ms: tuple[float, ...]
    e2e_latency_ms: float


def time_request(
    model: GenaiModel,
    prompt_ids: NDArray[np.int32],
    new_tokens: int,
    *,
    on_logits: OnLogits | None = None,
    on_answer: OnAnswer | None = None,
) -> Timing:
    """Time one greedy generation of exactly `new_tokens` tokens; the end token is suppressed.

    The terms are those of onnxruntime-genai's own benchmark/python/benchmark_e2e.py: the prompt is processed by
    `append_tokens`; TTFT is that and the first token's sampling, without creating the generator (whose memory its C++
    twin reuses); one inter-token latency is one `generate_next_token` and the check for the end. `e2e_latency_ms` is
    the whole request, including the creation of the generator, without tokenization.

    `on_logits` is called, off the clock, with the last position's logits after the prompt and after each generated
    token but the last, `on_answer` with the generated tokens. Raises `StageFailed` for a model that cannot be run.
    """
    length = len(prompt_ids) + new_tokens
    clock = time.perf_counter
    gaps_s: list[float] = []
    try:
        asked = clock()
        generator = model.start(length, min_length=length)
        made = clock()
        generator.append_tokens(prompt_ids)
        fed = clock()
        if on_logits:
            on_logits(np.asarray(generator.get_logits())[0, -1])
        sampling = clock()
        generator.generate_next_token()
        done = generator.is_done()
        first = clock()
        while not done:
            before = clock()
            generator.generate_next_token()
            done = generator.is_done()
            gaps_s.append(clock() - before)
            if on_logits:
                on_logits(np.asarray(generator.get_output("logits"))[0, -1])
        if on_answer:
            on_answer([int(token) for token in generator.get_sequence(0)[len(prompt_ids) :]])
    except Exception as error:
        raise model.broken(error) from error
    if len(gaps_s) != new_tokens - 1:
        raise StageFailed(
            f"The model in {model.model_dir} generated {len(gaps_s) + 1} tokens; {new_tokens} were requested.",
            "Its genai_config.json ends generation early: build it again.",
        )
    ttft_s = (fed - made) + (first - sampling)
    return Timing(
        ttft_ms=1000 * ttft_s,
        prompt_processing_throughput_tps=len(prompt_ids) / (fed - made),
        token_generation_throughput_tps=len(gaps_s) / sum(gaps_s),
        inter_token_latency_ms=1000 * sum(gaps_s) / len(gaps_s),
        inter_token_latencies_ms=tuple(1000 * gap for gap in gaps_s),
        e2e_latency_ms=1000 * ((made - asked) + ttft_s + sum(gaps_s)),
    )
