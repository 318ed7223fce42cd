"""Objects of an image as a sequence of tokens: instance segmentation and detection (arXiv 2301.02229)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from aitok_jax.config import build_dataclass
from aitok_jax.models import losses
from aitok_jax.models.decode_objects import CLASS_SLOT, DecodedObjects, check_decoding, decode_objects
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks import from_scratch, sequences, solver
from aitok_jax.tasks.base import Batch, Tree, apply_tokenizer, check_multiple, init_tokenizer
from aitok_jax.tasks.tokenizer import check_masks
from aitok_jax.tasks.vocabulary import Vocabulary

DETECTION_ID, INSTANCES_ID = 0, 1  # rows of the solver's task and position tables


@dataclasses.dataclass(frozen=True)
class ObjectsPart:
    """Predicts boxes, classes and, with a tokenizer, masks of the objects in an image.

    The three uses of soft tokens are three switches: `soft_input`, `soft_detokenize` and `aux_weight`.

    Attributes:
        solver: backbone and token transformer.
        tokenizer: the frozen mask tokenizer, whose variables are model_state['mask_tokenizer']; None is detection.
        vocabulary: token windows.
        image_size: side of the padded square images in pixels.
        num_objects: objects of a sequence, real and noise together.
        mask_size: side of the mask crops in pixels.
        box_weight, class_weight, mask_weight: weights of the cross-entropy by kind of token; the auxiliary loss has
            `mask_weight` too.
        aux_weight: weight of dice + mse of the softly detokenized masks; 0 turns it off.
        aux_objects: the auxiliary loss looks at the first so many objects of an image.
        loss_weight: of the whole loss.
        memory_weight: see `from_scratch`; 0 as published.
        soft_input: feed the probability-weighted embedding after a mask token.
        soft_detokenize: decode the probability-weighted mask codes instead of the most probable ones.
        top_p: 0 decodes greedily; the published evaluation samples with 0.3, here with the image's id as the key.
        early_exit: stop decoding once the last so many objects of every image are noise; 0 decodes all.
    """

    kind: ClassVar[str] = "objects"

    solver: TaskSolver
    tokenizer: VQVAE | None
    vocabulary: Vocabulary
    image_size: int
    num_objects: int = 100
    mask_size: int = 64
    box_weight: float = 1.0
    class_weight: float = 1.0
    mask_weight: float = 0.2
    aux_weight: float = 5.0
    aux_objects: int = 100
    loss_weight: float = 1.0
    memory_weight: float = 0.0
    soft_input: bool = True
    soft_detokenize: bool = True
    top_p: float = 0.0
    early_exit: int = 0

    def __post_init__(self):
        _check(self)

    @property
    def task_id(self) -> int:
        return DETECTION_ID if self.tokenizer is None else INSTANCES_ID

    @property
    def mask_tokens(self) -> int:
        """Tokens of a mask; 0 for detection."""
        return 0 if self.tokenizer is None else (self.mask_size // self.tokenizer.downsample) ** 2

    @property
    def answers(self) -> tuple[str, ...]:
        return ("detection",) if self.tokenizer is None else ("instances", "detection")

    @property
    def meanings(self) -> Mapping[str, str]:
        return {
            "boxes": "x1 y1 x2 y2 in pixels of the input",
            "classes": "place in `categories`, counted from 0",
            "scores": "probability of the class among all classes and the noise label",
            "masks": "over the box; the mask is where it is at least 0.5",
            "valid": "False: no object",
        }

    def init_heads(self, rng: jax.Array) -> Tree:
        if not self.memory_weight:
            return {}
        dim = self.solver.transformer.dim
        return {"instances_memory_head": from_scratch.init_head(self._length * dim, dim, rng)}

    def init_state(self, rng: jax.Array, batch: Batch) -> Tree:
        if self.tokenizer is None:
            return {}
        crop = jnp.zeros((1, self.mask_size, self.mask_size, 1))
        return {"mask_tokenizer": init_tokenizer(self.tokenizer, rng, crop)}

    def inputs(self, model_state: Tree, batch: Batch, rng: jax.Array) -> solver.Inputs:
        real_BN = batch["objects/kind"] == 0
        crops = batch["objects/crops"].astype(jnp.float32) if self.tokenizer else None
        codes = None if crops is None else self.encode_masks(model_state, crops)
        classes_BN = jnp.where(real_BN, batch["objects/classes"], -1)
        targets_BNL = sequences.object_tokens(
            self.vocabulary, batch["objects/boxes"], classes_BN, codes, self.image_size
        )
        inputs_BNL = sequences.corrupt_labels(rng, self.vocabulary, targets_BNL)
        tokens_BT = inputs_BNL.reshape(inputs_BNL.shape[0], -1)[:, :-1]
        counted_BNL = sequences.target_mask(real_BN, targets_BNL.shape[-1])
        return solver.Inputs(solver.normalize(batch["image"]), tokens_BT, (targets_BNL, counted_BNL, crops))

    def score(
        self,
        params: Tree,
        model_state: Tree,
        logits_BTV: jax.Array,
        memory_BMD: jax.Array,
        targets: tuple,
        weight_B: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets_BNL, counted_BNL, crops = targets
        counted_BNL = losses.real_rows(counted_BNL, weight_B)
        logits_BNLV = logits_BTV.reshape(*targets_BNL.shape, logits_BTV.shape[-1])
        loss, metrics = self.token_loss(model_state, logits_BNLV, targets_BNL, counted_BNL, crops)
        if self.memory_weight:
            head = params["instances_memory_head"]
            metrics["memory_loss"] = from_scratch.object_loss(
                head, self, params, memory_BMD, targets_BNL, counted_BNL[..., 0], weight_B
            )
            loss += self.loss_weight * self.memory_weight * metrics["memory_loss"]
        return loss, metrics

    def token_loss(
        self,
        model_state: Tree,
        logits_BNLV: jax.Array,
        targets_BNL: jax.Array,
        counted_BNL: jax.Array,
        crops_BNSS: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted cross-entropy over the whole vocabulary, summed and divided by the number of counted tokens, plus
        the auxiliary loss times the share of mask tokens among them (arXiv 2301.02229, soft token).
        """
        ce_BNL = optax.softmax_cross_entropy_with_integer_labels(logits_BNLV.astype(jnp.float32), targets_BNL)
        slot, total, metrics = CLASS_SLOT, 0.0, {}
        kinds = {"box": slice(0, slot), "class": slice(slot, slot + 1), "mask": slice(slot + 1, None)}
        weights = {"box": self.box_weight, "class": self.class_weight, "mask": self.mask_weight}
        for kind in kinds if self.mask_tokens else ("box", "class"):
            counted = counted_BNL[..., kinds[kind]]
            summed = weights[kind] * jnp.sum(jnp.where(counted, ce_BNL[..., kinds[kind]], 0.0))
            metrics[f"{kind}_cross_entropy"] = summed / jnp.maximum(jnp.sum(counted), 1)
            total += summed
        if self.mask_tokens and self.aux_weight:
            logits_BNmV, counted_BNm = logits_BNLV[..., slot + 1 :, :], counted_BNL[..., slot + 1 :]
            aux = self._mask_loss(model_state, logits_BNmV, counted_BNm[..., 0], crops_BNSS)
            metrics["mask_aux"] = self.aux_weight * self.mask_weight * aux
            total += metrics["mask_aux"] * jnp.sum(counted_BNm)
        return self.loss_weight * total / jnp.maximum(jnp.sum(counted_BNL), 1), metrics

    def _mask_loss(self, model_state, logits_BNmV, real_BN, crops_BNSS) -> jax.Array:
        """Dice + mse of the softly detokenized masks of real objects, averaged over them; 0 where there are none."""
        n = min(self.aux_objects, real_BN.shape[1])
        logits_BNmK = logits_BNmV[:, :n, :, self.vocabulary.codes_of("mask").slice]
        soft = self.decode_masks(model_state, "decode_soft", logits_BNmK)
        soft = soft.reshape(-1, self.mask_size, self.mask_size)
        crops, real = crops_BNSS[:, :n].reshape(soft.shape), real_BN[:, :n].reshape(-1)
        each = losses.dice(soft, crops) + jnp.mean(jnp.square(soft - crops), (1, 2))
        return jnp.sum(jnp.where(real, each, 0.0)) / jnp.maximum(jnp.sum(real), 1)

    @property
    def _length(self) -> int:
        """Tokens of an object."""
        return CLASS_SLOT + 1 + self.mask_tokens

    def encode_masks(self, model_state: Tree, crops_BNSS: jax.Array) -> jax.Array:
        """f32[B,N,S,S] masks in 0..1 -> int32[B,N,m] codes, row by row."""
        b, n, size, _ = crops_BNSS.shape
        codes = self._tokenizer(model_state, "encode", crops_BNSS.reshape(b * n, size, size, 1))
        return codes.reshape(b, n, -1)

    def decode_masks(self, model_state: Tree, method: str, x_BNm: jax.Array) -> jax.Array:
        """Codes counted from 0 ('decode') or their logits [B,N,m,K] ('decode_soft') -> f32[B,N,S,S], about 0..1."""
        b, n, grid = *x_BNm.shape[:2], self.mask_size // self.tokenizer.downsample
        masks = self._tokenizer(model_state, method, x_BNm.reshape(b * n, grid, grid, *x_BNm.shape[3:]))
        return masks.reshape(b, n, self.mask_size, self.mask_size)

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Objects of padded images f32[B,S,S,3] in 0..1, in the order of decoding.

        Returns:
            boxes f32[B,N,4] x1 y1 x2 y2 in pixels of the padded image; classes int32[B,N] from 0; scores f32[B,N] in
            0..1; masks f32[B,N,64,64] over the box, about 0..1 (not for detection); valid bool[B,N], False for what
            an early exit leaves out, whose other entries mean nothing.
        """
        memory = self.memory(params, batch["image"])
        return self.detokenize(model_state, self.decode(params, memory, batch.get("id")))

    def memory(self, params: Tree, images_BHWC: jax.Array) -> list:
        """Keys and values of padded images [B,S,S,3] in 0..1 for every decoder layer."""
        return solver.memory(self.solver, params, solver.normalize(images_BHWC))

    def detokenize(self, model_state: Tree, decoded: DecodedObjects) -> dict[str, jax.Array]:
        """The objects of decoded tokens, as `predict` returns them."""
        vocabulary, slot = self.vocabulary, CLASS_SLOT
        tokens_BNL = decoded.tokens
        outputs = {
            "boxes": sequences.boxes_of(vocabulary, tokens_BNL[..., :slot], self.image_size),
            "classes": tokens_BNL[..., slot] - vocabulary.classes.start,
            "scores": decoded.scores,
            "valid": self._before_exit(decoded.noise),
        }
        if self.mask_tokens and self.soft_detokenize:
            outputs["masks"] = self.decode_masks(model_state, "decode_soft", decoded.mask_logits)
        elif self.mask_tokens:
            codes = jnp.maximum(tokens_BNL[..., slot + 1 :] - vocabulary.codes_of("mask").start, 0)
            outputs["masks"] = self.decode_masks(model_state, "decode", codes)
        return outputs

    def _before_exit(self, noise_BN: jax.Array) -> jax.Array:
        """True up to the image's own first run of `early_exit` noise objects, whatever else is in the batch."""
        if not self.early_exit:
            return jnp.ones_like(noise_BN)
        order_1N = jnp.arange(noise_BN.shape[1])[None]
        last_real_BN = jax.lax.cummax(jnp.where(noise_BN, -1, order_1N), axis=1)
        finished_BN = jax.lax.cummax((order_1N - last_real_BN >= self.early_exit).astype(jnp.int32), axis=1)
        return jnp.pad(finished_BN, ((0, 0), (1, 0)))[:, :-1] == 0

    def decode(self, params: Tree, memory: list, ids_B: jax.Array | None = None) -> DecodedObjects:
        """Tokens of the objects in the images of `memory`; `ids_B` int32[B], by default 0, 1, ..., seeds sampling."""
        rngs_B = None
        if self.top_p:
            ids_B = jnp.arange(memory[0][0].shape[0]) if ids_B is None else ids_B
            rngs_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), ids_B)
        return decode_objects(
            self.solver.transformer,
            params["transformer"],
            memory,
            self.vocabulary,
            task=self.task_id,
            num_objects=self.num_objects,
            mask_tokens=self.mask_tokens,
            soft_input=self.soft_input,
            top_p=self.top_p,
            rngs_B=rngs_B,
            early_exit=self.early_exit,
        )

    def _tokenizer(self, model_state: Tree, method: str, *args: jax.Array) -> jax.Array:
        return apply_tokenizer(self.tokenizer, model_state["mask_tokenizer"], method, *args)


