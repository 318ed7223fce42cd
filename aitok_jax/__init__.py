"""aitok_jax: dense maps and instance masks as tokens, predicted by one soft-token solver (arXiv 2301.02229)."""

import importlib

__version__ = "0.1.0"


_MODULES = {"Predictor": "predict.predictor", "DepthTokenizer": "tokenizers", "MaskTokenizer": "tokenizers"}


def __getattr__(name: str):
    if name in _MODULES:
        return getattr(importlib.import_module(f"aitok_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'aitok_jax' has no attribute {name!r}")
