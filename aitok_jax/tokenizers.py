"""The tokenizers by themselves: depth maps and instance masks to tokens and back, and PaliGemma's text form.

    from aitok_jax import DepthTokenizer, MaskTokenizer

    tokenizer = MaskTokenizer.load("vae-oid.npz")  # or .pt, .pth, .safetensors, or a run directory
    ids = tokenizer.encode(masks)  # [N,64,64] in 0..1 -> int32[N,16]
    masks = tokenizer.decode(ids)  # float32[N,64,64], about 0..1, a mask where above 1/2

NumPy goes in and comes out; in between the arrays are on JAX's default device.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from aitok_jax import tasks
from aitok_jax.convert import published, rules, weight_files
from aitok_jax.models.vqvae import VQVAE
from aitok_jax.tasks.arguments import check_path, check_process, whole_number
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.tasks.tokenizer import MapTokenizer
from aitok_jax.training import checkpoint

MASK_TOKENS, MASK_CODES = 16, 128  # of the published tokenizer, which the text form is for
LOCATIONS = 1023  # the largest <locNNNN>


class _Tokenizer:
    """What both tokenizers do; sizes and ranges are checked in the classes."""

    _task: ClassVar[str]  # its name in a solver's model_state
    _prefix: ClassVar[str]  # before its names in a published solver
    _options: ClassVar[dict[str, Any]]  # of the published tokenizer, which a weight file does not tell

    def __init__(self, model: VQVAE, variables: Mapping[str, Any], size: int | None = None):
        check_process()
        self.model, self._size = model, size
        self._variables = jax.device_put(jax.tree.map(jnp.asarray, dict(variables)))

    @classmethod
    def load(cls, path: str | Path):
        """Reads a tokenizer.

        Args:
          path: the run directory of a tokenizer; that of a solver, whose frozen tokenizer is taken; a directory of
            converted weights of either; 'builtin', for the small one that comes with the package; or a weight file
            (.pt, .pth, .safetensors, .npz under the published names), of a tokenizer or a solver, whose architecture
            is read off its shapes.

        Raises:
          FileNotFoundError: nothing there.
          ValueError: a directory or file of something else, or one that is damaged (see `weight_files`).
          RuntimeError: in a process forked after a model was loaded; as by every call.
        """
        check_path("path", path)
        check_process()
        if checkpoint.locate(path).is_dir():
            return cls(*cls._from_directory(path))
        return cls(*cls._from_file(path))

    @classmethod
    def _from_file(cls, path: str | Path) -> tuple[VQVAE, dict]:
        state_dict = _stripped(path, weight_files.read_weights(path))
        inside = {name: array for name, array in state_dict.items() if name.startswith(cls._prefix)}
        state_dict = {name.removeprefix(cls._prefix): array for name, array in (inside or state_dict).items()}
        fields = _fields_of(path, state_dict) | cls._options
        codebook = state_dict["_vq_vae._embedding"]
        state_dict = {"_vq_vae._ema_cluster_size": codebook[:, 0], "_vq_vae._ema_w": codebook} | state_dict  # unused
        task = {"name": cls._task, "image_size": fields["downsample"], "mask_ratio": 0.0, "tokenizer": fields}
        task = {key: value for key, value in task.items() if key != "mask_ratio" or cls is DepthTokenizer}
        variables, _, report = published.convert(state_dict, ConfigDict({"task": task}))
        if report.missing:
            raise ValueError(f"{path}: the VQ-VAE lacks {', '.join(report.missing)}")
        (part,) = tasks.build(task).parts.values()
        return part.tokenizer, {"params": variables["params"], **variables["model_state"]}

    @classmethod
    def _from_directory(cls, path: str | Path) -> tuple[VQVAE, dict, int]:
        config, weights = checkpoint.load_inference(path)
        params, state = weights["params"], weights["model_state"]
        for part in tasks.build(config.task).parts.values():
            if cls._reconstructs(part):
                return part.tokenizer, {"params": params, **state}, part.image_size
            if frozen := state.get(cls._task):
                variables = {"params": frozen["params"], **frozen["model_state"]}
                if cls._solves(part) and isinstance(part.tokenizer, VQVAE):
                    return part.tokenizer, variables, getattr(part, "mask_size", part.image_size)
        raise ValueError(f"{path} is a run without {cls._task}")

    @property
    def num_codes(self) -> int:
        """K; ids run over 0..K-1."""
        return self.model.num_codes

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of a map of this size."""
        return self.model.grid(whole_number("height", height), whole_number("width", width))

    def _encode(self, maps: np.ndarray) -> np.ndarray:
        single = maps.ndim == 2
        batch = maps[None] if single else maps
        self.grid(*batch.shape[1:])
        codes = self._run("encode", batch[..., None].astype(np.float32))
        ids = codes.reshape(len(batch), math.prod(codes.shape[1:]))
        return ids[0] if single else ids

    def _run(self, method: str, x: np.ndarray) -> np.ndarray:
        check_process()
        with jax.enable_x64(False):
            return np.array(_compiled(self.model, method)(self._variables, x))

    def decode(self, ids: np.ndarray, grid: tuple[int, int] | None = None) -> np.ndarray:
        """Tokens to maps.

        Args:
          ids: int[T] of one map or int[B,T] of several, row by row, or int[B,h,w].
          grid: rows and columns; None is a square. Not with int[B,h,w].

        Returns:
          float32[H,W] or float32[B,H,W], in the units and range of the class.

        Raises:
          ValueError: ids that are masked, no whole numbers or outside 0..K-1, or whose number does not fit the grid.
        """
        ids = _array("ids", ids)
        if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2, 3):
            raise ValueError(f"ids must be whole numbers [T], [B,T] or [B,h,w], got {ids.dtype} of shape {ids.shape}")
        if ids.size and not (ids.min() >= 0 and ids.max() < self.num_codes):
            raise ValueError(f"ids must lie in 0..{self.num_codes - 1}, got {ids.min()}..{ids.max()}")
        return self._decode("decode", ids.astype(np.int32), ids.ndim == 1, ids.shape, grid)

    def decode_soft(self, probabilities: np.ndarray, grid: tuple[int, int] | None = None) -> np.ndarray:
        """Soft tokens to maps: decodes the probability-weighted mean of the codes.

        Args:
          probabilities: float[T,K], float[B,T,K] or float[B,h,w,K], that sum to 1 over the K codes. Published solvers
            take them from their logits as softmax(τ·logits), τ being `model.soft_temperature` (0.8 depth, 1 masks).
          grid: as for `decode`.

        Returns:
          as `decode`.

        Raises:
          ValueError: another shape, or what are no probabilities (logits, say).
        """
        p = _array("probabilities", probabilities)
        if p.dtype.kind not in "fiu":
            raise ValueError(f"probabilities must be floats that sum to 1 over the codes, got {p.dtype}")
        p = p.astype(np.float32)
        if p.ndim not in (2, 3, 4) or p.shape[-1] != self.num_codes:
            raise ValueError(f"probabilities must be [T,K], [B,T,K] or [B,h,w,K], K={self.num_codes}, got {p.shape}")
        if p.size and (p.min() < 0 or not np.allclose(p.sum(-1), 1, atol=1e-3)):
            raise ValueError(
                "probabilities must be at least 0 and sum to 1 over the last axis; apply a softmax to logits"
            )
        return self._decode("decode_probabilities", p, p.ndim == 2, p.shape[:-1], grid)

    def _decode(self, method: str, x: np.ndarray, single: bool, shape: tuple[int, ...], grid) -> np.ndarray:
        if single:
            x, shape = x[None], (1, *shape)
        if len(shape) == 3:
            if grid is not None:
                raise ValueError(f"grid={grid} is given, but the tokens lie in one already, {shape[1:]}")
            grid = shape[1:]
        elif grid is None:
            grid = (math.isqrt(shape[1]),) * 2
        grid = _rows_and_columns(grid)
        if math.prod(grid) != math.prod(shape[1:]):
            raise ValueError(f"{shape[1]} tokens a map do not fill a grid of {grid}; give grid=(rows, columns)")
        self._check_grid(grid)
        x = x.reshape(shape[0], *grid, *x.shape[len(shape) :])
        maps = self._run(method, x)[..., 0]
        return maps[0] if single else maps

    def _check_grid(self, grid: tuple[int, int]) -> None:
        pass


