"""Prediction with trained weights; `python -m aitok_jax.predict` is its command line."""
