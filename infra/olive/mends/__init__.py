"""What onnxruntime-genai 0.18's builder gets wrong, mended while a model is made: one file a fault.

Each file has `mended(builder, config)`, a context manager: `builder` is the module `onnxruntime_genai.models.builder`,
`config` the checkpoint's config as transformers has read it, which the builder reads next. A model of another family
passes through untouched. `tests/infra/olive/test_mends.py` takes every mend away and fails when the builder needs it
no more.
"""
