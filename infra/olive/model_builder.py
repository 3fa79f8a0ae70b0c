"""The Olive pass that builds an onnxruntime-genai model; only Olive's engine imports this module.

Olive 0.13's own `ModelBuilder` pass does not work with onnxruntime-genai 0.18 (it imports a module that is gone and
skips `check_extra_options`). This pass replaces it under the same name; `slmops.infra.olive.engine` configures Olive
accordingly.
"""

from pathlib import Path

from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler, ONNXModelHandler
from olive.passes import Pass
from olive.passes.olive_pass import PassConfigParam
from olive.passes.pass_config import BasePassConfig

from slmops.infra.olive.genai_builder import make_model
from slmops.infra.olive.options import BUILDER_OPTIONS

MODEL_FILE = "model.onnx"


class ModelBuilder(Pass):  # type: ignore[misc]
    """Build an onnxruntime-genai model (ONNX, genai_config.json, tokenizer) from a Hugging Face checkpoint."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            name: PassConfigParam(
                type_=option.type, required=name == "precision", default_value=None, description=option.description
            )
            for name, option in BUILDER_OPTIONS.items()
        }

    @staticmethod
    def is_accelerator_agnostic(accelerator_spec: AcceleratorSpec) -> bool:
        return False

    def _run_for_config(
        self, model: HfModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        options = {name: value for name, value in config.model_dump().items() if value is not None}
        folder = Path(output_model_path)
        folder.mkdir(parents=True, exist_ok=True)
        make_model(Path(model.model_name_or_path), folder, options)
        files = sorted(str(path) for path in folder.iterdir() if not path.name.startswith(MODEL_FILE))
        return ONNXModelHandler(folder, onnx_file_name=MODEL_FILE, model_attributes={"additional_files": files})
