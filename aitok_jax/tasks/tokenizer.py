"""Stage 1: VQ-VAEs that turn depth maps or instance masks into tokens and back (AIT.md section 2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from aitok_jax.config import build_dataclass
from aitok_jax.models.vqvae import CLASSIFICATION, VQVAE, mask_patches
from aitok_jax.tasks.base import Batch, Tree

MASK_OBJECTIVES = ("mse", "l1", "smooth_l1")
MUTABLE = ["codebook", "batch_stats", "pending"]


class _Codebook:
    """What both tokenizers do for a step of several micro-batches, so that their EMA codebook sees one batch."""

    def open_step(self, model_state: Tree) -> Tree:
        return {**model_state, **self._of_quantizer("open_step", model_state, "pending")}

    def close_step(self, model_state: Tree) -> Tree:
        moved = self._of_quantizer("close_step", model_state, "codebook")
        return {name: value for name, value in {**model_state, **moved}.items() if name != "pending"}

    def _of_quantizer(self, method: str, model_state: Tree, mutable: str) -> Tree:
        def call(vqvae):
            getattr(vqvae.quantizer, method)()

        return self.tokenizer.apply({"params": {}, **model_state}, method=call, mutable=[mutable])[1]


@dataclasses.dataclass(frozen=True)
class DepthTokenizerTask(_Codebook):
    """Reconstructs depth maps; 0 means no annotation and never counts in the loss.

    Attributes:
        tokenizer: the VQ-VAE.
        image_size: side of the training maps in pixels.
        mask_ratio, mask_patch: mask augmentation: this share of the patches of the input is set to zero, and the loss
            is taken against the unmasked map. 0 turns it off.
        eval_crop, max_depth: see `DepthTask`.
    """

    evaluator: ClassVar[str] = "depth"

    tokenizer: VQVAE
    image_size: int
    mask_ratio: float = 0.5
    mask_patch: int = 16
    eval_crop: tuple[int, int, int, int] | None = None
    max_depth: float = 10.0

    def __post_init__(self):
        self.tokenizer.grid(self.image_size, self.image_size)
        if self.tokenizer.channels != 1 or self.tokenizer.objective == CLASSIFICATION:
            raise ValueError(
                f"depth maps have one channel of metres: tokenizer.channels={self.tokenizer.channels} must be 1 and "
                f"tokenizer.objective={self.tokenizer.objective!r} not {CLASSIFICATION!r}"
            )
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must lie in 0..1; 0 turns the augmentation off")
        if self.mask_ratio and self.image_size % self.mask_patch:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of mask_patch={self.mask_patch}; "
                "change one of them, or set mask_ratio=0"
            )

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        variables = self.tokenizer.init(rng, batch["depth"][..., None])
        return variables.pop("params"), variables

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        mask_rng, restart_rng = jax.random.split(rng)
        target = batch["depth"][..., None]
        maps = target
        if self.mask_ratio:
            maps = mask_patches(mask_rng, target, patch=self.mask_patch, ratio=self.mask_ratio)
        return _reconstruct(self.tokenizer, params, model_state, maps, target, restart_rng)

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Tokenizes and detokenizes f32[B,H,W] metres of any size: `depth` f32[B,H,W] metres, `codes` int32[B,h,w]."""
        depth = batch["depth"]
        _, height, width = depth.shape
        r = self.tokenizer.downsample
        padded = jnp.pad(depth, ((0, 0), (0, -height % r), (0, -width % r)))[..., None]
        variables = {"params": params, **model_state}
        codes = self.tokenizer.apply(variables, padded, method="encode")
        decoded = self.tokenizer.apply(variables, codes, method="decode")
        return {"depth": decoded[:, :height, :width, 0], "codes": codes}


@dataclasses.dataclass(frozen=True)
class MaskTokenizerTask(_Codebook):
    """Reconstructs instance masks cropped at their boxes.

    Attributes:
        tokenizer: the VQ-VAE.
        image_size: side of the crops in pixels.
    """

    evaluator: ClassVar[str] = "masks"

    tokenizer: VQVAE
    image_size: int = 64

    def __post_init__(self):
        self.tokenizer.grid(self.image_size, self.image_size)
        check_masks(self.tokenizer)

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        variables = self.tokenizer.init(rng, batch["instance"][..., None])
        return variables.pop("params"), variables

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        masks = batch["instance"][..., None]
        return _reconstruct(self.tokenizer, params, model_state, masks, masks, rng)

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Tokenizes and detokenizes f32[B,S,S] masks: `instance` f32[B,S,S], about 0..1, `codes` int32[B,h,w]."""
        variables = {"params": params, **model_state}
        codes = self.tokenizer.apply(variables, batch["instance"][..., None], method="encode")
        return {"instance": self.tokenizer.apply(variables, codes, method="decode")[..., 0], "codes": codes}


def check_masks(tokenizer: VQVAE) -> None:
    """ValueError where the tokenizer is none for masks; objectives that skip zeros would skip the background."""
    if tokenizer.channels != 1:
        raise ValueError(f"masks have one channel: tokenizer.channels={tokenizer.channels} must be 1")
    if tokenizer.objective not in MASK_OBJECTIVES:
        raise ValueError(
            f"tokenizer.objective={tokenizer.objective!r} must be one of {', '.join(MASK_OBJECTIVES)} for masks, "
            "whose zeros count"
        )


def _reconstruct(tokenizer: VQVAE, params: Tree, model_state: Tree, maps, target, rng):
    result, new_state = tokenizer.apply(
        {"params": params, **model_state}, maps, target, train=True, mutable=MUTABLE, rngs={"restart": rng}
    )
    metrics = {
        "reconstruction": result.reconstruction_loss,
        "commitment": result.quantized.loss,
        "perplexity": result.quantized.perplexity,
        "codebook_usage": result.quantized.usage,
    }
    return result.loss, (metrics, {**model_state, **new_state})


def build(fields: Mapping) -> DepthTokenizerTask:
    """From `config.task`; `tokenizer` holds the fields of `VQVAE`."""
    fields = dict(fields)
    return build_dataclass(
        DepthTokenizerTask, {**fields, "tokenizer": build_dataclass(VQVAE, fields.get("tokenizer", {}))}
    )


def build_mask(fields: Mapping) -> MaskTokenizerTask:
    """From `config.task`; `tokenizer` holds the fields of `VQVAE`."""
    fields = dict(fields)
    return build_dataclass(
        MaskTokenizerTask, {**fields, "tokenizer": build_dataclass(VQVAE, fields.get("tokenizer", {}))}
    )