class DepthTokenizer(_Tokenizer):
    """Depth maps in metres, 0 where there is no annotation, of any size that is a multiple of the downsample ratio.

    The published one has 128 codes and one token for 32×32 pixels: 225 tokens for 480×480, 100 for 320×320.
    """

    _task, _prefix = "depth_tokenizer", "depth_head.vqvae."
    _options: ClassVar[dict[str, Any]] = {
        "objective": "mse_ignore_zero",
        "use_norm": False,
        "max_value": 10.0,
        "soft_temperature": 0.8,
    }

    @staticmethod
    def _reconstructs(part: Any) -> bool:
        return isinstance(part, MapTokenizer) and part.modality.name == Depth.name

    @staticmethod
    def _solves(part: Any) -> bool:
        return part.kind == "maps" and part.modality.name == Depth.name

    def encode(self, maps: np.ndarray) -> np.ndarray:
        """float[H,W] or float[B,H,W] metres -> ids int32[T] or int32[B,T], row by row.

        What a masked array masks has no annotation.

        Raises:
          ValueError: whole numbers (millimetres, say), negative or infinite values, or a size that is no multiple of
            the downsample ratio.
        """
        maps = _array("depth", maps, missing=0)
        if maps.dtype.kind != "f" or maps.ndim not in (2, 3):
            raise ValueError(f"depth must be floats in metres [H,W] or [B,H,W], got {maps.dtype} of shape {maps.shape}")
        if not np.all(np.isfinite(maps) & (maps >= 0)):
            raise ValueError(f"depth must be finite and at least 0, {_range(maps)}; set pixels without annotation to 0")
        return self._encode(maps)


