"""The VQ-VAE of all tokenizers: dense maps and instance masks to a grid of codes and back."""

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from aitok_jax.models import conv, losses
from aitok_jax.models.layers import check_sizes
from aitok_jax.models.quantizer import Quantized, Quantizer, nearest_codes

CLASSIFICATION = "cross_entropy"
OBJECTIVES = tuple(losses.RECONSTRUCTION)
KERNEL_SIZES = {conv.point: 1, conv.same: 3, conv.down: 4, conv.up: 4}


@dataclasses.dataclass(frozen=True)
class Layout:
    """What encoder and decoder have in common; see `VQVAE`."""

    hidden: int
    downsample: int
    num_res_blocks: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def stages(self) -> int:
        return int(math.log2(self.downsample))


class Conv(nn.Module):
    """One of the convolutions of `models.conv`, [B,H,W,C] -> [B,H',W',features], and its bias."""

    features: int
    convolve: Callable[[jax.Array, jax.Array], jax.Array]
    layout: Layout

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        size = KERNEL_SIZES[self.convolve]
        shape = (size, size, x_BHWC.shape[-1], self.features)
        kernel = self.param("kernel", _fan_in_uniform, shape, self.layout.param_dtype)
        y = self.convolve(x_BHWC.astype(self.layout.dtype), kernel.astype(self.layout.dtype))
        bias_F = self.param("bias", nn.initializers.zeros, (self.features,), self.layout.param_dtype)
        return y + bias_F.astype(self.layout.dtype).reshape(1, 1, 1, -1)


def _fan_in_uniform(key, shape, dtype=jnp.float32):
    bound = 1 / math.sqrt(shape[0] * shape[1] * shape[2])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class ResidualBlock(nn.Module):
    """conv3×3 → ReLU → conv3×3 → ReLU → conv1×1, plus the input."""

    features: int
    layout: Layout

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def layer(convolve, index):
            return Conv(self.features, convolve, self.layout, name=f"net_{index}")

        y = nn.relu(layer(conv.same, 0)(x))
        y = nn.relu(layer(conv.same, 2)(y))
        return x + layer(conv.point, 4)(y)


class Encoder(nn.Module):
    """[B,H,W,channels] -> f32[B, H/r, W/r, code_dim]. Layer numbers are those of the published weights."""

    layout: Layout
    code_dim: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layout = self.layout
        for i in range(layout.stages):
            x = nn.relu(Conv(layout.hidden * 2**i, conv.down, layout, name=f"layers_{2 * i}")(x))
        top = 2 * layout.stages
        for i in range(layout.num_res_blocks):
            x = ResidualBlock(x.shape[-1], layout, name=f"layers_{top + i}")(x)
        last = f"layers_{top + layout.num_res_blocks}"
        return Conv(self.code_dim, conv.point, layout, name=last)(x).astype(jnp.float32)


