"""The task solver: Swin-V2 backbone and token transformer (arXiv 2301.02229)."""

import flax.linen as nn
import jax

from aitok_jax.models.swin_v2 import SwinV2
from aitok_jax.models.transformer import KeyValue, TokenTransformer


class TaskSolver(nn.Module):
    """Images and input tokens to logits over the vocabulary."""

    backbone: SwinV2
    transformer: TokenTransformer

    def features(self, images_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """f32[B,H,W,3] in the model's scale -> the backbone's map f32[B,h,w,C]."""
        return self.backbone(images_BHWC, train)

    def memory(self, images_BHWC: jax.Array, train: bool = False) -> list[KeyValue]:
        """f32[B,H,W,3] -> keys and values of the image for every decoder layer."""
        return self.transformer.memory_keys_values(self.transformer.encode(self.features(images_BHWC, train), train))

    def forward(
        self, images_BHWC: jax.Array, sequences: list[tuple[jax.Array, int]], train: bool = False
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Teacher forcing of one or several tasks with one pass of backbone and encoder.

        Args:
            images_BHWC: f32[B,H,W,3], the images of the first task, then those of the second, ...
            sequences: per task its input tokens int[B_i,T_i] and its task id; B is the sum of the B_i.
            train: needs the rng stream `dropout`.
        Returns:
            per task logits f32[B_i,T_i+1,V] and memory [B_i,M,D].
        """
        memory_BMD = self.transformer.encode(self.features(images_BHWC, train), train)
        outputs, start = [], 0
        for tokens_BT, task in sequences:
            part_BMD = memory_BMD[start : start + tokens_BT.shape[0]]
            keys_values = self.transformer.memory_keys_values(part_BMD)
            outputs.append((self.transformer.decode(keys_values, tokens_BT, task, train), part_BMD))
            start += tokens_BT.shape[0]
        return outputs

    def __call__(self, images_BHWC: jax.Array, tokens_BT: jax.Array, task: int, train: bool = False) -> jax.Array:
        """f32[B,H,W,3], int[B,T] -> logits f32[B,T+1,V] of one task."""
        return self.forward(images_BHWC, [(tokens_BT, task)], train)[0][0]
