"""A dense map from one image as a sequence of tokens (arXiv 2301.02229), of any modality."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from aitok_jax.config import build_dataclass, unknown
from aitok_jax.models import losses
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.models.decode import Decoded, decode
from aitok_jax.models.task_solver import TaskSolver
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks import from_scratch, solver
from aitok_jax.tasks.base import Batch, Tree, apply_tokenizer, check_multiple, init_tokenizer
from aitok_jax.tasks.modalities import MODALITIES, Modality
from aitok_jax.tasks.vocabulary import Vocabulary
from aitok_jax.tasks.windows import predict_windows

TOKENIZERS = {"vqvae": VQVAE, "bins": BinsTokenizer}


@dataclasses.dataclass(frozen=True)
class MapPart:
    """Predicts the tokens of a map from RGB in 0..1 and detokenizes them.

    The three uses of soft tokens are three switches: `soft_input`, `soft_detokenize` and `aux_weight`.

    Attributes:
        modality: what the map is.
        solver: backbone and token transformer.
        tokenizer: the frozen detokenizer; its variables are model_state['NAME_tokenizer'].
        vocabulary: token windows; that of the modality's codes has the tokenizer's K.
        image_size: side of the square images the solver sees; longer images are cut in windows at test time.
        soft_input: feed the probability-weighted embedding to the next step (not for the parallel model).
        soft_detokenize: decode the probability-weighted codes instead of the most probable ones.
        aux_weight: weight of the modality's loss of the softly detokenized map; 0 turns it off.
        loss_weight: of the whole loss.
        normalize_image: subtract the mean of ImageNet's colours and divide by their standard deviation first, as
            published for objects. Published weights of maps want RGB in 0..1 as it is; a backbone trained from random
            weights learns far faster with it, since most of an image in 0..1 is its mean.
        pad_to: pad the squares at the right and bottom with zeros to this side; 0 = no padding.
        flip: average with the mirror image at test time.
        blend: blend the windows of long images, see `predict_windows`; the published evaluation does not.
        eval_crop: rows and columns (top, bottom, left, right) that metrics look at, or None.
        input_noise, memory_weight: see `from_scratch`; 0 as published.
    """

    kind: ClassVar[str] = "maps"

    modality: Modality
    solver: TaskSolver
    tokenizer: VQVAE | BinsTokenizer
    vocabulary: Vocabulary
    image_size: int
    soft_input: bool = True
    soft_detokenize: bool = True
    aux_weight: float = 1.0
    loss_weight: float = 1.0
    normalize_image: bool = False
    pad_to: int = 0
    flip: bool = True
    blend: bool = False
    eval_crop: tuple[int, int, int, int] | None = None
    input_noise: float = 0.0
    memory_weight: float = 0.0

    def __post_init__(self):
        _check(self)

    @property
    def grid(self) -> int:
        """Rows, and columns, of tokens."""
        return self.image_size // self.tokenizer.downsample

    @property
    def task_id(self) -> int:
        return self.modality.task_id

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.modality.name,)

    @property
    def meanings(self) -> Mapping[str, str]:
        spread = "s the standard deviation of what the token may stand for"
        return {self.modality.name: self.modality.meaning, "confidence": f"0..1, 1 / (1 + s), {spread}"}

    def init_heads(self, rng: jax.Array) -> Tree:
        if not self.memory_weight:
            return {}
        inputs = (self.tokenizer.downsample // self.solver.backbone.stride) ** 2 * self.solver.transformer.dim
        return {self._head: from_scratch.init_head(self.tokenizer.num_codes, inputs, rng)}

    def init_state(self, rng: jax.Array, batch: Batch) -> Tree:
        if isinstance(self.tokenizer, BinsTokenizer):
            return {}
        maps_BHWC = self.modality.encode(batch[self.modality.name])
        return {self._frozen: init_tokenizer(self.tokenizer, rng, maps_BHWC)}

    def inputs(self, model_state: Tree, batch: Batch, rng: jax.Array) -> solver.Inputs:
        map_ = batch[self.modality.name]
        targets_BT = self.targets(model_state, map_)
        tokens_BT = from_scratch.corrupt(rng, targets_BT[:, :-1], self.input_noise, self._codes)
        return solver.Inputs(self._scaled(batch["image"]), tokens_BT, (targets_BT, map_))

    def score(
        self,
        params: Tree,
        model_state: Tree,
        logits_BTV: jax.Array,
        memory_BMD: jax.Array,
        targets: tuple,
        weight_B: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        targets_BT, map_ = targets
        map_ = losses.real_rows(map_, weight_B, self.modality.missing)
        loss, metrics = self.token_loss(model_state, logits_BTV, targets_BT, map_, weight_B)
        if self.memory_weight:
            logits_BTK = from_scratch.map_logits(params[self._head], memory_BMD, self.grid, self.tokenizer.num_codes)
            codes_BT = targets_BT - self._codes.start
            ce = losses.mean(optax.softmax_cross_entropy_with_integer_labels(logits_BTK, codes_BT), weight_B)
            auxiliary = self.modality.auxiliary(self._soft(model_state, logits_BTK), map_)
            metrics["memory_loss"] = ce + self.aux_weight * sum(auxiliary.values())
            loss += self.loss_weight * self.memory_weight * metrics["memory_loss"]
        return loss, metrics

    def targets(self, model_state: Tree, map_: jax.Array) -> jax.Array:
        """f32[B,H,W,...] map -> int32[B,T] tokens of the whole vocabulary, row by row."""
        codes_Bhw = self._apply(model_state, "encode", self.modality.encode(map_))
        return self._codes.start + codes_Bhw.reshape(codes_Bhw.shape[0], -1)

    def token_loss(
        self,
        model_state: Tree,
        logits_BTV: jax.Array,
        targets_BT: jax.Array,
        map_: jax.Array,
        weight_B: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy over the whole vocabulary, plus the auxiliary loss of the softly detokenized map.

        Rows with `weight_B` 0 must have maps without annotation.
        """
        ce_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV.astype(jnp.float32), targets_BT)
        ce = losses.mean(ce_BT, weight_B)
        metrics, loss = {"cross_entropy": ce}, ce
        if self.aux_weight:
            auxiliary = self.modality.auxiliary(self._soft(model_state, logits_BTV[..., self._codes.slice]), map_)
            metrics |= auxiliary
            loss += self.aux_weight * sum(auxiliary.values())
        return self.loss_weight * loss, metrics

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, jax.Array]:
        """The map of images f32[B,H,W,3] in 0..1 whose short side is `image_size`, by windows along the long side.

        Returns:
            the map f32[B,H,W,...] under the modality's name; confidence f32[B,H,W] in 0..1: 1 / (1 + s), s the
            modality's `spread` of the codes under the token's probabilities, bilinear between the tokens. 1 where the
            solver is sure of one value, 1/2 where it wavers by one unit.
        """
        return MapsTogether((self,)).predict(params, model_state, batch)[self.modality.name]

    def memory(self, params: Tree, images_BHWC: jax.Array) -> list:
        """Keys and values of square images [B,S,S,3] in 0..1 for every decoder layer."""
        return solver.memory(self.solver, params, self._scaled(images_BHWC))

    def decode(self, params: Tree, memory: list) -> Decoded:
        """Greedy tokens of the images in `memory`, counted from the start of the codes, and their logits."""
        return decode(
            self.solver.transformer,
            params["transformer"],
            memory,
            task=self.task_id,
            length=self.grid**2,
            window=self._codes.slice,
            soft_input=self.soft_input,
        )

    def detokenize(self, model_state: Tree, decoded: Decoded) -> dict[str, jax.Array]:
        """Of square images: `map` f32[B,S,S,C] as the VQ-VAE gives it, and `confidence` f32[B,S,S]."""
        if self.soft_detokenize:
            raw = self._soft(model_state, decoded.logits)
        else:
            raw = self._apply(model_state, "decode", self._to_grid(decoded.tokens))
        return {"map": raw, "confidence": self._confidence(model_state, decoded.logits)}

    @property
    def _codes(self):
        return self.vocabulary.codes_of(self.modality.name)

    @property
    def _frozen(self) -> str:
        return f"{self.modality.name}_tokenizer"

    @property
    def _head(self) -> str:
        return f"{self.modality.name}_memory_head"

    def _scaled(self, images_BHWC: jax.Array) -> jax.Array:
        images = solver.normalize(images_BHWC) if self.normalize_image else images_BHWC
        margin = self.pad_to - self.image_size if self.pad_to else 0
        return jnp.pad(images, ((0, 0), (0, margin), (0, margin), (0, 0)))

    def _apply(self, model_state: Tree, method: str, *args: jax.Array) -> jax.Array:
        frozen = model_state.get(self._frozen, {"params": {}, "model_state": {}})
        return apply_tokenizer(self.tokenizer, frozen, method, *args)

    def _soft(self, model_state: Tree, logits_BTK: jax.Array) -> jax.Array:
        return self._apply(model_state, "decode_soft", self._to_grid(logits_BTK))

    def _to_grid(self, x_BT: jax.Array) -> jax.Array:
        return x_BT.reshape(x_BT.shape[0], self.grid, self.grid, *x_BT.shape[2:])

    def _confidence(self, model_state: Tree, logits_BTK: jax.Array) -> jax.Array:
        codes_K11 = jnp.arange(logits_BTK.shape[-1]).reshape(-1, 1, 1)
        values_KC = jnp.mean(self._apply(model_state, "decode", codes_K11), axis=(1, 2))
        spread_Bhw = self._to_grid(self.modality.spread(jax.nn.softmax(logits_BTK), values_KC))
        shape = (spread_Bhw.shape[0], self.image_size, self.image_size)
        return 1 / (1 + jax.image.resize(spread_Bhw, shape, "bilinear"))


