"""aitok_jax: depth maps and instance masks as tokens, predicted by one soft-token solver (arXiv 2301.02229)."""

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "Predictor":
        from aitok_jax.predict import Predictor

        return Predictor
    raise AttributeError(f"module 'aitok_jax' has no attribute {name!r}")