class MaskTokenizer(_Tokenizer):
    """Instance masks cropped at their boxes, in 0..1; the published one makes 16 of 128 codes from 64×64 pixels.

    Values that `decode` and `decode_soft` return are about 0..1 (not clipped), a mask where they are above 1/2, as AiT
    has them. PaliGemma's decoder gives 2·masks − 1, a mask where above 0.
    """

    _task, _prefix = "mask_tokenizer", "insseg_head.vqvae."
    _options: ClassVar[dict[str, Any]] = {
        "objective": "mse",
        "use_norm": True,
        "max_value": 1.0,
        "soft_temperature": 1.0,
    }

    @property
    def size(self) -> int | None:
        """Side of the masks in pixels; None of a weight file, which does not tell: any multiple of the downsampling."""
        return self._size

    @staticmethod
    def _reconstructs(part: Any) -> bool:
        return part.kind == "masks"

    @staticmethod
    def _solves(part: Any) -> bool:
        return part.kind == "objects" and part.tokenizer is not None

    def encode(self, maps: np.ndarray) -> np.ndarray:
        """bool, uint8 or float[S,S] or [B,S,S] masks in 0..1 -> ids int32[T] or int32[B,T], row by row.

        Raises:
          ValueError: values that are masked or outside 0..1, masks that are not square, or of another size.
        """
        maps = _array("masks", maps)
        wanted = self.size or f"a multiple of {self.model.downsample}"
        square = (
            maps.ndim in (2, 3) and maps.shape[-1] == maps.shape[-2] and maps.shape[-1] % self.model.downsample == 0
        )
        if not square or maps.shape[-1] != (self.size or maps.shape[-1]):
            raise ValueError(f"masks must be [S,S] or [B,S,S], S = {wanted}, got {maps.shape}; resize the crop")
        if maps.dtype.kind not in "fbiu" or not np.all((maps >= 0) & (maps <= 1)):
            fix = "divide by 255, or compare; what is unknown (NaN, -1) counts as 0 or 1, as you decide"
            raise ValueError(f"masks must lie in 0..1, {_range(maps)}; {fix}")
        return self._encode(maps)

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if self.size and grid != self.grid(self.size, self.size):
            raise ValueError(f"a mask has {self.grid(self.size, self.size)} tokens, row by row, but {grid} are given")


