"""Whether the source checkpoint answers chats of given lengths, like a variant in the sweep."""

from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import Question
from slmops.infra.reference.chat_prompt import BENCHMARK_TEXT, find_chat_prompt
from slmops.infra.transformers.answers import end_token_ids, render_question
from slmops.infra.transformers.calls import AnswerAtLengths
from slmops.infra.transformers.loading import load_to_answer


def answer_at_lengths(call: AnswerAtLengths, progress: Progress) -> tuple[bool, ...]:
    """Return for each length whether the greedy answer decodes to a text; its end tokens are suppressed, as in the
    sweep.

    A length that the template alone fills counts as answered. Raises `StageFailed` for a checkpoint that cannot be
    loaded.
    """
    import torch
    from transformers import GenerationConfig

    torch.set_num_threads(call.threads)
    progress(0, 1, "loading the source checkpoint")
    tokenizer, model = load_to_answer(call.checkpoint_dir)
    text_ids = tokenizer(BENCHMARK_TEXT, add_special_tokens=False)["input_ids"]
    chat = find_chat_prompt(
        lambda messages: render_question(tokenizer, Question(id=1, messages=tuple(messages)))[1], text_ids
    )
    ends = sorted(end_token_ids(tokenizer, model, call.decoding))
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        min_new_tokens=call.new_tokens,
        max_new_tokens=call.new_tokens,
    )
    answered = []
    for done, length in enumerate(call.prompt_tokens):
        progress(done, len(call.prompt_tokens), f"source, {length} prompt tokens")
        ids = chat.of_length(length)
        if ids is None:
            answered.append(True)
            continue
        with torch.inference_mode():
            output = model.generate(input_ids=torch.tensor(ids[None].astype("int64")))
        text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        answered.append(bool(text))
    return tuple(answered)
