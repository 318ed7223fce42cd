"""Swin-V2 backbone, as published for AiT (its "SwinV2TransformerRPE2FC")."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.models import stem
from aitok_jax.models.layers import (
    DropPath,
    Mlp,
    Widths,
    check_remat,
    check_sizes,
    checkpointed,
    rematerialized,
    trunc_normal,
)
from aitok_jax.models.window_attention import WindowAttention

EPSILON = 1e-6  # of all LayerNorms here
SCANNED = 4  # blocks of a stage from which on they are compiled as a loop


def shift_regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """int32[windows, w²]: the part of the padded grid that every position of a shifted window comes from."""

    def region(size):
        index = np.arange(size)
        return (index >= size - window).astype(np.int32) + (index >= size - shift)

    regions = 3 * region(height)[:, None] + region(width)[None]
    return partition(regions[None, :, :, None], window)[..., 0]


def partition(x_BHWC, window: int):
    """[B,H,W,C] -> [B·windows, w², C]; H and W are multiples of the window."""
    b, h, w, c = x_BHWC.shape
    x = x_BHWC.reshape(b, h // window, window, w // window, window, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window * window, c)


def unpartition(x_NTC, window: int, height: int, width: int):
    """The inverse of `partition`: [B·windows, w², C] -> [B,H,W,C]."""
    x = x_NTC.reshape(-1, height // window, width // window, window, window, x_NTC.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x_NTC.shape[-1])


class SwinBlock(nn.Module):
    """Post-norm block on a map [B,H,W,C]: x += LN(window attention(x)); x += LN(MLP(x)).

    A map that is one window may come as its positions, [B,w²,C]."""

    widths: Widths
    window: int
    pretrain_window: int
    shift: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        drop_path = DropPath(self.widths.drop_path)
        x += drop_path(self.widths.cast_norm(EPSILON, "norm1")(self._attention(x)), train)
        mlp = Mlp(self.widths, name="mlp")
        return x + drop_path(self.widths.cast_norm(EPSILON, "norm2")(mlp(x, train)), train)

    def _attention(self, x: jax.Array) -> jax.Array:
        attention = WindowAttention(self.widths, self.window, self.pretrain_window, name="attn")
        if x.ndim == 3:
            return attention(x, None)
        _, h, w, _ = x.shape
        ph, pw = (-(-size // self.window) * self.window for size in (h, w))
        x = jnp.pad(x, ((0, 0), (0, ph - h), (0, pw - w), (0, 0)))
        regions = None
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
            regions = shift_regions(ph, pw, self.window, self.shift)
        x = unpartition(attention(partition(x, self.window), regions), self.window, ph, pw)
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :h, :w]


class PatchMerging(nn.Module):
    """[B,H,W,C] -> [B,⌈H/2⌉,⌈W/2⌉,2C]: the four neighbours side by side, Linear, LayerNorm. Odd sizes are padded."""

    widths: Widths

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, h, w, c = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        corners = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        x = self.widths.dense(2 * c, "reduction", use_bias=False)(jnp.concatenate(corners, -1))
        return self.widths.cast_norm(EPSILON, "norm")(x)


class PatchEmbed(nn.Module):
    """[B,H,W,3] -> [B,⌈H/p⌉,⌈W/p⌉,C] by a strided convolution and LayerNorm; sizes that are no multiple are padded with
    zeros at the right and bottom. With a `stem` the strided convolution covers what that leaves of the patch."""

    widths: Widths
    patch: int
    stem: Sequence[int] = ()
    stem_blocks: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (0, -h % self.patch), (0, -w % self.patch), (0, 0)))
        x = stem.convolve(x, self.stem, self.stem_blocks, self.widths, EPSILON)
        p = self.patch // 2 ** len(self.stem)
        dtypes = {"dtype": self.widths.dtype, "param_dtype": self.widths.param_dtype}
        proj = nn.Conv(self.widths.dim, (p, p), (p, p), "VALID", kernel_init=trunc_normal, **dtypes, name="proj")
        return self.widths.cast_norm(EPSILON, "norm")(proj(x))


class Stage(nn.Module):
    """Blocks of one width, one for each of `drop_paths`; odd blocks are shifted where `use_shift`."""

    widths: Widths
    window: int
    pretrain_window: int
    use_shift: bool
    drop_paths: tuple[float, ...]
    downsample: bool
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns (the stage's map, the next stage's input)."""
        b, h, w, c = x.shape
        if h == w == self.window and not self.use_shift:  # no block has to move anything
            x = x.reshape(b, h * w, c)
        x = self._blocks(x, train).reshape(b, h, w, c)
        return x, PatchMerging(self.widths, name="downsample")(x) if self.downsample else x

    def _blocks(self, x: jax.Array, train: bool) -> jax.Array:
        period = 2 if self.use_shift else 1
        if len(self.drop_paths) >= SCANNED and len(self.drop_paths) % period == 0 and not self.is_initializing():
            return self._scan(x, train, period)
        block_type = rematerialized(SwinBlock, self.remat, train_argument=2)
        for j, drop_path in enumerate(self.drop_paths):
            x = block_type(*self._block(j, drop_path), name=f"blocks_{j}")(x, train)
        return x

    def _block(self, j: int, drop_path: float | jax.Array) -> tuple[Widths, int, int, int]:
        shift = self.window // 2 if self.use_shift and j % 2 else 0
        return dataclasses.replace(self.widths, drop_path=drop_path), self.window, self.pretrain_window, shift

    def _scan(self, x: jax.Array, train: bool, period: int) -> jax.Array:
        """Equal blocks, or pairs of blocks, are compiled once: a loop over their parameters, stacked here alone."""
        rates = np.asarray(self.drop_paths, np.float32).reshape(-1, period)
        drops = train and rates.any()

        def repeat(x, given):
            params, rates, keys = given
            for j in range(period):
                block = SwinBlock(*self._block(j, rates[j] if drops else 0.0), parent=None)
                x = block.apply({"params": params[j]}, x, train, rngs={"dropout": keys[j]} if drops else {})
            return x, None

        each = [self.get_variable("params", f"blocks_{j}") for j in range(len(self.drop_paths))]
        params = tuple(jax.tree.map(lambda *leaves: jnp.stack(leaves), *each[j::period]) for j in range(period))
        keys = jax.random.split(self.make_rng("dropout"), rates.shape) if drops else rates
        return jax.lax.scan(checkpointed(repeat, self.remat), x, (params, rates, keys))[0]


