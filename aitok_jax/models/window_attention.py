"""Cosine attention inside windows with a log-spaced continuous position bias, as published for AiT ("RPE-2FC")."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from aitok_jax.models import window_cudnn, window_kernels
from aitok_jax.models.layers import ATTENDED, Widths, trunc_normal
from aitok_jax.models.position_bias import collapse, expand, relative_coordinates
from aitok_jax.models.self_check import difference, trusted

MAX_LOGIT_SCALE = math.log(100.0)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Fused = tuple[Callable, Callable]
"""Forward (q, k, v, bias) -> out, and backward (q, k, v, bias, out, gradient of out) -> gradients of the first four."""


class QKV(nn.Module):
    """The kernel of queries, keys and values, [C,3C]: three products give them, so that nothing has to be split."""

    dim: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", trunc_normal, (self.dim, 3 * self.dim), self.param_dtype)


class WindowAttention(nn.Module):
    """Cosine attention inside windows, [N, w², C] -> [N, w², C]; logits, bias and softmax in float32."""

    widths: Widths
    window: int
    pretrain_window: int

    @nn.compact
    def __call__(self, x_NTC: jax.Array, regions_WT: np.ndarray | None) -> jax.Array:
        """Of `regions_WT`, those of the W windows of an image, only pairs of the same region see each other."""
        c = x_NTC.shape[-1]
        widths, heads = self.widths, self.widths.num_heads
        q_bias = self.param("q_bias", nn.initializers.zeros, (c,), widths.param_dtype)
        v_bias = self.param("v_bias", nn.initializers.zeros, (c,), widths.param_dtype)
        kernel = QKV(c, widths.param_dtype, name="qkv")().astype(widths.dtype)
        q, k, v = (x_NTC @ part for part in jnp.split(kernel, 3, axis=1))
        q, v = (x + bias.astype(widths.dtype).reshape(1, 1, -1) for x, bias in ((q, q_bias), (v, v_bias)))

        init_scale = nn.initializers.constant(math.log(10.0))
        log_scale_h = self.param("logit_scale", init_scale, (heads,), widths.param_dtype)
        scale_h = jnp.exp(jnp.minimum(log_scale_h.astype(jnp.float32), MAX_LOGIT_SCALE))
        q, k = _unit(q, scale_h), _unit(k, jnp.ones_like(scale_h))
        out_NTC = attention(self.window, regions_WT)(q, k, v, self._position_bias())
        return widths.dense(c, "proj")(out_NTC)

    def _position_bias(self) -> jax.Array:
        """f32[heads, (2w−1)²], in 0..16: of every offset."""
        table = jnp.asarray(relative_coordinates(self.window, self.pretrain_window))
        options = {"kernel_init": trunc_normal, "param_dtype": self.widths.param_dtype}
        hidden = nn.relu(nn.Dense(512, **options, name="rpe_mlp_0")(table))
        per_offset = nn.Dense(self.widths.num_heads, use_bias=False, **options, name="rpe_mlp_2")(hidden)
        return 16 * jax.nn.sigmoid(per_offset).T


def attention(window: int, regions_WT: np.ndarray | None, fused: Fused | None = None) -> Attend:
    """Attention in N windows: (q, k, v [N,T,C] with the heads side by side, bias f32[heads,P] of offsets) -> [N,T,C].

    q and k are normalised and scaled. Compiled for a TPU it is the kernels of `window_kernels`; for a CUDA GPU, of
    values in bfloat16, cuDNN's attention; for all else the plain formula, which is also taken where the kernels need
    more memory than there is, in exports, whose batch is open, or where `self_check` fails. Within a mesh
    (`jax.set_mesh`) every device takes its own windows, and of the gradient of the bias what is summed over devices is
    that of the offsets.

    Args:
        regions_WT: of the W windows of an image; pairs of different regions do not see each other. None: all do.
        fused: what to take whatever the platform.
    """
    kernels, plain = _kernels(window, regions_WT), _plain(window, regions_WT)

    def choose(which: int, *args):
        if fused is not None:
            return fused[which](*args)
        kinds = {"tpu": kernels[which]} if _fits(args[0], window, len(args[3])) else {}
        if _cudnn_takes(args[2]):
            kinds["cuda"] = _cudnn(window, regions_WT)[which]
        return jax.lax.platform_dependent(*args, **kinds, default=plain[which]) if kinds else plain[which](*args)

    @jax.custom_vjp
    def attend(q_NTC, k_NTC, v_NTC, bias_hP):
        return choose(0, q_NTC, k_NTC, v_NTC, bias_hP)

    def forward(*args):
        out = checkpoint_name(attend(*args), ATTENDED)
        return out, (*args, out)

    attend.defvjp(forward, lambda kept, dout_NTC: choose(1, *kept, dout_NTC))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend
    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    return jax.shard_map(attend, in_specs=(split, split, split, whole), out_specs=split, check_vma=False)


def _fits(q_NTC: jax.Array, window: int, heads: int) -> bool:
    """Whether there are kernels, and sound ones, for these sizes: not for a number of windows that is open."""
    needed = window_kernels.plan(window, heads, q_NTC.shape[2] // heads).bytes
    memory = window_kernels.SMALL_MEMORY.get(jax.devices()[0].device_kind, window_kernels.MEMORY)
    sizes = isinstance(q_NTC.shape[0], int) and needed <= memory
    return sizes and trusted("window attention", self_check)


def _cudnn_takes(v_NTC: jax.Array) -> bool:
    if v_NTC.dtype != jnp.bfloat16 or not isinstance(v_NTC.shape[0], int) or not window_cudnn.available():
        return False
    return trusted("cuDNN's attention", _check_cudnn, platform="gpu", allowed=5e-2)


def _check_cudnn() -> float:
    return self_check(_cudnn)


def self_check(fused: Callable[[int, np.ndarray | None], Fused] | None = None) -> float:
    """How far kernels are from the formula on the default device: of the output and all gradients, shifted windows and
    others, the largest difference relative to the largest value. Takes a second, most of it compilation.

    Args:
        fused: (window, regions) -> what to compare; None is what a TPU takes.
    """
    window, shape = 7, (4, 49, 128)  # a length that fills no tile, and lanes that are filled
    rng, worst = np.random.default_rng(0), 0.0
    q, k, v, dout = rng.normal(0, 0.5, (4, *shape)).astype(np.float32)
    bias = rng.normal(size=(4, (2 * window - 1) ** 2)).astype(np.float32)
    for regions in (None, (np.arange(49) > 20).astype(np.int32) * np.arange(2, dtype=np.int32)[:, None]):

        def compute(args, pair, regions=regions):
            out, pull = jax.vjp(attention(window, regions, pair), *args)
            return out, *pull(jnp.asarray(dout))

        pairs = ((fused or _kernels)(window, regions), _plain(window, regions))
        with jax.default_matmul_precision("highest"):
            found, wanted = (jax.jit(functools.partial(compute, pair=pair))((q, k, v, bias)) for pair in pairs)
        for ours, formula in zip(found, wanted, strict=True):
            worst = max(worst, difference(ours, formula))
    return worst


def _kernels(window: int, regions_WT: np.ndarray | None) -> Fused:
    """The kernels, which read q and k in the dtype of v, as the matrix unit does."""

    def forward(q, k, v, bias):
        return window_kernels.forward(q.astype(v.dtype), k.astype(v.dtype), v, bias, regions_WT, window)

    def backward(q, k, v, bias, out, dout):
        args = (q.astype(v.dtype), k.astype(v.dtype), v, bias, out, dout, regions_WT, window)
        dq, dk, dv, dbias = window_kernels.backward(*args)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv, dbias

    return forward, backward


def _cudnn(window: int, regions_WT: np.ndarray | None) -> Fused:
    """cuDNN's, which reads everything in bfloat16."""

    def forward(q, k, v, bias):
        return window_cudnn.attend(q, k, v, bias, regions_WT, window).astype(v.dtype)

    def backward(q, k, v, bias, out, dout):
        del out
        return jax.vjp(forward, q, k, v, bias)[1](dout)

    return forward, backward


