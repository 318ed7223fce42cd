"""The task solver: Swin-V2 backbone and token transformer (AIT.md section 4)."""

from __future__ import annotations

import flax.linen as nn
import jax

from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.transformer import KeyValue, TokenTransformer


class TaskSolver(nn.Module):
    """Images and input tokens to logits over the vocabulary."""

    backbone: SwinV2
    transformer: TokenTransformer

    def features(self, images_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """f32[B,H,W,3] in the model's scale -> the backbone's last map f32[B,h,w,C]."""
        return self.backbone(images_BHWC, train)[-1]

    def memory(self, images_BHWC: jax.Array, train: bool = False) -> list[KeyValue]:
        """f32[B,H,W,3] -> keys and values of the image for every decoder layer."""
        return self.transformer.memory_keys_values(self.transformer.encode(self.features(images_BHWC, train), train))

    def __call__(
        self, images_BHWC: jax.Array, tokens_BT: jax.Array, task: int | jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """f32[B,H,W,3], int[B,T] -> logits f32[B,T+1,V] and memory [B,M,D]; training needs the rng stream `dropout`."""
        memory_BMD = self.transformer.encode(self.features(images_BHWC, train), train)
        keys_values = self.transformer.memory_keys_values(memory_BMD)
        return self.transformer.decode(keys_values, tokens_BT, task, train), memory_BMD
