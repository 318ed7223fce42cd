"""Transforms of examples with a dense map, in TensorFlow ops: the published recipes for NYUv2, and their parts.

An example is a dict with `image` uint8[H,W,3] RGB (where there is one) and a map f32[H,W,...] by its modality's name.
A random op takes `seed`, int32[2], draws all its numbers from it without state, and gives the same in eager mode and
inside tf.data. Each op draws from a stream of its own, so one seed serves a whole recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aitok_jax.tasks.modalities import Modality
from aitok_jax.tasks.modalities.depth import Depth

Example = dict[str, Any]

CUTDEPTH_MODES = ("published", "metric", "off")
CUTDEPTH_MAX_DEPTH = 10.0  # metres that 'metric' shows as 255
HUE_DEGREES, SATURATION, VALUE = 40.0, 30.0, 20.0
"""Largest shifts, the latter two on the 0..255 scale. The published hue is ±20 on an 8-bit scale of half degrees."""

# Added to the seed of each random op. Large and odd, so that runs with small seeds 0, 1, 2, ... share no stream.
_FLIP, _CROP, _COLOR, _CUT = 0x1F3A5C71, 0x2B7E1517, 0x3C6EF373, 0x510E527F


@dataclass(frozen=True)
class Transform:
    """A recipe: `transform(example, seed) -> example`.

    Attributes:
      modality: of the map.
      apply: the op; recipes without randomness ignore the seed.
      size: side in pixels of the square it cuts out; 0 = it keeps the size.
      columns: the column range (start, stop) it keeps first; () = all.
      side: what the short side must be; 0 = anything.
    """

    modality: Modality
    apply: Callable[[Example, Any], Example]
    size: int = 0
    columns: tuple[int, ...] = ()
    side: int = 0

    def __call__(self, example: Example, seed: Any = None) -> Example:
        import tensorflow as tf

        return self.apply({key: tf.convert_to_tensor(x) for key, x in example.items()}, seed)

    def check(self, height: int, width: int, name: str) -> None:
        """ValueError, naming the file, where an image of this size is too small for the recipe."""
        if self.columns and self.columns[1] > width:
            raise ValueError(
                f"{name}: columns={self.columns} must lie inside the image, which is {width} wide; "
                "change data.columns, () keeps all columns"
            )
        if self.side and min(height, width) != self.side:
            raise ValueError(
                f"{name} is {height}x{width}, and the model sees frames whose short side has {self.side} pixels: set "
                "data.fit='scale', which brings all frames to that, or resize the files"
            )
        kept = self.columns[1] - self.columns[0] if self.columns else width
        if self.size > height or self.size > kept:
            raise ValueError(
                f"{name}: crop size {self.size} must be at most the {height}x{kept} pixels to crop from; "
                "lower data.size, set data.fit='scale', or use larger images"
            )


def tokenizer_train(modality: Modality, size: int, columns: tuple[int, ...] = (41, 601)) -> Transform:
    """Training recipe of a tokenizer: columns, flip with p 1/2, random crop; the map alone, float32[size,size,...].

    An image is neither needed nor returned. Masking is the task's affair.
    """
    columns = tuple(columns)
    _check_size(size)
    if columns and not (len(columns) == 2 and 0 <= columns[0] < columns[1]):
        raise ValueError(f"columns={columns} must be () or (start, stop) with 0 <= start < stop")

    def apply(example: Example, seed: Any) -> Example:
        map_ = example[modality.name]
        if columns:
            map_ = map_[:, columns[0] : columns[1]]
        return random_flip(random_crop({modality.name: map_}, seed, size), seed, modality)

    return Transform(modality, apply, size, columns)


def solver_train(modality: Modality, size: int, color: bool = True, cutdepth: str = "published") -> Transform:
    """Training recipe of a solver: CutDepth (depth alone has it), flip, random crop, colour; then RGB/255.

    Gives image float32[size,size,3] in 0..1 and the map float32[size,size,...]. The order is the published code's:
    CutDepth comes first, so its band is a share of the whole width, is cropped and mirrored with the picture, and
    its values go through the colour changes. (Cropping before mirroring gives the same distribution for less work.)
    """
    _check_size(size)
    if cutdepth not in CUTDEPTH_MODES:
        raise ValueError(f"cutdepth={cutdepth!r} must be one of {CUTDEPTH_MODES}")
    if cutdepth != "off" and modality.name != Depth.name:
        raise ValueError(
            f"cutdepth={cutdepth!r} shows depth in the image, which {modality.name} does not have: set 'off'"
        )

    def apply(example: Example, seed: Any) -> Example:
        if cutdepth != "off":
            example = random_cut_depth(example, seed, cutdepth)
        example = random_flip(random_crop(example, seed, size), seed, modality)
        if color:
            example = random_color(example, seed)
        return _scaled(example)

    return Transform(modality, apply, size)


def evaluation(modality: Modality, side: int = 0) -> Transform:
    """Full size, no randomness: image float32[H,W,3] in 0..1 (RGB/255), and the map; `side`: see `Transform`."""
    return Transform(modality, lambda example, seed: _scaled(example), side=side)


def random_flip(example: Example, seed: Any, modality: Modality) -> Example:
    """Mirrors image and map left to right, together, with p 1/2."""
    import tensorflow as tf

    (gate,) = _uniform(seed, _FLIP, 1)
    keys = sorted(example)

    def mirrored(key):
        reverse = tf.reverse(example[key], [1])
        return modality.mirror(reverse) if key == modality.name else reverse

    flipped = tf.cond(
        gate < 0.5, lambda: [mirrored(key) for key in keys], lambda: [tf.identity(example[key]) for key in keys]
    )
    return dict(zip(keys, flipped, strict=True))


def random_crop(example: Example, seed: Any, size: int) -> Example:
    """Cuts the same `size` x `size` window out of every map, uniform over all positions."""
    import tensorflow as tf

    u_row, u_column = _uniform(seed, _CROP, 2)
    shape = tf.shape(next(iter(example.values())))
    top = tf.cast(u_row * tf.cast(shape[0] - size + 1, tf.float32), tf.int32)
    left = tf.cast(u_column * tf.cast(shape[1] - size + 1, tf.float32), tf.int32)
    cropped = {}
    for key, x in example.items():
        rest = x.shape[2:]
        cropped[key] = tf.slice(x, [top, left] + [0] * len(rest), [size, size, *rest])
    return cropped


def random_color(example: Example, seed: Any) -> Example:
    """Brightness-contrast, gamma and hue-saturation-value of the image, each with p 1/2, in the published ranges."""
    import tensorflow as tf

    gate_tone, gate_gamma, gate_hsv, u_alpha, u_beta, u_gamma, *u_hsv = _uniform(seed, _COLOR, 9)
    alpha = tf.where(gate_tone < 0.5, 0.8 + 0.4 * u_alpha, 1.0)
    beta = tf.where(gate_tone < 0.5, -0.2 + 0.4 * u_beta, 0.0)
    gamma = tf.where(gate_gamma < 0.5, 0.8 + 0.4 * u_gamma, 1.0)
    image = tf.gather(tone_table(alpha, beta, gamma), tf.cast(example["image"], tf.int32))
    shifts = (2 * tf.stack(u_hsv) - 1) * [HUE_DEGREES, SATURATION, VALUE]
    return {**example, "image": tf.cond(gate_hsv < 0.5, lambda: shift_hsv(image, shifts), lambda: image)}


def tone_table(alpha: Any, beta: Any, gamma: Any) -> Any:
    """uint8[256]: what each value becomes under x*alpha + 255*beta, then 255*(x/255)**gamma.

    As in the published 8-bit ops each of the two clips to 0..255 and drops the fraction; alpha = gamma = 1 and
    beta = 0 change nothing.
    """
    import tensorflow as tf

    alpha, beta, gamma = (tf.cast(x, tf.float64) for x in (alpha, beta, gamma))
    x = tf.floor(tf.clip_by_value(tf.range(256, dtype=tf.float64) * alpha + 255 * beta, 0, 255))
    return tf.cast(255 * (x / 255) ** gamma, tf.uint8)


def shift_hsv(image: Any, shifts: Any) -> Any:
    """uint8[H,W,3] RGB with hue, saturation and value shifted by float32[3] (degrees, 0..255 scale, 0..255 scale).

    Hue wraps, the others clip. The published op also rounds the three to 8 bits in between, this one only the result.
    """
    import tensorflow as tf

    hsv = tf.image.rgb_to_hsv(tf.cast(image, tf.float32) / 255) + shifts / [360.0, 255.0, 255.0]
    hsv = tf.clip_by_value(hsv - tf.floor(hsv) * [1.0, 0.0, 0.0], 0, 1)
    return tf.cast(tf.image.hsv_to_rgb(hsv) * 255 + 0.5, tf.uint8)


def random_cut_depth(example: Example, seed: Any, mode: str = "published") -> Example:
    """Vertical CutDepth with p 1/4: a band of columns of the image shows the depth map (see `cut_depth`)."""
    import tensorflow as tf

    gate, alpha, beta = _uniform(seed, _CUT, 3)
    image, depth = example["image"], example["depth"]
    image = tf.cond(gate < 0.25, lambda: cut_depth(image, depth, alpha, beta, mode), lambda: image)
    return {**example, "image": image}


def cut_depth(image: Any, depth: Any, alpha: Any, beta: Any, mode: str = "published") -> Any:
    """The image with columns [l, l + w), l = int(alpha*W), w = int(max((1-alpha)*W*beta*0.75, 1)), taken from depth.

    'published' writes millimetres into 8 bits as that code does, so they wrap modulo 256; 'metric' writes
    255 * depth / 10 m, clipped to 255. Either fills all three channels.
    """
    import tensorflow as tf

    width = tf.cast(tf.shape(image)[1], tf.float32)
    start = tf.cast(alpha * width, tf.int32)
    stop = start + tf.cast(tf.maximum((width - alpha * width) * beta * 0.75, 1), tf.int32)
    band = depth[:, start:stop]
    if mode == "published":
        band = tf.cast(tf.round(band * 1000), tf.int32) % 256
    else:
        band = tf.minimum(band * (255 / CUTDEPTH_MAX_DEPTH), 255)
    band = tf.tile(tf.cast(band, tf.uint8)[..., None], [1, 1, 3])
    return tf.concat([image[:, :start], band, image[:, stop:]], axis=1)


def _scaled(example: Example) -> Example:
    import tensorflow as tf

    return {**example, "image": tf.cast(example["image"], tf.float32) / 255}


def _uniform(seed: Any, stream: int, count: int) -> list[Any]:
    """`count` float32 scalars in [0, 1) from one stream of the seed."""
    import tensorflow as tf

    return tf.unstack(tf.random.stateless_uniform([count], seed + tf.constant([stream, 0]), alg="philox"))


def _check_size(size: int) -> None:
    if size <= 0:
        raise ValueError(f"crop size {size} must be at least 1; set data.size to the input side of the model")