@dataclasses.dataclass(frozen=True)
class MapsTogether:
    """Several maps of one model which see images alike (`seen_alike`): backbone and encoder run once."""

    parts: tuple[MapPart, ...]

    def predict(self, params: Tree, model_state: Tree, batch: Batch) -> dict[str, dict[str, jax.Array]]:
        """What `MapPart.predict` says of each map, by the name of its modality."""
        parts = {part.modality.name: part for part in self.parts}
        first = self.parts[0]

        def square(images_BHWC):
            memory = first.memory(params, images_BHWC)
            found = {name: part.detokenize(model_state, part.decode(params, memory)) for name, part in parts.items()}
            return {(name, kind): x for name, maps in found.items() for kind, x in maps.items()}

        def mirror(maps):
            return maps | {(name, "map"): part.modality.mirror(maps[name, "map"]) for name, part in parts.items()}

        maps = predict_windows(square, batch["image"], flip=first.flip, blend=first.blend, mirror=mirror)
        return {
            name: {name: part.modality.finish(maps[name, "map"]), "confidence": maps[name, "confidence"]}
            for name, part in parts.items()
        }


def seen_alike(parts: Iterable[MapPart]) -> list[list[MapPart]]:
    """Parts of one model, in groups that can be predicted together."""
    groups: dict[tuple, list[MapPart]] = {}
    for part in parts:
        sight = (part.image_size, part.pad_to, part.normalize_image, part.flip, part.blend)
        groups.setdefault(sight, []).append(part)
    return list(groups.values())