def _array(name: str, value: Any, missing: float | None = None) -> np.ndarray:
    """As NumPy, `missing` where it is masked; ValueError for masked values without, and for what is no array."""
    try:
        array = np.ma.array(value)  # heeds the masks in a list, too
    except Exception as error:  # another library's arrays raise what they like
        given = f"{type(value).__name__} ({error!s:.200})"
        raise ValueError(f"{name} must be a NumPy array of numbers, got {given}; convert it") from error
    if missing is None and np.ma.is_masked(array):
        raise ValueError(f"{name} must have no masked values; fill them with what they stand for (.filled(0), say)")
    return np.asarray(array.data if missing is None else array.filled(missing))


def _range(array: np.ndarray) -> str:
    """Of an array of any type, for messages."""
    return f"got {array.dtype}" + (f" in {array.min()}..{array.max()}" if array.dtype.kind in "fbiu" else "")


def _rows_and_columns(grid: Any) -> tuple[int, int]:
    try:
        rows, columns = grid
    except (TypeError, ValueError) as error:
        raise ValueError(f"grid={grid!r:.200} must be (rows, columns)") from error
    return whole_number("rows of the grid", rows), whole_number("columns of the grid", columns)


@functools.lru_cache(maxsize=32)
def _compiled(model: VQVAE, method: str):
    return jax.jit(functools.partial(model.apply, method=method))


