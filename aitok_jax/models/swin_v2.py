"""Swin-V2 backbone with a log-spaced continuous position bias ("RPE-2FC"), as published for AiT (AIT.md section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.models.remat import policy_name, rematerialized

MAX_LOGIT_SCALE = math.log(100.0)
APART = -100.0  # added to the logits of pairs that must not see each other
INIT_STD = 0.02  # of linear layers and embeddings
trunc_normal = nn.initializers.truncated_normal(INIT_STD)


def relative_coordinates(window: int, pretrain_window: int) -> np.ndarray:
    """Log-spaced offsets in a window: f32[(2w−1)², 2], (Δrow, Δcolumn) from −(w−1) to w−1, row-major.

    Offsets are divided by (pretrain_window − 1) and multiplied by 8, then sign·log2(1 + |·|)/log2(8).
    """
    offsets = np.arange(-(window - 1), window, dtype=np.float32)
    table = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), -1).reshape(-1, 2)
    table = table / max(pretrain_window - 1, 1) * 8
    return (np.sign(table) * np.log2(1 + np.abs(table)) / np.log2(8)).astype(np.float32)


def relative_index(window: int) -> jax.Array:
    """int32[w², w²]: the row of `relative_coordinates` of every (query, key) pair of a window."""
    y, x = jnp.divmod(jnp.arange(window * window, dtype=jnp.int32), window)
    rows = y[:, None] - y[None] + window - 1
    columns = x[:, None] - x[None] + window - 1
    return rows * (2 * window - 1) + columns


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


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of whole examples with probability `rate`; rng stream `dropout`."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        keep = 1 - self.rate
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return x * mask.astype(x.dtype) / keep


class WindowAttention(nn.Module):
    """Cosine attention inside windows, [N, w², C] -> [N, w², C]; logits, bias and softmax in float32.

    One head follows the other, and the backward pass computes logits and weights again, so that neither they nor the
    position bias of all heads, N·heads·w⁴ and heads·w⁴ numbers, are in memory at once.
    """

    dim: int
    num_heads: int
    window: int
    pretrain_window: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_NTC: jax.Array, regions_WT: np.ndarray | None) -> jax.Array:
        """Of `regions_WT`, those of the W windows of an image, only pairs of the same region see each other."""
        n, t, c = x_NTC.shape
        heads = self.num_heads
        q_bias = self.param("q_bias", nn.initializers.zeros, (c,), self.param_dtype)
        v_bias = self.param("v_bias", nn.initializers.zeros, (c,), self.param_dtype)
        bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
        qkv = _dense(3 * c, "qkv", self, use_bias=False)(x_NTC) + bias.reshape(1, 1, -1)
        q, k, v = qkv.reshape(n, t, 3, heads, c // heads).transpose(2, 3, 0, 1, 4)  # h N T d

        init_scale = nn.initializers.constant(math.log(10.0))
        log_scale_h = self.param("logit_scale", init_scale, (heads,), self.param_dtype)
        scale_h = jnp.exp(jnp.minimum(log_scale_h.astype(jnp.float32), MAX_LOGIT_SCALE))
        q = _unit(q) * scale_h.reshape(-1, 1, 1, 1)
        attend = _attention(self.window, regions_WT)
        out_hNTd = jax.lax.map(lambda head: attend(*head), (q, _unit(k), v, self._position_bias()))
        return _dense(c, "proj", self)(out_hNTd.transpose(1, 2, 0, 3).reshape(n, t, c))

    def _position_bias(self) -> jax.Array:
        """f32[heads, (2w−1)²], in 0..16: of every offset."""
        table = jnp.asarray(relative_coordinates(self.window, self.pretrain_window))
        hidden = nn.relu(nn.Dense(512, kernel_init=trunc_normal, param_dtype=self.param_dtype, name="rpe_mlp_0")(table))
        per_offset = nn.Dense(
            self.num_heads, use_bias=False, kernel_init=trunc_normal, param_dtype=self.param_dtype, name="rpe_mlp_2"
        )(hidden)
        return 16 * jax.nn.sigmoid(per_offset).T


def _attention(window: int, regions_WT: np.ndarray | None) -> Callable[..., jax.Array]:
    """Attention of one head in N windows: (q, k, v f32/bf16[N,T,d], bias f32[P] of every offset) -> [N,T,d].

    The backward pass computes the weights P again. With O = PV, the sum that the gradient of a softmax takes over keys
    is that of dO·O over channels (FlashAttention, arXiv 2205.14135): dS = P(dP − Σ dO·O).
    """

    def weights(q_NTd, k_NTd, bias_P):
        logits = jnp.einsum("nqd,nkd->nqk", q_NTd, k_NTd, preferred_element_type=jnp.float32)
        logits += bias_P[relative_index(window)][None]
        if regions_WT is not None:
            apart = regions_WT[:, :, None] != regions_WT[:, None]
            masked = logits.reshape(-1, *apart.shape) + jnp.where(apart, APART, 0.0)[None]
            logits = masked.reshape(logits.shape)
        return jax.nn.softmax(logits)

    @jax.custom_vjp
    def attend(q_NTd, k_NTd, v_NTd, bias_P):
        return jnp.einsum("nqk,nkd->nqd", weights(q_NTd, k_NTd, bias_P).astype(v_NTd.dtype), v_NTd)

    def forward(*head):
        out = attend(*head)
        return out, (head, out)

    def backward(kept, dout_NTd):
        (q, k, v, bias_P), out_NTd = kept
        p_NTT = weights(q, k, bias_P)
        dp_NTT = jnp.einsum("nqd,nkd->nqk", dout_NTd, v, preferred_element_type=jnp.float32)
        total_NT1 = jnp.sum((dout_NTd * out_NTd).astype(jnp.float32), -1, keepdims=True)
        ds_NTT = p_NTT * (dp_NTT - total_NT1)
        dq = jnp.einsum("nqk,nkd->nqd", ds_NTT, k.astype(jnp.float32))
        dk = jnp.einsum("nqk,nqd->nkd", ds_NTT, q.astype(jnp.float32))
        dv = jnp.einsum("nqk,nqd->nkd", p_NTT.astype(v.dtype), dout_NTd)
        dbias_TT = jnp.einsum("n,nqk->qk", jnp.ones(ds_NTT.shape[0]), ds_NTT)  # a sum, faster as a product
        dbias_P = jnp.zeros_like(bias_P).at[relative_index(window)].add(dbias_TT)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv, dbias_P

    attend.defvjp(forward, backward)
    return attend


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))  # padded keys are zero, where the root has no gradient
    return x / (jnp.where(square > 0, norm, 0.0) + 5e-5)


def _dense(features: int, name: str, parent: nn.Module, use_bias: bool = True) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=trunc_normal,
        dtype=parent.dtype,
        param_dtype=parent.param_dtype,
        name=name,
    )


def _norm(name: str, parent: nn.Module):
    layer = nn.LayerNorm(epsilon=1e-6, dtype=jnp.float32, param_dtype=parent.param_dtype, name=name)
    return lambda x: layer(x).astype(parent.dtype)


class Mlp(nn.Module):
    """Linear → exact GELU → dropout → Linear."""

    hidden: int
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = jax.nn.gelu(_dense(self.hidden, "fc1", self)(x), approximate=False)
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        return _dense(x.shape[-1], "fc2", self)(y)


class SwinBlock(nn.Module):
    """Post-norm block on a map [B,H,W,C]: x += LN(window attention(x)); x += LN(MLP(x))."""

    dim: int
    num_heads: int
    window: int
    pretrain_window: int
    shift: int
    mlp_ratio: float
    drop_path: float
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        drop_path = DropPath(self.drop_path)
        x += drop_path(_norm("norm1", self)(self._attention(x)), train)
        mlp = Mlp(int(self.dim * self.mlp_ratio), 0.0, self.dtype, self.param_dtype, name="mlp")
        return x + drop_path(_norm("norm2", self)(mlp(x, train)), train)

    def _attention(self, x: jax.Array) -> jax.Array:
        _, h, w, _ = x.shape
        ph, pw = (-(-size // self.window) * self.window for size in (h, w))
        x = jnp.pad(x, ((0, 0), (0, ph - h), (0, pw - w), (0, 0)))
        regions = None
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), (1, 2))
            regions = shift_regions(ph, pw, self.window, self.shift)
        attention = WindowAttention(
            self.dim, self.num_heads, self.window, self.pretrain_window, self.dtype, self.param_dtype, name="attn"
        )
        x = unpartition(attention(partition(x, self.window), regions), self.window, ph, pw)
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), (1, 2))
        return x[:, :h, :w]


class PatchMerging(nn.Module):
    """[B,H,W,C] -> [B,⌈H/2⌉,⌈W/2⌉,2C]: the four neighbours side by side, Linear, LayerNorm. Odd sizes are padded."""

    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, h, w, c = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        corners = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
        x = _dense(2 * c, "reduction", self, use_bias=False)(jnp.concatenate(corners, -1))
        return _norm("norm", self)(x)


class PatchEmbed(nn.Module):
    """[B,H,W,3] -> [B,H/p,W/p,C] by a strided convolution and LayerNorm.

    With `stem` widths, 3×3 convolutions of stride 2 (LayerNorm, GELU) come first, then `stem_blocks` residual ones of
    stride 1, and the strided one covers what they leave of the patch.
    """

    dim: int
    patch: int
    stem: Sequence[int] = ()
    stem_blocks: int = 0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layers = [(width, 2) for width in self.stem] + [(width, 1) for width in self.stem[-1:]] * self.stem_blocks
        for i, (width, stride) in enumerate(layers):
            y = nn.Conv(width, (3, 3), (stride, stride), padding=1, use_bias=False, **dtypes, name=f"stem_{i}")(x)
            y = jax.nn.gelu(_norm(f"stem_norm_{i}", self)(y), approximate=False)
            x = y if stride == 2 else x + y
        p = self.patch // 2 ** len(self.stem)
        proj = nn.Conv(self.dim, (p, p), (p, p), "VALID", kernel_init=trunc_normal, **dtypes, name="proj")
        return _norm("norm", self)(proj(x))


class Stage(nn.Module):
    """`depth` blocks of one width; odd blocks are shifted where `use_shift`."""

    dim: int
    depth: int
    num_heads: int
    window: int
    pretrain_window: int
    use_shift: bool
    mlp_ratio: float
    drop_paths: tuple[float, ...]
    downsample: bool
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns (the stage's map, the next stage's input)."""
        block_type = rematerialized(SwinBlock, self.remat, train_argument=2)
        for j in range(self.depth):
            x = block_type(
                dim=self.dim,
                num_heads=self.num_heads,
                window=self.window,
                pretrain_window=self.pretrain_window,
                shift=self.window // 2 if self.use_shift and j % 2 else 0,
                mlp_ratio=self.mlp_ratio,
                drop_path=self.drop_paths[j],
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"blocks_{j}",
            )(x, train)
        following = PatchMerging(self.dtype, self.param_dtype, name="downsample")(x) if self.downsample else x
        return x, following


