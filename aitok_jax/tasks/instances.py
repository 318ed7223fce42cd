"""Instance segmentation and detection: objects of an image as a sequence of tokens (AIT.md sections 6.2 and 6.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from aitok_jax.config import build_dataclass
from aitok_jax.models import losses
from aitok_jax.models.decode_objects import DecodedObjects, check_decoding, decode_objects
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks import sequences, solving
from aitok_jax.tasks.base import Batch, Tree
from aitok_jax.tasks.tokenizer import check_masks
from aitok_jax.tasks.vocabulary import Vocabulary

DETECTION_ID, INSTANCES_ID = 0, 1  # rows of the solver's task and position tables


@dataclasses.dataclass(frozen=True)
class InstancesTask:
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
        memory_weight: weight of the cross-entropy of an object's tokens read off every vector of the encoder's memory
            by a linear layer, for the object there (`sequences.cell_tokens`); 0 as published. As `DepthTask`'s, it
            teaches a backbone with random weights to see; prediction does not use it.
        init_variance: as `DepthTask`'s.
        soft_input: feed the probability-weighted embedding after a mask token.
        soft_detokenize: decode the probability-weighted mask codes instead of the most probable ones.
        top_p: 0 decodes greedily; the published evaluation samples with 0.3, here with the image's id as the key.
        early_exit: stop decoding once the last so many objects of every image are noise; 0 decodes all.
    """

    evaluator: ClassVar[str] = "objects"

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
    init_variance: float = 0.0
    soft_input: bool = True
    soft_detokenize: bool = True
    top_p: float = 0.0
    early_exit: int = 0

    def __post_init__(self):
        _check_layout(self)

    @property
    def task_id(self) -> int:
        return DETECTION_ID if self.tokenizer is None else INSTANCES_ID

    @property
    def mask_tokens(self) -> int:
        """Tokens of a mask; 0 for detection."""
        return 0 if self.tokenizer is None else (self.mask_size // self.tokenizer.downsample) ** 2

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        return solving.init({"instances": self}, rng, {"instances": batch})

    def init_heads(self, rng: jax.Array) -> Tree:
        if not self.memory_weight:
            return {}
        memory = jnp.zeros((1, 1, self.solver.transformer.dim))
        return {"instances_memory_head": self._memory_head.init(rng, memory)["params"]}

    def init_state(self, rng: jax.Array, batch: Batch) -> Tree:
        if self.tokenizer is None:
            return {}
        crop = jnp.zeros((1, self.mask_size, self.mask_size, 1))
        return {"mask_tokenizer": solving.frozen_tokenizer(self.tokenizer, rng, crop)}

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        total, metrics = solving.loss({"": self}, params, model_state, {"": batch}, rng)
        return total, (metrics[""], model_state)

    def prepare(self, model_state: Tree, batch: Batch, rng: jax.Array) -> solving.Prepared:
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
        return solving.Prepared(solving.normalize(batch["image"]), tokens_BT, (targets_BNL, counted_BNL, crops))

    def score(
        self, params: Tree, model_state: Tree, logits_BTV: jax.Array, memory_BMD: jax.Array, targets: tuple
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits_BNLV = logits_BTV.reshape(*targets[0].shape, logits_BTV.shape[-1])
        loss, metrics = self.token_loss(model_state, logits_BNLV, *targets)
        if self.memory_weight:
            targets_BNL, counted_BNL, _ = targets
            metrics["memory_loss"] = self._memory_loss(params, memory_BMD, targets_BNL, counted_BNL[..., 0])
            loss += self.loss_weight * self.memory_weight * metrics["memory_loss"]
        return loss, metrics

    @property
    def _memory_head(self) -> nn.Dense:
        return nn.Dense((sequences.CLASS_SLOT + 1 + self.mask_tokens) * self.solver.transformer.dim)

    def _memory_loss(
        self, params: Tree, memory_BMD: jax.Array, targets_BNL: jax.Array, real_BN: jax.Array
    ) -> jax.Array:
        """Mean cross-entropy of boxes and of masks where there is an object, plus that of the classes everywhere."""
        vocabulary, slot = self.vocabulary, sequences.CLASS_SLOT
        side = self.image_size // self.solver.backbone.stride
        tokens_BML, covered_BM = sequences.cell_tokens(vocabulary, targets_BNL, real_BN, self.image_size, side)
        x_BMD = self._memory_head.apply({"params": params["instances_memory_head"]}, memory_BMD)
        window = slice(vocabulary.coordinates.start, vocabulary.mask_codes.stop)
        logits_BMLV = self.solver.transformer.apply(
            {"params": params["transformer"]}, x_BMD.reshape(*tokens_BML.shape, -1), window, method="logits"
        )
        ce_BML = optax.softmax_cross_entropy_with_integer_labels(logits_BMLV, tokens_BML)

        def covered_mean(ce_BMn):
            summed = jnp.sum(jnp.where(covered_BM[..., None], ce_BMn, 0.0))
            return summed / jnp.maximum(jnp.sum(covered_BM) * ce_BMn.shape[-1], 1)

        return covered_mean(ce_BML[..., :slot]) + jnp.mean(ce_BML[..., slot]) + covered_mean(ce_BML[..., slot + 1 :])

    def token_loss(
        self,
        model_state: Tree,
        logits_BNLV: jax.Array,
        targets_BNL: jax.Array,
        counted_BNL: jax.Array,
        crops_BNSS: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Weighted cross-entropy over the whole vocabulary, summed and divided by the number of counted tokens, plus
        the auxiliary loss times the share of mask tokens among them (AIT.md section 6.2).
        """
        ce_BNL = optax.softmax_cross_entropy_with_integer_labels(logits_BNLV.astype(jnp.float32), targets_BNL)
        slot, total, metrics = sequences.CLASS_SLOT, 0.0, {}
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
        soft = self.decode_soft(model_state, logits_BNmV[:, :n, :, self.vocabulary.mask_codes.slice])
        soft = soft.reshape(-1, self.mask_size, self.mask_size)
        crops, real = crops_BNSS[:, :n].reshape(soft.shape), real_BN[:, :n].reshape(-1)
        each = losses.dice(soft, crops) + jnp.mean(jnp.square(soft - crops), (1, 2))
        return jnp.sum(jnp.where(real, each, 0.0)) / jnp.maximum(jnp.sum(real), 1)

    def encode_masks(self, model_state: Tree, crops_BNSS: jax.Array) -> jax.Array:
        """f32[B,N,S,S] masks in 0..1 -> int32[B,N,m] codes, row by row."""
        b, n, size, _ = crops_BNSS.shape
        codes = self._tokenizer(model_state, "encode", crops_BNSS.reshape(b * n, size, size, 1))
        return codes.reshape(b, n, -1)

    def decode_soft(self, model_state: Tree, logits_BNmK: jax.Array) -> jax.Array:
        """Logits of the mask codes -> f32[B,N,S,S] masks, about 0..1."""
        b, n, _, k = logits_BNmK.shape
        grid = self.mask_size // self.tokenizer.downsample
        masks = self._tokenizer(model_state, "decode_soft", logits_BNmK.reshape(b * n, grid, grid, k))
        return masks.reshape(b, n, self.mask_size, self.mask_size)

    def decode_hard(self, model_state: Tree, codes_BNm: jax.Array) -> jax.Array:
        """Mask codes counted from 0 -> f32[B,N,S,S] masks, about 0..1."""
        b, n, _ = codes_BNm.shape
        grid = self.mask_size // self.tokenizer.downsample
        masks = self._tokenizer(model_state, "decode", codes_BNm.reshape(b * n, grid, grid))
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
        return solving.memory(self.solver, params, solving.normalize(images_BHWC))

    def detokenize(self, model_state: Tree, decoded: DecodedObjects) -> dict[str, jax.Array]:
        """The objects of decoded tokens, as `predict` returns them."""
        vocabulary, slot = self.vocabulary, sequences.CLASS_SLOT
        tokens_BNL = decoded.tokens
        outputs = {
            "boxes": sequences.boxes_of(vocabulary, tokens_BNL[..., :slot], self.image_size),
            "classes": tokens_BNL[..., slot] - vocabulary.classes.start,
            "scores": decoded.scores,
            "valid": self._before_exit(decoded.noise),
        }
        if self.mask_tokens and self.soft_detokenize:
            outputs["masks"] = self.decode_soft(model_state, decoded.mask_logits)
        elif self.mask_tokens:
            codes = jnp.maximum(tokens_BNL[..., slot + 1 :] - vocabulary.mask_codes.start, 0)
            outputs["masks"] = self.decode_hard(model_state, codes)
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
        return solving.apply_frozen(self.tokenizer, model_state["mask_tokenizer"], method, *args)


def _check_layout(task: InstancesTask) -> None:
    transformer, tokenizer, vocabulary = task.solver.transformer, task.tokenizer, task.vocabulary
    solving.check_multiple("image_size", task.image_size, "backbone stride", task.solver.backbone.stride)
    if tokenizer is not None:
        solving.check_multiple("mask_size", task.mask_size, "tokenizer.downsample", tokenizer.downsample)
        check_masks(tokenizer)
        if tokenizer.num_codes != vocabulary.num_mask_codes:
            raise ValueError(
                f"tokenizer.num_codes={tokenizer.num_codes} must equal vocabulary.num_mask_codes="
                f"{vocabulary.num_mask_codes}"
            )
    for name in ("num_objects", "aux_objects"):
        if getattr(task, name) < 1:
            raise ValueError(f"{name}={getattr(task, name)} must be at least 1")
    check_decoding(task.top_p, task.early_exit)
    if transformer.num_tasks <= task.task_id:
        raise ValueError(f"num_tasks={transformer.num_tasks} must be more than {task.task_id}, the row of the task")
    solving.check_last_stage(task.solver.backbone)
    length = task.num_objects * (sequences.CLASS_SLOT + 1 + task.mask_tokens)
    if length > transformer.max_length:
        raise ValueError(
            f"{task.num_objects} objects are {length} tokens, more than max_length={transformer.max_length}; "
            "lower num_objects or raise max_length"
        )
    if transformer.vocab_size != vocabulary.size:
        raise ValueError(f"vocab_size={transformer.vocab_size} must equal the vocabulary's {vocabulary.size} tokens")
    if transformer.parallel:
        raise ValueError("objects are decoded step by step: transformer.parallel must be False")


def build(fields: Mapping) -> InstancesTask:
    """From `config.task`: `backbone`, `transformer`, `tokenizer` and `vocabulary` hold the fields of their classes.

    `tokenizer` None, or left out, is detection.
    """
    fields = dict(fields)
    tokenizer = fields.pop("tokenizer", None)
    tokenizer = None if tokenizer is None else build_dataclass(VQVAE, tokenizer)
    codes = {} if tokenizer is None else {"num_mask_codes": tokenizer.num_codes}
    vocabulary = build_dataclass(Vocabulary, {**codes, **fields.pop("vocabulary", {})})
    solver = solving.build_solver(fields, vocabulary)
    return build_dataclass(
        InstancesTask, {**fields, "solver": solver, "tokenizer": tokenizer, "vocabulary": vocabulary}
    )
