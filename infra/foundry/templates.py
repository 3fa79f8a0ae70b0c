"""The number of tokens in Foundry Local's prompts of conversations. The runtime reports nothing else about them."""

from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version

from slmops.infra.errors import StageFailed
from slmops.infra.foundry.calls import CountedPrompt, CountedPrompts, CountPrompts
from slmops.infra.foundry.runtime import SDK, count_prompt_tokens, open_folder
from slmops.infra.process.call import Progress
from slmops.infra.reference.answers import Message


def count(call: CountPrompts, progress: Progress) -> CountedPrompts:
    """Count the tokens of conversations' prompts with an unregistered model folder.

    Raises `StageFailed` when the runtime does not start or does not load the folder.
    """
    progress(0, 1, "Foundry Local")
    model = open_folder(call.model_dir, call.cache_dir)
    conversations = {name: _counted(model, messages) for name, messages in call.conversations.items()}
    return CountedPrompts(conversations=conversations, versions={SDK: version(SDK)})


def _counted(model: object, messages: Sequence[Message]) -> CountedPrompt:
    prompt_tokens, reason = None, None
    started = datetime.now().isoformat()
    try:
        prompt_tokens = count_prompt_tokens(model, messages)
    except StageFailed as error:
        reason = error.message
    return CountedPrompt(prompt_tokens=prompt_tokens, error=reason, moments=(started, datetime.now().isoformat()))
