"""llama.cpp's own converter, which turns checkpoints into GGUF files, on tokenizers that it does not know."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.real_models import real_model

# It knows pre-tokenizers by a hash of what they make of a text, and for some families it wants a SentencePiece model. A
# tokenizer that was trained for a test has Qwen2's pre-tokenizer and none of either.
SCRIPT = """\
import json, runpy, sys

source, asked = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, f"{source}/gguf-py"]
from conversion import gemma
from conversion.base import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
gemma.Gemma2Model.set_vocab = gemma.Gemma3Model.set_vocab = TextModel._set_vocab_gpt2
for checkpoint, target, kind in asked:
    sys.argv[:] = [f"{source}/convert_hf_to_gguf.py", checkpoint, "--outfile", target, "--outtype", kind]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert_to_gguf(asked: list[tuple[Path, Path, str]]) -> None:
    """Convert checkpoints: each with the file to write and the type of its matrices (`f32`, `f16`, `bf16`, `q8_0`).

    All in one process, whose imports take longer than the work.
    """
    source = real_model("llama-cpp-converter")
    told = json.dumps([(str(checkpoint), str(target), kind) for checkpoint, target, kind in asked])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), told],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