def _check(part: MapPart) -> None:
    size, backbone, transformer = part.image_size, part.solver.backbone, part.solver.transformer
    check_multiple("image_size", size, "tokenizer.downsample", part.tokenizer.downsample)
    check_multiple(
        *(("pad_to", part.pad_to) if part.pad_to else ("image_size", size)), "backbone stride", backbone.stride
    )
    if 0 < part.pad_to < size:
        raise ValueError(f"pad_to={part.pad_to} must be 0 (no padding) or at least image_size={size}")
    if part.memory_weight and part.pad_to not in (0, size):
        raise ValueError(f"memory_weight={part.memory_weight} needs unpadded images: set pad_to=0 or memory_weight=0")
    if part.memory_weight and part.tokenizer.downsample % backbone.stride:
        raise ValueError(
            f"memory_weight={part.memory_weight} needs memory vectors for each token: backbone stride "
            f"{backbone.stride} must divide tokenizer.downsample={part.tokenizer.downsample}; change one or set "
            "memory_weight=0"
        )
    if not 0 <= part.input_noise <= 1:
        raise ValueError(f"input_noise={part.input_noise} must lie in 0..1")
    if part.grid**2 > transformer.max_length:
        raise ValueError(
            f"{part.grid**2} tokens of an image of {size} pixels are more than max_length={transformer.max_length}"
        )
    codes = part.vocabulary.codes_of(part.modality.name).size
    if part.tokenizer.num_codes != codes:
        raise ValueError(
            f"tokenizer.num_codes={part.tokenizer.num_codes} must equal the vocabulary's {codes} codes of "
            f"{part.modality.name}"
        )
    if transformer.parallel and part.soft_input:
        raise ValueError("the parallel model has no step to feed a soft token to: set soft_input=False")


def split_fields(fields: Mapping[str, Any], modality: str) -> tuple[Modality, dict[str, Any]]:
    """The modality, made of those of the fields that are its own, and the others."""
    if modality not in MODALITIES:
        raise ValueError(f"task: {unknown(modality, (*MODALITIES, 'instances'))}")
    names = {field.name for field in dataclasses.fields(MODALITIES[modality])}
    own = {name: value for name, value in fields.items() if name in names}
    return build_dataclass(MODALITIES[modality], own), {n: value for n, value in fields.items() if n not in names}


def build_tokenizer(modality: Modality, fields: Mapping[str, Any]) -> VQVAE | BinsTokenizer:
    """From `tokenizer` of a config; `kind` is 'vqvae' (default) or 'bins', the comparison without training."""
    fields = dict(fields)
    kind = fields.pop("kind", "vqvae")
    if kind not in TOKENIZERS:
        raise ValueError(f"tokenizer.kind={kind!r} is not one of {', '.join(TOKENIZERS)}")
    if kind == "vqvae":
        fields = {"channels": modality.channels, "objective": modality.objective, **fields}
    return build_dataclass(TOKENIZERS[kind], fields)


def build(modality: str, fields: Mapping[str, Any], shared: Mapping[str, Any]) -> MapPart:
    """From a part of `config.task`; `tokenizer` holds the fields of its class, `shared` solver and vocabulary."""
    described, own = split_fields(fields, modality)
    tokenizer = build_tokenizer(described, own.pop("tokenizer", {}))
    return build_dataclass(MapPart, {**own, **shared, "modality": described, "tokenizer": tokenizer})