class SwinV2(nn.Module):
    """Swin-V2 feature extractor: [B,H,W,3] -> the last stage's map with its LayerNorm, float32[B,h,w,C].

    Attributes:
        embed_dim: width of the first stage; it doubles at every stage. B: 128, L: 192.
        depths, num_heads, windows, pretrain_windows, use_shift: one entry a stage.
        patch: side of a patch in pixels; stage s has stride patch·2^s.
        stem, stem_blocks: convolutions before the patch embedding, see `models.stem`; none as published.
        drop_path: of whole branches, rising linearly from 0 over all blocks.
        remat: what blocks keep for the backward pass, of `layers.REMAT`.
    """

    embed_dim: int = 128
    depths: Sequence[int] = (2, 2, 18, 2)
    num_heads: Sequence[int] = (4, 8, 16, 32)
    windows: Sequence[int] = (30, 30, 30, 15)
    pretrain_windows: Sequence[int] = (12, 12, 12, 6)
    use_shift: Sequence[bool] = (True, True, False, False)
    patch: int = 4
    stem: Sequence[int] = ()
    stem_blocks: int = 0
    mlp_ratio: float = 4.0
    drop_path: float = 0.0
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check_remat(self.remat)
        check_sizes(self, "embed_dim", "patch", *_PER_STAGE[:-1])
        lengths = {name: len(getattr(self, name)) for name in _PER_STAGE}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"{', '.join(_PER_STAGE)} need one entry a stage each; their lengths are {lengths}")
        for s, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**s % heads:
                raise ValueError(f"num_heads[{s}]={heads} must divide the width of the stage, {self.embed_dim * 2**s}")
        stem.check(self.stem, self.stem_blocks, self.patch)
        super().__post_init__()

    @property
    def stride(self) -> int:
        """Pixels a position of the last stage's map."""
        return self.patch * 2 ** (len(self.depths) - 1)

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, train: bool = False) -> jax.Array:
        embed = PatchEmbed(self._widths(0), self.patch, self.stem, self.stem_blocks, name="patch_embed")
        x = embed(images_BHWC)
        rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
        last = len(self.depths) - 1
        for s, blocks in enumerate(self.depths):
            stage_map, x = Stage(
                self._widths(s),
                window=self.windows[s],
                pretrain_window=self.pretrain_windows[s],
                use_shift=self.use_shift[s],
                drop_paths=tuple(rates[sum(self.depths[:s]) :][:blocks]),
                downsample=s < last,
                remat=self.remat,
                name=f"layers_{s}",
            )(x, train)
        return self._widths(last).norm(EPSILON, f"norm{last}")(stage_map)

    def _widths(self, stage: int) -> Widths:
        dim = self.embed_dim * 2**stage
        hidden = int(dim * self.mlp_ratio)
        return Widths(dim, self.num_heads[stage], hidden, dtype=self.dtype, param_dtype=self.param_dtype)


_PER_STAGE = ("depths", "num_heads", "windows", "pretrain_windows", "use_shift")
