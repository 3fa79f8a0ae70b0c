"""Corrections of faults of onnxruntime-genai 0.18's builder, applied while a model is built: one file per fault.

Each file has `mended(builder, config)`, a context manager: `builder` is the module `onnxruntime_genai.models.builder`,
`config` the checkpoint's config in transformers, which the builder reads next. Models of other families are not
affected. `tests/infra/olive/test_mends.py` removes each correction and fails if the builder no longer needs it.
"""
