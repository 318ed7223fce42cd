"""Stage 2: depth from one image as a sequence of depth tokens (AIT.md sections 1, 4 and 6.1)."""

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
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.models.decode import Decoded, decode
from aitok_jax.models.swin_v2 import partition
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks import solving, windows
from aitok_jax.tasks.base import Batch, Tree
from aitok_jax.tasks.vocabulary import Vocabulary

TASK_ID = 2  # row of the solver's task and position tables: detection, instance segmentation, depth
MIN_DEPTH = 1e-3  # metres; predictions are clipped here


@dataclasses.dataclass(frozen=True)
class DepthTask:
    """Predicts depth tokens from RGB in 0..1 and detokenizes them to metres.

    The three uses of soft tokens are three switches: `soft_input`, `soft_detokenize` and `aux_weight`.

    Attributes:
        solver: backbone and token transformer.
        tokenizer: the frozen detokenizer; its variables are model_state['depth_tokenizer'].
        vocabulary: token windows; `num_depth_codes` is the tokenizer's K.
        image_size: side of the square images the solver sees; longer images are cut in windows at test time.
        soft_input: feed the probability-weighted embedding to the next step (not for the parallel model).
        soft_detokenize: decode the probability-weighted codes instead of the most probable ones.
        aux_weight: weight of the SiLog loss of the softly detokenized map; 0 turns it off.
        loss_weight: of the whole loss (joint training: 0.2).
        input_noise: share of the input tokens that training replaces by random depth codes; 0 as published. A solver
            trained from random weights otherwise learns to continue the true tokens and to overlook the image. (The
            published instance segmentation corrupts its class labels likewise.)
        memory_weight: weight of the same loss for codes read off the encoder's memory by a linear layer, from the
            vectors of a token's patch; 0 as published. The decoder starts with no idea which vector belongs to
            which token, and without a pretrained backbone takes thousands of steps to use the image at all; this
            teaches the encoder meanwhile. Prediction does not use it.
        init_variance: share of their input's variance that fresh linear layers give out; 0 is the published standard
            deviation of 0.02, with which hardly anything comes through a narrow solver at first.
        normalize_image: subtract the mean of ImageNet's colours and divide by their standard deviation first, as
            published for the COCO tasks. Published depth weights want RGB in 0..1 as it is; a backbone trained from
            random weights learns far faster with it, since most of an image in 0..1 is its mean.
        pad_to: pad the squares at the right and bottom with zeros to this side (joint training: 640); 0 = no padding.
        flip: average with the mirror image at test time.
        eval_crop: rows and columns (top, bottom, left, right) that metrics look at, or None.
        max_depth: metres; annotation beyond it is left out of the metrics.
    """

    evaluator: ClassVar[str] = "depth"

    solver: TaskSolver
    tokenizer: VQVAE | BinsTokenizer
    vocabulary: Vocabulary
    image_size: int
    soft_input: bool = True
    soft_detokenize: bool = True
    aux_weight: float = 1.0
    loss_weight: float = 1.0
    input_noise: float = 0.0
    memory_weight: float = 0.0
    init_variance: float = 0.0
    normalize_image: bool = False
    pad_to: int = 0
    flip: bool = True
    eval_crop: tuple[int, int, int, int] | None = None
    max_depth: float = 10.0

    def __post_init__(self):
        _check_layout(self)

    @property
    def grid(self) -> int:
        """Rows, and columns, of tokens."""
        return self.image_size // self.tokenizer.downsample

    @property
    def task_id(self) -> int:
        return TASK_ID

    def init(self, rng: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        return solving.init({"depth": self}, rng, {"depth": batch})

    def init_heads(self, rng: jax.Array) -> Tree:
        if not self.memory_weight:
            return {}
        memory = jnp.zeros((1, 1, self._vectors_per_token * self.solver.transformer.dim))
        return {"depth_memory_head": self._memory_head.init(rng, memory)["params"]}

    def init_state(self, rng: jax.Array, batch: Batch) -> Tree:
        if isinstance(self.tokenizer, BinsTokenizer):
            return {}
        return {"depth_tokenizer": solving.frozen_tokenizer(self.tokenizer, rng, batch["depth"][..., None])}

    def loss(
        self, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        total, metrics = solving.loss({"": self}, params, model_state, {"": batch}, rng)
        return total, (metrics[""], model_state)

    def prepare(self, model_state: Tree, batch: Batch, rng: jax.Array) -> solving.Prepared:
        targets_BT = self.targets(model_state, batch["depth"])
        tokens_BT = self._corrupted(rng, targets_BT[:, :-1])
        return solving.Prepared(self._scaled(batch["image"]), tokens_BT, (targets_BT, batch["depth"]))

    def score(
        self, params: Tree, model_state: Tree, logits_BTV: jax.Array, memory_BMD: jax.Array, targets: tuple
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets_BT, depth_BHW = targets
        loss, metrics = self.token_loss(model_state, logits_BTV, targets_BT, depth_BHW)
        if self.memory_weight:
            side = self.image_size // self.solver.backbone.stride
            map_BhwD = memory_BMD.reshape(memory_BMD.shape[0], side, side, -1)
            patches = partition(map_BhwD, side // self.grid).reshape(*targets_BT.shape, -1)
            logits_BTK = self._memory_head.apply({"params": params["depth_memory_head"]}, patches)
            metrics["memory_loss"] = self._window_loss(model_state, logits_BTK, targets_BT, depth_BHW)
            loss += self.loss_weight * self.memory_weight * metrics["memory_loss"]
        return loss, metrics

    @property
    def _memory_head(self) -> nn.Dense:
        return nn.Dense(self.vocabulary.num_depth_codes)

    @property
    def _vectors_per_token(self) -> int:
        return (self.tokenizer.downsample // self.solver.backbone.stride) ** 2

    def _window_loss(self, model_state: Tree, logits_BTK: jax.Array, targets_BT: jax.Array, depth_BHW: jax.Array):
        codes_BT = targets_BT - self.vocabulary.depth_codes.start
        ce = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BTK, codes_BT))
        soft_BHW = self._soft_map(model_state, logits_BTK)
        return ce + self.aux_weight * losses.silog(soft_BHW, depth_BHW, min_prediction=MIN_DEPTH)

    def _corrupted(self, rng: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        if not self.input_noise:
            return tokens_BT
        which_rng, code_rng = jax.random.split(rng)
        window = self.vocabulary.depth_codes
        random_BT = jax.random.randint(code_rng, tokens_BT.shape, window.start, window.stop)
        return jnp.where(jax.random.bernoulli(which_rng, self.input_noise, tokens_BT.shape), random_BT, tokens_BT)

    def targets(self, model_state: Tree, depth_BHW: jax.Array) -> jax.Array:
        """f32[B,H,W] metres -> int32[B,T] tokens of the whole vocabulary, row by row."""
        codes_Bhw = self._tokenizer(model_state, "encode", depth_BHW[..., None])
        return self.vocabulary.depth_codes.start + codes_Bhw.reshape(codes_Bhw.shape[0], -1)

    def token_loss(
        self, model_state: Tree, logits_BTV: jax.Array, targets_BT: jax.Array, depth_BHW: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy over the whole vocabulary, plus SiLog of the softly detokenized map (the auxiliary loss)."""
        ce = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT))
        metrics = {"cross_entropy": ce}
        loss = ce
        if self.aux_weight:
            soft_BHW = self._soft_map(model_state, logits_BTV[..., self.vocabulary.depth_codes.slice])
            metrics["silog"] = losses.silog(soft_BHW, depth_BHW, min_prediction=MIN_DEPTH)
            loss += self.aux_weight * metrics["silog"]
        return self.loss_weight * loss, metrics

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """Depth of images f32[B,H,W,3] in 0..1 whose short side is `image_size`, by windows along the long side.

        Returns:
            depth f32[B,H,W] in metres, at least 1e-3; confidence f32[B,H,W] in 0..1: 1 / (1 + s), s the standard
            deviation in metres of the codes' depths under the token's probabilities, bilinear between the tokens. 1
            where the solver is sure of one depth, 1/2 where it wavers by a metre; codes of one depth count as
            agreeing, which the entropy of the probabilities would not see.
        """

        def square(images_BHWC):
            return self.detokenize(model_state, self.decode(params, self.memory(params, images_BHWC)))

        return windows.predict_windows(square, batch["image"], flip=self.flip, min_value=MIN_DEPTH)

    def memory(self, params: Tree, images_BHWC: jax.Array) -> list:
        """Keys and values of square images [B,S,S,3] in 0..1 for every decoder layer."""
        return solving.memory(self.solver, params, self._scaled(images_BHWC))

    def decode(self, params: Tree, memory: list) -> Decoded:
        """Greedy depth tokens of the images in `memory`, relative to the depth window, and their logits."""
        return decode(
            self.solver.transformer,
            params["transformer"],
            memory,
            task=TASK_ID,
            length=self.grid**2,
            window=self.vocabulary.depth_codes,
            soft_input=self.soft_input,
        )

    def detokenize(self, model_state: Tree, decoded: Decoded) -> dict[str, jax.Array]:
        """`depth` and `confidence` f32[B,S,S] of square images, as `predict` returns them."""
        if self.soft_detokenize:
            depth = self._soft_map(model_state, decoded.logits)
        else:
            depth = self._tokenizer(model_state, "decode", self._to_grid(decoded.tokens))[..., 0]
        return {"depth": depth, "confidence": self._confidence(model_state, decoded.logits)}

    def _scaled(self, images_BHWC: jax.Array) -> jax.Array:
        images = solving.normalize(images_BHWC) if self.normalize_image else images_BHWC
        margin = self.pad_to - self.image_size if self.pad_to else 0
        return jnp.pad(images, ((0, 0), (0, margin), (0, margin), (0, 0)))

    def _tokenizer(self, model_state: Tree, method: str, *args: jax.Array) -> jax.Array:
        frozen = model_state.get("depth_tokenizer", {"params": {}, "model_state": {}})
        return solving.apply_frozen(self.tokenizer, frozen, method, *args)

    def _soft_map(self, model_state: Tree, logits_BTK: jax.Array) -> jax.Array:
        return self._tokenizer(model_state, "decode_soft", self._to_grid(logits_BTK))[..., 0]

    def _to_grid(self, x_BT: jax.Array) -> jax.Array:
        return x_BT.reshape(x_BT.shape[0], self.grid, self.grid, *x_BT.shape[2:])

    def _confidence(self, model_state: Tree, logits_BTK: jax.Array) -> jax.Array:
        codes_K11 = jnp.arange(logits_BTK.shape[-1]).reshape(-1, 1, 1)
        depth_K = jnp.mean(self._tokenizer(model_state, "decode", codes_K11), axis=(1, 2, 3))
        p_BTK = jax.nn.softmax(logits_BTK)
        deviation_BTK = depth_K.reshape(1, 1, -1) - (p_BTK @ depth_K)[..., None]
        spread_Bhw = self._to_grid(jnp.sqrt(jnp.sum(p_BTK * deviation_BTK**2, -1)))
        shape = (spread_Bhw.shape[0], self.image_size, self.image_size)
        return 1 / (1 + jax.image.resize(spread_Bhw, shape, "bilinear"))


def _check_layout(task: DepthTask) -> None:
    size, backbone, transformer = task.image_size, task.solver.backbone, task.solver.transformer
    solving.check_multiple("image_size", size, "tokenizer.downsample", task.tokenizer.downsample)
    padded = ("pad_to", task.pad_to) if task.pad_to else ("image_size", size)
    solving.check_multiple(*padded, "backbone stride", backbone.stride)
    if 0 < task.pad_to < size:
        raise ValueError(f"pad_to={task.pad_to} must be 0 (no padding) or at least image_size={size}")
    solving.check_last_stage(backbone)
    if transformer.num_tasks <= TASK_ID:
        raise ValueError(f"num_tasks={transformer.num_tasks} must be more than {TASK_ID}, the row of depth")
    if task.memory_weight and task.pad_to not in (0, size):
        raise ValueError(f"memory_weight={task.memory_weight} needs unpadded images: set pad_to=0 or memory_weight=0")
    if task.memory_weight and task.tokenizer.downsample % backbone.stride:
        raise ValueError(
            f"memory_weight={task.memory_weight} needs memory vectors for each token: backbone stride "
            f"{backbone.stride} must divide tokenizer.downsample={task.tokenizer.downsample}; change one or set "
            "memory_weight=0"
        )
    if not 0 <= task.input_noise <= 1:
        raise ValueError(f"input_noise={task.input_noise} must lie in 0..1")
    if task.grid**2 > transformer.max_length:
        raise ValueError(
            f"{task.grid**2} tokens of an image of {size} pixels are more than max_length={transformer.max_length}"
        )
    if task.tokenizer.num_codes != task.vocabulary.num_depth_codes:
        raise ValueError(
            f"tokenizer.num_codes={task.tokenizer.num_codes} must equal vocabulary.num_depth_codes="
            f"{task.vocabulary.num_depth_codes}"
        )
    if transformer.vocab_size != task.vocabulary.size:
        raise ValueError(
            f"vocab_size={transformer.vocab_size} must equal the vocabulary's {task.vocabulary.size} tokens"
        )
    if transformer.parallel and task.soft_input:
        raise ValueError("the parallel model has no step to feed a soft token to: set soft_input=False")


def build(fields: Mapping) -> DepthTask:
    """From `config.task`: `backbone`, `transformer`, `tokenizer` and `vocabulary` hold the fields of their classes.

    `tokenizer.kind` is 'vqvae' (default) or 'bins', the comparison tokenizer without training.
    """
    fields = dict(fields)
    tokenizer = dict(fields.pop("tokenizer", {}))
    kinds = {"vqvae": VQVAE, "bins": BinsTokenizer}
    kind = tokenizer.pop("kind", "vqvae")
    if kind not in kinds:
        raise ValueError(f"tokenizer.kind={kind!r} is not one of {', '.join(kinds)}")
    tokenizer = build_dataclass(kinds[kind], tokenizer)
    vocabulary = build_dataclass(Vocabulary, {"num_depth_codes": tokenizer.num_codes, **fields.pop("vocabulary", {})})
    solver = solving.build_solver(fields, vocabulary)
    return build_dataclass(DepthTask, {**fields, "solver": solver, "tokenizer": tokenizer, "vocabulary": vocabulary})
