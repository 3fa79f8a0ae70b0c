"""Rendering chat templates within bounds: a template is a program of the checkpoint's author, and may have no end."""

import contextlib
from collections.abc import Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from slmops.infra.checkpoints.chat_template import Render, chat_template_renderer
from slmops.infra.errors import BadInput, DeadlineExceeded
from slmops.infra.process.call import Call, Progress
from slmops.infra.process.supervisor import run_in_child
from slmops.infra.reference.answers import Message

# Real templates render a conversation in milliseconds; most of the time is the start of the process on a busy machine.
DEADLINE_S = 30.0
MAX_CPU_S = 60
# Of the process's address space, Python's own quarter included.
MAX_MEMORY_BYTES = 1_500_000_000
# The built-in conversations render to some thousand characters, and a context of 128k tokens is half a million.
MAX_CHARACTERS = 4_000_000
UNBOUNDED = "chat-template-unbounded"

Conversation = tuple[tuple[Message, ...], bool]


class RenderTemplate(Call[tuple[str | None, ...]]):
    """Render conversations, each with or without a generation prompt; None for one that the template refuses."""

    chat_template: str
    special_tokens: dict[str, str | None]
    conversations: tuple[Conversation, ...]

    def perform(self, progress: Progress) -> tuple[str | None, ...]:
        """Render them in this process, whose resources stay limited; raises `BadInput`."""
        _limit_resources()
        try:
            render = chat_template_renderer(self.chat_template, self.special_tokens)
            found = tuple(_rendered(render, *conversation) for conversation in self.conversations)
        except MemoryError:
            raise _unbounded(f"more than {MAX_MEMORY_BYTES / 1e9:.1f} GB of memory") from None
        if any(text and len(text) > MAX_CHARACTERS for text in found):
            raise _unbounded(f"more than {MAX_CHARACTERS:,} characters for a short conversation")
        return found


def rendered_in_child(
    chat_template: str,
    special_tokens: Mapping[str, str | None],
    conversations: Sequence[tuple[Sequence[Message], bool]],
) -> tuple[str | None, ...]:
    """Render `(messages, add_generation_prompt)` in a process of its own, which is kept within time and memory.

    The answer for a conversation that the template refuses is None. Equal requests of a day are rendered once. Raises
    `BadInput` for a template that is not Jinja, or does not end within the bounds.
    """
    asked = RenderTemplate(
        chat_template=chat_template,
        special_tokens=dict(special_tokens),
        conversations=tuple((tuple(messages), generation) for messages, generation in conversations),
    )
    found = _rendered_once(asked.model_dump_json(), date.today())  # a template may write the date
    if isinstance(found, BadInput):
        raise BadInput(found.message, found.what_to_do, found.code)
    return found


@lru_cache(maxsize=256)
def _rendered_once(request: str, _: date) -> tuple[str | None, ...] | BadInput:
    call = RenderTemplate.model_validate_json(request)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        try:
            return run_in_child(call, deadline_s=DEADLINE_S, log_path=work / "log", work_dir=work).value
        except BadInput as error:
            return error
        except DeadlineExceeded:
            return _unbounded(f"more than {DEADLINE_S:.0f} s")


def _rendered(render: Render, messages: Sequence[Message], generation: bool) -> str | None:
    try:
        return render(messages, generation)
    except MemoryError:
        raise
    except Exception:  # it may raise anything
        return None


def _limit_resources() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit, macOS does not apply it
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        # A long step of C code, such as a power, keeps the process from noticing that its supervisor was killed.
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S))


def _unbounded(what: str) -> BadInput:
    return BadInput(
        f"The chat template takes {what}: it loops or grows.",
        "Give a working one with --chat-template.",
        code=UNBOUNDED,
    )
