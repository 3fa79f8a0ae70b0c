"""`slmops chat`: talk to a registered model through Foundry Local."""

import sys

from slmops.deployments.cli.output import print_line, print_note, print_piece
from slmops.infra.errors import BadInput
from slmops.infra.foundry.chat import FoundryChat
from slmops.infra.foundry.model_folder import model_folder
from slmops.infra.model_screening import screen_model
from slmops.infra.settings import Settings
from slmops.infra.storage.version import Version

MAX_NEW_TOKENS = 512


def chat_with(version: Version, settings: Settings) -> None:
    """Read the user's turns from standard input and stream the answers; an empty line ends the chat.

    Raises `BadInput` if no variant of the version is registered, or if no runtime may open it.
    """
    precision, model_id = _registered_variant(version)
    folder = model_folder(settings.foundry_dir, version.name, precision, version.number)
    if folder.is_dir():  # an earlier slmops may have registered a model that is refused today
        screen_model(folder)
    messages: list[dict[str, str]] = []
    with FoundryChat(settings.foundry_dir, model_id, log_path=settings.cache_dir / "logs" / "chat.log") as chat:
        print_note(f"{model_id} is loaded ({chat.load_ms:.0f} ms). An empty line ends the chat.")
        while text := _next_turn():
            messages.append({"role": "user", "content": text})
            answer = ""
            for piece in chat.answer(messages, MAX_NEW_TOKENS):
                answer += piece
                print_piece(piece)
            print_line("")
            messages.append({"role": "assistant", "content": answer})


def _next_turn() -> str:
    if sys.stdin.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    return sys.stdin.readline().strip()


def _registered_variant(version: Version) -> tuple[str, str]:
    """Return precision and id of the variant that may serve, else of the smallest registered one."""
    ids = {variant.precision: variant.foundry_model_id for variant in version.deployed.variants}
    serving = version.serving
    for precision in ((serving.precision,) if serving else ()) + ("int4", "int8", "fp16", "fp32"):
        if model_id := ids.get(precision):
            return precision, model_id
    raise BadInput(f"No variant of {version.reference} is registered.", "Deploy it again; slmops show says why.")
