"""TFDS builders of prepared data; `aitok_jax.data.prepare` runs them."""