class SwinV2(nn.Module):
    """Swin-V2 feature extractor: [B,H,W,3] -> maps of the stages in `out_stages`, each with its LayerNorm, float32.

    Attributes:
        embed_dim: width of the first stage; it doubles at every stage. B: 128, L: 192.
        depths, num_heads, windows, pretrain_windows, use_shift: one entry a stage.
        patch: side of a patch in pixels; stage s has stride patch·2^s.
        stem: widths of convolutions before the patch embedding, not published: a small backbone trained from random
            weights on little data learns several times faster with them ("Early convolutions", arXiv 2106.14881).
        stem_blocks: residual convolutions of stride 1 after them, which look beyond a patch, where attention takes long
            to learn what is near.
        drop_path: stochastic depth, rising linearly from 0 over all blocks.
        out_stages: stages whose maps are returned; () means the last one.
        remat: what blocks compute again in the backward pass, of `remat.POLICIES`.
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
    out_stages: Sequence[int] = ()
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        policy_name(self.remat)
        lengths = {name: len(getattr(self, name)) for name in _PER_STAGE}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"{', '.join(_PER_STAGE)} need one entry a stage each; their lengths are {lengths}")
        for s, heads in enumerate(self.num_heads):
            if self.embed_dim * 2**s % heads:
                raise ValueError(f"num_heads[{s}]={heads} must divide the width of the stage, {self.embed_dim * 2**s}")
        if self.patch % 2 ** len(self.stem):
            raise ValueError(f"patch={self.patch} must be a multiple of 2^{len(self.stem)}, the stride of the stem")
        if self.stem_blocks < 0 or (self.stem_blocks and not self.stem):
            raise ValueError(f"stem_blocks={self.stem_blocks} come after a stem: give its widths, or stem_blocks=0")
        super().__post_init__()

    @property
    def stride(self) -> int:
        """Pixels a position of the last stage's map."""
        return self.patch * 2 ** (len(self.depths) - 1)

    @nn.compact
    def __call__(self, images_BHWC: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        _, h, w, _ = images_BHWC.shape
        if h % self.patch or w % self.patch:
            raise ValueError(f"an image of {h}×{w} must be a multiple of patch={self.patch} in both directions")
        embed = PatchEmbed(
            self.embed_dim, self.patch, self.stem, self.stem_blocks, self.dtype, self.param_dtype, name="patch_embed"
        )
        x = embed(images_BHWC)
        rates = np.linspace(0, self.drop_path, sum(self.depths)).tolist()
        last, maps = len(self.depths) - 1, []
        for s, depth in enumerate(self.depths):
            stage_map, x = Stage(
                dim=self.embed_dim * 2**s,
                depth=depth,
                num_heads=self.num_heads[s],
                window=self.windows[s],
                pretrain_window=self.pretrain_windows[s],
                use_shift=self.use_shift[s],
                mlp_ratio=self.mlp_ratio,
                drop_paths=tuple(rates[sum(self.depths[:s]) :][:depth]),
                downsample=s < last,
                remat=self.remat,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=f"layers_{s}",
            )(x, train)
            if s in (self.out_stages or (last,)):
                maps.append(_norm(f"norm{s}", self)(stage_map).astype(jnp.float32))
        return tuple(maps)


_PER_STAGE = ("depths", "num_heads", "windows", "pretrain_windows", "use_shift")
