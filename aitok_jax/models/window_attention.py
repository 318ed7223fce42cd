"""Cosine attention inside windows with a log-spaced continuous position bias, as published for AiT ("RPE-2FC")."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.models.layers import Widths, trunc_normal

MAX_LOGIT_SCALE = math.log(100.0)
APART = -100.0  # added to the logits of pairs that must not see each other


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


class WindowAttention(nn.Module):
    """Cosine attention inside windows, [N, w², C] -> [N, w², C]; logits, bias and softmax in float32.

    One head follows the other, and the backward pass computes logits and weights again, so that neither they nor the
    position bias of all heads, N·heads·w⁴ and heads·w⁴ numbers, are in memory at once.
    """

    widths: Widths
    window: int
    pretrain_window: int

    @nn.compact
    def __call__(self, x_NTC: jax.Array, regions_WT: np.ndarray | None) -> jax.Array:
        """Of `regions_WT`, those of the W windows of an image, only pairs of the same region see each other."""
        n, t, c = x_NTC.shape
        widths, heads = self.widths, self.widths.num_heads
        q_bias = self.param("q_bias", nn.initializers.zeros, (c,), widths.param_dtype)
        v_bias = self.param("v_bias", nn.initializers.zeros, (c,), widths.param_dtype)
        bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(widths.dtype)
        qkv = widths.dense(3 * c, "qkv", use_bias=False)(x_NTC) + bias.reshape(1, 1, -1)
        q, k, v = qkv.reshape(n, t, 3, heads, c // heads).transpose(2, 3, 0, 1, 4)  # h N T d

        init_scale = nn.initializers.constant(math.log(10.0))
        log_scale_h = self.param("logit_scale", init_scale, (heads,), widths.param_dtype)
        scale_h = jnp.exp(jnp.minimum(log_scale_h.astype(jnp.float32), MAX_LOGIT_SCALE))
        q = _unit(q) * scale_h.reshape(-1, 1, 1, 1)
        attend = _attention(self.window, regions_WT)
        out_hNTd = jax.lax.map(lambda head: attend(*head), (q, _unit(k), v, self._position_bias()))
        return widths.dense(c, "proj")(out_hNTd.transpose(1, 2, 0, 3).reshape(n, t, c))

    def _position_bias(self) -> jax.Array:
        """f32[heads, (2w−1)²], in 0..16: of every offset."""
        table = jnp.asarray(relative_coordinates(self.window, self.pretrain_window))
        options = {"kernel_init": trunc_normal, "param_dtype": self.widths.param_dtype}
        hidden = nn.relu(nn.Dense(512, **options, name="rpe_mlp_0")(table))
        per_offset = nn.Dense(self.widths.num_heads, use_bias=False, **options, name="rpe_mlp_2")(hidden)
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