def _check(part: ObjectsPart) -> None:
    transformer, tokenizer = part.solver.transformer, part.tokenizer
    check_multiple("image_size", part.image_size, "backbone stride", part.solver.backbone.stride)
    if tokenizer is not None:
        check_multiple("mask_size", part.mask_size, "tokenizer.downsample", tokenizer.downsample)
        check_masks(tokenizer)
        codes = part.vocabulary.codes_of("mask").size
        if tokenizer.num_codes != codes:
            raise ValueError(
                f"tokenizer.num_codes={tokenizer.num_codes} must equal the vocabulary's {codes} codes of mask"
            )
    for name in ("num_objects", "aux_objects"):
        if getattr(part, name) < 1:
            raise ValueError(f"{name}={getattr(part, name)} must be at least 1")
    check_decoding(part.top_p, part.early_exit)
    length = part.num_objects * part._length
    if length > transformer.max_length:
        raise ValueError(
            f"{part.num_objects} objects are {length} tokens, more than max_length={transformer.max_length}; "
            "lower num_objects or raise max_length"
        )
    if transformer.parallel:
        raise ValueError("objects are decoded step by step: transformer.parallel must be False")


def build(fields: Mapping[str, Any], shared: Mapping[str, Any]) -> ObjectsPart:
    """From a part of `config.task`; `tokenizer` holds the fields of `VQVAE`, None, or left out, is detection.

    `shared` holds solver and vocabulary.
    """
    own = {"tokenizer": None, **fields}
    if own["tokenizer"] is not None:
        own["tokenizer"] = build_dataclass(VQVAE, own["tokenizer"])
    return build_dataclass(ObjectsPart, {**own, **shared})