class Decoder(nn.Module):
    """[B,h,w,code_dim] -> f32[B, h·r, w·r, channels]."""

    layout: Layout
    channels: int

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        layout, widest = self.layout, self.layout.hidden * self.layout.downsample // 2
        x = nn.relu(Conv(widest, conv.point, layout, name="layers_0")(z))
        for i in range(layout.num_res_blocks):
            x = ResidualBlock(widest, layout, name=f"layers_{2 + i}")(x)
        top = 2 + layout.num_res_blocks
        for i in range(layout.stages):
            x = nn.relu(Conv(widest // 2**i, conv.up, layout, name=f"layers_{top + 2 * i}")(x))
        return Conv(self.channels, conv.point, layout, name=f"layers_{top + 2 * layout.stages}")(x).astype(jnp.float32)


@flax.struct.dataclass
class Reconstruction:
    """Of `VQVAE.__call__`: losses (f32 scalars), output f32[B,H,W,C] in the input's units, and the quantizer's part."""

    loss: jax.Array
    reconstruction_loss: jax.Array
    output: jax.Array
    quantized: Quantized


class VQVAE(nn.Module):
    """Tokenizer (encoder + nearest code) and detokenizer (code lookup + decoder).

    Attributes:
        hidden: width h0 after the first convolution; the last width is h0·downsample/2. (The published solver code
            counts by the last width instead.)
        downsample: r, a power of two; a map of H×W becomes H/r × W/r tokens.
        num_res_blocks: R in the encoder and in the decoder.
        num_codes, code_dim: K and D of the codebook.
        channels: of input and output; the number of classes for `cross_entropy`.
        objective: one of `OBJECTIVES`. `cross_entropy` takes one-hot classes, zeros where there is no label, and gives
            logits. `silog` does not clip, as published: it is not finite where the output falls to 0 or below.
        use_norm: the network sees 2(x/max_value − ½), and its output y means max_value(y/2 + ½).
        soft_temperature: τ, multiplies the logits of soft tokens in `decode_soft`.
        decay, epsilon, commitment_cost, restart_threshold: see `Quantizer`.
    """

    hidden: int = 16
    downsample: int = 32
    num_res_blocks: int = 2
    num_codes: int = 128
    code_dim: int = 512
    channels: int = 1
    objective: str = "mse_ignore_zero"
    use_norm: bool = False
    max_value: float = 10.0
    soft_temperature: float = 0.8
    decay: float = 0.99
    epsilon: float = 1e-5
    commitment_cost: float = 0.25
    restart_threshold: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check_sizes(self, "hidden", "num_codes", "code_dim", "channels")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} is not one of {', '.join(OBJECTIVES)}")
        if self.use_norm and self.objective in ("mse_ignore_zero", "silog", CLASSIFICATION):
            raise ValueError(f"objective={self.objective!r} finds missing pixels by their 0: set use_norm=False")
        if self.downsample < 2 or self.downsample & (self.downsample - 1):
            raise ValueError(f"downsample={self.downsample} must be a power of two of at least 2, for example 16 or 32")
        super().__post_init__()

    def setup(self):
        layout = Layout(
            hidden=self.hidden,
            downsample=self.downsample,
            num_res_blocks=self.num_res_blocks,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.encoder, self.decoder = Encoder(layout, self.code_dim), Decoder(layout, self.channels)
        self.quantizer = Quantizer(
            num_codes=self.num_codes,
            code_dim=self.code_dim,
            decay=self.decay,
            epsilon=self.epsilon,
            commitment_cost=self.commitment_cost,
            restart_threshold=self.restart_threshold,
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a map of this size."""
        return token_grid(height, width, self.downsample)

    def encode_features(self, x: jax.Array) -> jax.Array:
        """[B,H,W,C] in the map's units -> f32[B,h,w,D] before quantizing."""
        self.grid(*x.shape[1:3])
        return self.encoder(self._normalize(x))

    def encode(self, x: jax.Array) -> jax.Array:
        """[B,H,W,C] in the map's units -> int32[B,h,w] codes."""
        return nearest_codes(self.encode_features(x), self.quantizer.table)

    def decode(self, codes: jax.Array) -> jax.Array:
        """int[B,h,w] codes -> f32[B,H,W,C] in the map's units (logits for `cross_entropy`)."""
        return self._denormalize(self.decoder(self.quantizer.lookup(codes)))

    def decode_soft(self, logits: jax.Array) -> jax.Array:
        """Soft detokenization: f32[B,h,w,K] logits -> softmax(τ·logits) @ codebook -> decoder -> f32[B,H,W,C]."""
        probabilities = jax.nn.softmax(self.soft_temperature * logits.astype(jnp.float32))
        return self.decode_probabilities(probabilities)

    def decode_probabilities(self, probabilities: jax.Array) -> jax.Array:
        """f32[B,h,w,K] probabilities of the codes -> map as `decode`."""
        return self._denormalize(self.decoder(self.quantizer.expect(probabilities)))

    def __call__(
        self,
        x: jax.Array,
        target: jax.Array | None = None,
        train: bool = False,
        weight_B: jax.Array | None = None,
    ) -> Reconstruction:
        """Reconstructs x [B,H,W,C]; the loss is taken against `target` (x itself where None), in the network's space.

        In training the EMA codebook moves: pass mutable=['codebook']. Rows whose `weight_B` is 0 count nowhere.
        """
        quantized = self.quantizer(self.encode_features(x), train, weight_B)
        output = self.decoder(quantized.z)
        target = x if target is None else target
        reconstruction = losses.RECONSTRUCTION[self.objective](output, self._normalize(target), weight_B)
        return Reconstruction(reconstruction + quantized.loss, reconstruction, self._denormalize(output), quantized)

    def _normalize(self, x: jax.Array) -> jax.Array:
        return 2 * (x / self.max_value - 0.5) if self.use_norm else x

    def _denormalize(self, y: jax.Array) -> jax.Array:
        return self.max_value * (y / 2 + 0.5) if self.use_norm else y


def mask_patches(rng: jax.Array, maps_BHWC: jax.Array, *, patch: int, ratio: float) -> jax.Array:
    """Mask augmentation: sets a share `ratio` (rounded up) of the patch×patch squares to zero.

    Raises:
        ValueError: where the maps are not a multiple of `patch`, or the ratio lies outside 0..1.
    """
    b, h, w, _ = maps_BHWC.shape
    if h % patch or w % patch:
        raise ValueError(f"maps of {h}×{w} must be a multiple of mask patch {patch}; change mask_patch or the map size")
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask_ratio={ratio} must lie in 0..1")
    rows, columns = h // patch, w // patch
    hidden = math.ceil(ratio * rows * columns)
    keep = jnp.argsort(jax.random.uniform(rng, (b, rows * columns))) >= hidden  # a random order of the patches
    keep = keep.reshape(b, rows, 1, columns, 1)
    keep = jnp.broadcast_to(keep, (b, rows, patch, columns, patch)).reshape(b, h, w, 1)
    return maps_BHWC * keep.astype(maps_BHWC.dtype)


def token_grid(height: int, width: int, downsample: int) -> tuple[int, int]:
    """Rows and columns of tokens of a map of height×width pixels; ValueError where they do not come out even."""
    if height % downsample or width % downsample:
        raise ValueError(f"a map of {height}×{width} must be a multiple of downsample={downsample} in both directions")
    return height // downsample, width // downsample
