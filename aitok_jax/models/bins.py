"""The comparison tokenizer of the paper's appendix B: down-sampling and uniform bins, with the interface of `VQVAE`."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from aitok_jax.models.layers import check_sizes
from aitok_jax.models.vqvae import token_grid


class BinsTokenizer(nn.Module):
    """Depth maps to bins of the down-sampled map and back; nothing is learned.

    Tokenizer: bilinear (antialiased) down-sampling by `downsample`, then `num_codes` uniform bins over 0..max_value
    metres. Pixels without annotation take no part in the mean; a cell without any annotation falls into bin 0.
    Detokenizer: bin centre, then bilinear up-sampling.
    """

    downsample: int = 32
    num_codes: int = 128
    max_value: float = 10.0
    soft_temperature: float = 1.0

    def __post_init__(self):
        check_sizes(self, "downsample", "num_codes")
        super().__post_init__()

    def encode(self, x_BHWC: jax.Array) -> jax.Array:
        """f32[B,H,W,1] metres -> int32[B,h,w]."""
        b, h, w, _ = x_BHWC.shape
        small = (b, *token_grid(h, w, self.downsample), 1)
        annotated = jax.image.resize((x_BHWC > 0).astype(jnp.float32), small, "bilinear")
        total = jax.image.resize(jnp.maximum(x_BHWC, 0.0), small, "bilinear")
        metres = jnp.where(annotated > 0, total / jnp.maximum(annotated, 1e-6), 0.0)[..., 0]
        codes = jnp.floor(metres * (self.num_codes / self.max_value))
        return jnp.clip(codes, 0, self.num_codes - 1).astype(jnp.int32)

    def decode(self, codes: jax.Array) -> jax.Array:
        """int[B,h,w] -> f32[B,H,W,1] metres."""
        return self._upsample(self._centres[codes])

    def decode_soft(self, logits: jax.Array) -> jax.Array:
        """f32[B,h,w,K] logits -> f32[B,H,W,1] metres, the expectation over the bins' centres."""
        return self.decode_probabilities(jax.nn.softmax(self.soft_temperature * logits.astype(jnp.float32)))

    def decode_probabilities(self, probabilities: jax.Array) -> jax.Array:
        """f32[B,h,w,K] probabilities of the bins -> f32[B,H,W,1] metres."""
        return self._upsample(probabilities.astype(jnp.float32) @ self._centres)

    @property
    def _centres(self) -> jax.Array:
        return (jnp.arange(self.num_codes, dtype=jnp.float32) + 0.5) * (self.max_value / self.num_codes)

    def _upsample(self, metres_Bhw: jax.Array) -> jax.Array:
        b, h, w = metres_Bhw.shape
        size = (b, h * self.downsample, w * self.downsample, 1)
        return jax.image.resize(metres_Bhw[..., None], size, "bilinear")
