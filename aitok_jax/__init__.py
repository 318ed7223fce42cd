"""aitok_jax: depth maps and instance masks as tokens, predicted by one soft-token solver (arXiv 2301.02229)."""

__version__ = "0.1.0"