def _stripped(path: str | Path, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights under the names that they have without wrappers (`rules.strip`)."""
    names: dict[str, str] = {}
    for name in weights:
        if (other := names.setdefault(rules.strip(name), name)) != name:
            raise ValueError(f"{path}: {other} and {name} are one, {rules.strip(name)}; save one of the two models")
    return {plain: weights[name] for plain, name in names.items()}


def _fields_of(path: str | Path, state_dict: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The architecture, from the shapes: strided convolutions, residual blocks, a 1×1 convolution."""
    shapes = {name: array.shape for name, array in state_dict.items()}
    convolutions = [shape for name, shape in shapes.items() if re.fullmatch(r"encoder\.\d+\.weight", name)]
    first, codebook = shapes.get("encoder.0.weight", ()), shapes.get("_vq_vae._embedding", ())
    stages = sum(shape[2:] == (4, 4) for shape in convolutions)
    if not stages or len(first) != 4 or len(codebook) != 2:
        raise ValueError(f"{path}: no VQ-VAE under the published names (encoder.0.weight, …, _vq_vae._embedding)")
    return {
        "hidden": first[0],
        "downsample": 2**stages,
        "num_res_blocks": len({name.split(".")[1] for name in shapes if re.match(r"encoder\.\d+\.net\.", name)}),
        "num_codes": codebook[0],
        "code_dim": codebook[1],
        "channels": first[1],
    }


def write_text(box: Sequence[float], ids: Sequence[int] | None, height: int, width: int, label: str = "") -> str:
    """An object in PaliGemma's text form: '<loc0102><loc…><loc…><loc…><seg003>…<seg127> cat'.

    Args:
      box: x1 y1 x2 y2 in pixels of the image. The text has them as y1 x1 y2 x2, each round(1023·v/size).
      ids: the 16 tokens of the mask, or None to leave them out.
      height, width: of the image.
      label: what stands after it.

    Raises:
      ValueError: a box outside the image, ids that are not 16 numbers in 0..127, or a label that holds '<', '>' or ';'.
    """
    height, width = whole_number("height", height), whole_number("width", width)
    corners, sides = _array("box", box), (width, height) * 2
    if corners.shape != (4,) or corners.dtype.kind not in "fiu" or not np.all((corners >= 0) & (corners <= sides)):
        raise ValueError(f"box={box!r:.200} must be x1 y1 x2 y2 inside of an image of {height}×{width}")
    codes = np.zeros(0, int) if ids is None else _array("ids", ids)
    if ids is not None and (codes.shape != (MASK_TOKENS,) or not np.isin(codes, range(MASK_CODES)).all()):
        raise ValueError(f"a mask has {MASK_TOKENS} ids in 0..{MASK_CODES - 1}, got {ids!r:.200}")
    if not isinstance(label, str) or re.search("[<>;]", label):
        raise ValueError(f"label={label!r:.200} must be a text and must not hold '<', '>' or ';'")
    x1, y1, x2, y2 = corners.tolist()
    fractions = (y1 / height, x1 / width, y2 / height, x2 / width)
    words = [f"<loc{round(LOCATIONS * f):04d}>" for f in fractions] + [f"<seg{int(i):03d}>" for i in codes]
    return f"{''.join(words)} {label}".rstrip()


def parse_text(text: str, height: int, width: int) -> list[dict[str, Any]]:
    """The objects of a text in PaliGemma's form, ';' between them; the inverse of `write_text`.

    Args:
      text: for each object four <locNNNN>, perhaps sixteen <segNNN>, perhaps a label.
      height, width: of the image, in whose pixels the boxes are given.

    Returns:
      For each object `box` float32[4] x1 y1 x2 y2, `ids` int32[16] or None, `label` str. [] for an empty text.

    Raises:
      ValueError: anything else, with the object and what is wrong with it.
    """
    height, width = whole_number("height", height), whole_number("width", width)
    if not isinstance(text, str):
        raise ValueError(f"text={text!r:.200} must be a str; parse a list's texts one by one")
    return [_parse_object(part, height, width) for part in text.split(";")] if text.strip() else []


def _parse_object(text: str, height: int, width: int) -> dict[str, Any]:
    text = text.strip()
    words, label = re.fullmatch(r"((?:<[^<>]*>\s*)*)(.*)", text, re.DOTALL).groups()
    words = re.findall("<[^<>]*>", words)
    kinds = [word[1:4] for word in words]
    for word in words:
        number = re.fullmatch(r"<(?:loc(\d{4})|seg(\d{3}))>", word, re.ASCII)
        if not number or int(number[1] or 0) > LOCATIONS or int(number[2] or 0) >= MASK_CODES:
            raise ValueError(f"{text!r}: {word} is neither <loc0000>..<loc1023> nor <seg000>..<seg127>")
    if kinds not in (["loc"] * 4, ["loc"] * 4 + ["seg"] * MASK_TOKENS):
        raise ValueError(
            f"{text!r}: an object is four <locNNNN>, then none or {MASK_TOKENS} <segNNN>; "
            f"here are {kinds.count('loc')} and {kinds.count('seg')}, or in another order"
        )
    if re.search("[<>]", label):
        raise ValueError(f"{text!r}: tokens stand before the label, and ';' between objects")
    y1, x1, y2, x2 = (int(word[4:8]) / LOCATIONS for word in words[:4])
    ids = np.array([int(word[4:7]) for word in words[4:]], np.int32)
    box = np.array([x1 * width, y1 * height, x2 * width, y2 * height], np.float32)
    return {"box": box, "ids": ids if len(ids) else None, "label": label.strip()}
