"""Stage 1: VQ-VAEs that turn dense maps or instance masks into tokens and back (arXiv 2301.02229, VQ-VAE)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from aitok_jax.config import build_dataclass
from aitok_jax.models.vqvae import CLASSIFICATION, VQVAE, mask_patches
from aitok_jax.tasks.base import Batch, Tree
from aitok_jax.tasks.modalities import Modality

MASK_OBJECTIVES = ("mse", "l1", "smooth_l1")
MUTABLE = ["codebook", "pending"]


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """A tokenizer, the only part of its task.

    `open_step` and `close_step` let the EMA codebook see several micro-batches as one batch.
    """

    name: str
    part: MapTokenizer | MaskTokenizer

    @property
    def parts(self) -> dict[str, MapTokenizer | MaskTokenizer]:
        return {self.name: self.part}

    def init(self, rng: jax.Array, batches: Mapping[str, Batch]) -> tuple[Tree, Tree]:
        variables = self.part.tokenizer.init(rng, self.part.maps(batches[self.name]))
        return variables.pop("params"), variables

    def loss(
        self, params: Tree, model_state: Tree, batches: Mapping[str, Batch], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        batch = batches[self.name]
        maps, target, restart_rng = self.part.examples(batch, rng)
        result, new_state = self.part.tokenizer.apply(
            {"params": params, **model_state},
            maps,
            target,
            train=True,
            weight_B=batch.get("weight"),
            mutable=MUTABLE,
            rngs={"restart": restart_rng},
        )
        metrics = {
            "reconstruction": result.reconstruction_loss,
            "commitment": result.quantized.loss,
            "perplexity": result.quantized.perplexity,
            "codebook_usage": result.quantized.usage,
        }
        return result.loss, (metrics, {**model_state, **new_state})

    def open_step(self, model_state: Tree) -> Tree:
        return {**model_state, **self._of_quantizer("open_step", model_state, "pending")}

    def close_step(self, model_state: Tree) -> Tree:
        moved = self._of_quantizer("close_step", model_state, "codebook")
        return {name: value for name, value in {**model_state, **moved}.items() if name != "pending"}

    def _of_quantizer(self, method: str, model_state: Tree, mutable: str) -> Tree:
        def call(vqvae):
            getattr(vqvae.quantizer, method)()

        return self.part.tokenizer.apply({"params": {}, **model_state}, method=call, mutable=[mutable])[1]


@dataclasses.dataclass(frozen=True)
class MapTokenizer:
    """Reconstructs maps; what is not annotated never counts in the loss.

    Attributes:
        modality: what the maps are.
        tokenizer: the VQ-VAE.
        image_size: side of the training maps in pixels.
        mask_ratio, mask_patch: mask augmentation (a technique of the paper): this share of the patches of the input is
            set to zero, and the loss is taken against the unmasked map. 0 turns it off.
        eval_crop: see `MapPart`.
    """

    kind: ClassVar[str] = "maps"
    answers: ClassVar[tuple[str, ...]] = ()
    meanings: ClassVar[dict[str, str]] = {}

    modality: Modality
    tokenizer: VQVAE
    image_size: int
    mask_ratio: float = 0.5
    mask_patch: int = 16
    eval_crop: tuple[int, int, int, int] | None = None

    def __post_init__(self):
        self.tokenizer.grid(self.image_size, self.image_size)
        classifies = self.tokenizer.objective == CLASSIFICATION != self.modality.objective
        if self.tokenizer.channels != self.modality.channels or classifies:
            raise ValueError(
                f"{self.modality.name} has {self.modality.channels} channels: tokenizer.channels="
                f"{self.tokenizer.channels} must be that, and tokenizer.objective={self.tokenizer.objective!r} one of "
                f"its own, as {self.modality.objective!r}"
            )
        if not 0 <= self.mask_ratio <= 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} must lie in 0..1; 0 turns the augmentation off")
        if self.mask_ratio and self.image_size % self.mask_patch:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of mask_patch={self.mask_patch}; "
                "change one of them, or set mask_ratio=0"
            )

    def maps(self, batch: Batch) -> jax.Array:
        return self.modality.encode(batch[self.modality.name])

    def examples(self, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What goes in, what should come out, and the key of restarted codes."""
        mask_rng, restart_rng = jax.random.split(rng)
        target = maps = self.maps(batch)
        if self.mask_ratio:
            maps = mask_patches(mask_rng, target, patch=self.mask_patch, ratio=self.mask_ratio)
        return maps, target, restart_rng

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Tokenizes and detokenizes maps [B,H,W,...] of any size: the map under its name, `codes` int32[B,h,w]."""
        maps_BHWC = self.maps(batch)
        _, height, width, _ = maps_BHWC.shape
        r = self.tokenizer.downsample
        padded = jnp.pad(maps_BHWC, ((0, 0), (0, -height % r), (0, -width % r), (0, 0)))
        variables = {"params": params, **model_state}
        codes = self.tokenizer.apply(variables, padded, method="encode")
        raw = self.tokenizer.apply(variables, codes, method="decode")[:, :height, :width]
        return {self.modality.name: self.modality.finish(raw), "codes": codes}


@dataclasses.dataclass(frozen=True)
class MaskTokenizer:
    """Reconstructs instance masks cropped at their boxes.

    Attributes:
        tokenizer: the VQ-VAE.
        image_size: side of the crops in pixels.
    """

    kind: ClassVar[str] = "masks"
    answers: ClassVar[tuple[str, ...]] = ()
    meanings: ClassVar[dict[str, str]] = {}

    tokenizer: VQVAE
    image_size: int = 64

    def __post_init__(self):
        self.tokenizer.grid(self.image_size, self.image_size)
        check_masks(self.tokenizer)

    def maps(self, batch: Batch) -> jax.Array:
        return batch["instance"][..., None]

    def examples(self, batch: Batch, rng: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `MapTokenizer.examples`."""
        return self.maps(batch), self.maps(batch), rng

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Tokenizes and detokenizes f32[B,S,S] masks: `instance` f32[B,S,S], about 0..1, `codes` int32[B,h,w]."""
        variables = {"params": params, **model_state}
        codes = self.tokenizer.apply(variables, self.maps(batch), method="encode")
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


def build_masks(fields: Mapping[str, Any]) -> MaskTokenizer:
    """From `config.task`; `tokenizer` holds the fields of `VQVAE`."""
    return build_dataclass(MaskTokenizer, {**fields, "tokenizer": build_dataclass(VQVAE, fields.get("tokenizer", {}))})