def _plain(window: int, regions_WT: np.ndarray | None) -> Fused:
    """The formula, and its gradients: one head follows the other, and the backward pass computes logits and weights
    again, so that neither they nor the bias of the pairs, N·heads·w⁴ and heads·w⁴ numbers, are in memory at once.

    With O = PV, the sum that the gradient of a softmax takes over keys is that of dO·O over channels (FlashAttention,
    arXiv 2205.14135): dS = P(dP − Σ dO·O).
    """

    def weights(q_NTd, k_NTd, bias_P):
        logits = jnp.einsum("nqd,nkd->nqk", q_NTd, k_NTd, preferred_element_type=jnp.float32)
        logits += expand(bias_P[None], window)
        if regions_WT is not None:
            apart = regions_WT[:, :, None] != regions_WT[:, None]
            masked = logits.reshape(-1, *apart.shape) + jnp.where(apart, window_kernels.APART, 0.0)[None]
            logits = masked.reshape(logits.shape)
        return jax.nn.softmax(logits)

    def forward(q_NTC, k_NTC, v_NTC, bias_hP):
        def head(given):
            q_NTd, k_NTd, v_NTd, bias_P = given
            return jnp.einsum("nqk,nkd->nqd", weights(q_NTd, k_NTd, bias_P).astype(v_NTd.dtype), v_NTd)

        q, k, v = (_by_head(x, len(bias_hP)) for x in (q_NTC, k_NTC, v_NTC))
        return _side_by_side(jax.lax.map(head, (q, k, v, bias_hP)))

    def backward(q_NTC, k_NTC, v_NTC, bias_hP, out_NTC, dout_NTC):
        def head(given):
            q, k, v, bias_P, out_NTd, dout_NTd = given
            p_NTT = weights(q, k, bias_P)
            dp_NTT = jnp.einsum("nqd,nkd->nqk", dout_NTd, v, preferred_element_type=jnp.float32)
            total_NT1 = jnp.sum((dout_NTd * out_NTd).astype(jnp.float32), -1, keepdims=True)
            ds_NTT = p_NTT * (dp_NTT - total_NT1)
            dq = jnp.einsum("nqk,nkd->nqd", ds_NTT, k.astype(jnp.float32))
            dk = jnp.einsum("nqk,nqd->nkd", ds_NTT, q.astype(jnp.float32))
            dv = jnp.einsum("nqk,nqd->nkd", p_NTT.astype(v.dtype), dout_NTd)
            dbias_TT = jnp.einsum("n,nqk->qk", jnp.ones(ds_NTT.shape[0]), ds_NTT)  # a sum, faster as a product
            return dq.astype(q.dtype), dk.astype(k.dtype), dv, collapse(dbias_TT[None], window)[0]

        q, k, v, out, dout = (_by_head(x, len(bias_hP)) for x in (q_NTC, k_NTC, v_NTC, out_NTC, dout_NTC))
        dq, dk, dv, dbias_hP = jax.lax.map(head, (q, k, v, bias_hP, out, dout))
        return *(_side_by_side(x) for x in (dq, dk, dv)), dbias_hP

    return forward, backward


def _by_head(x_NTC: jax.Array, heads: int) -> jax.Array:
    """[N,T,C] -> [heads,N,T,C/heads]."""
    return x_NTC.reshape(*x_NTC.shape[:2], heads, -1).transpose(2, 0, 1, 3)


def _side_by_side(x_hNTd: jax.Array) -> jax.Array:
    """The inverse of `_by_head`."""
    x = x_hNTd.transpose(1, 2, 0, 3)
    return x.reshape(*x.shape[:2], -1)


def _unit(x_NTC: jax.Array, scale_h: jax.Array) -> jax.Array:
    """f32[N,T,C], every head brought to the length of `scale_h`.

    Sums over a head's channels are products with a matrix of ones and zeros: channels stay in the lanes.
    """
    heads = len(scale_h)
    x = x_NTC.astype(jnp.float32)
    own_Ch = np.repeat(np.eye(heads, dtype=np.float32), x.shape[-1] // heads, axis=0)
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    square = exact(jnp.square(x), own_Ch)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))  # padded keys are zero, where the root has no gradient
    return x * exact(scale_h.reshape(1, 1, -1) / (jnp.where(square > 0, norm, 0.0) + 5e-5), own_Ch.T)
