"""Chat templates as models of five families ship them."""

from pathlib import Path

TEMPLATES = Path(__file__).parent

# Chat template (a file of TEMPLATES) -> its style in tests.support.checkpoints, and whether it takes a system message.
FAMILIES = {
    "chatml": ("chatml", True),
    "qwen2.5": ("chatml", True),
    "qwen3": ("chatml", True),
    "llama-3": ("llama3", True),
    "llama-3.2": ("llama3", True),
    "phi-3": ("phi3", True),
    "mistral-v0.1": ("mistral", True),
    "mistral-v0.3": ("mistral", True),
    "gemma-2": ("gemma", False),
    "gemma-3": ("gemma", True),
}
