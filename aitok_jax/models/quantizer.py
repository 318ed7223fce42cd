"""Vector quantizer: nearest code, straight-through gradient, EMA codebook."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from aitok_jax.models import losses


@flax.struct.dataclass
class Quantized:
    """What the quantizer makes of an encoder output.

    Attributes:
        z: f32[..., D] the codes' vectors, with the straight-through gradient.
        codes: int32[...] code indices.
        loss: f32 scalar, commitment loss.
        perplexity: f32 scalar, exp of the entropy of the codes of this batch; at most K.
        usage: f32 scalar in 0..1, the share of the codebook chosen at least once in this batch.
    """

    z: jax.Array
    codes: jax.Array
    loss: jax.Array
    perplexity: jax.Array
    usage: jax.Array


def nearest_codes(z: jax.Array, embedding_KD: jax.Array) -> jax.Array:
    """Index of the nearest code in squared L2 distance, float32: z f32[..., D] -> int32[...]."""
    z, e_KD = z.astype(jnp.float32), embedding_KD.astype(jnp.float32)
    dots = jnp.einsum("...d,kd->...k", z, e_KD, precision="highest")
    e2_K = jnp.sum(jnp.square(e_KD), -1)
    distances = jnp.expand_dims(e2_K, range(z.ndim - 1)) - 2 * dots  # |z|² is the same for every code
    return jnp.argmin(distances, -1).astype(jnp.int32)


def ema_update(
    size_K: jax.Array,
    ema_w_KD: jax.Array,
    counts_K: jax.Array,
    sums_KD: jax.Array,
    decay: float,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One EMA step of the codebook: (cluster sizes, sums, codebook). The smoothing is written back into the sizes.

    N ← decay·N + (1−decay)·n;  N ← (N+ε)/(ΣN+Kε)·ΣN;  m ← decay·m + (1−decay)·Σz;  codebook ← m/N.
    """
    size_K = decay * size_K + (1 - decay) * counts_K
    total = jnp.sum(size_K)
    size_K = (size_K + epsilon) / (total + size_K.shape[0] * epsilon) * total
    ema_w_KD = decay * ema_w_KD + (1 - decay) * sums_KD
    return size_K, ema_w_KD, ema_w_KD / size_K[:, None]


class Quantizer(nn.Module):
    """Nearest-code quantizer.

    The codebook lives in the collection `codebook` (embedding, cluster_size, ema_w) and moves by `ema_update` in
    training. The sums run over the global batch, so that in data-parallel training every device holds the same
    codebook; the published system updates each replica from its own part.

    Attributes:
        num_codes: K.
        code_dim: D.
        decay, epsilon: of the EMA.
        commitment_cost: weight of mse(sg[code], z).
        restart_threshold: codes whose EMA count falls below it are set to random encoder outputs of the batch; 0 turns
            it off, as published (a code that is never chosen then jumps far away and is dead for good). Needs the rng
            stream `restart`.

    Where a training step has several micro-batches, `open_step` comes first; each then adds its statistics to the
    collection `pending` and leaves the codebook as it is, and `close_step` moves it by their sums.
    """

    num_codes: int
    code_dim: int
    decay: float = 0.99
    epsilon: float = 1e-5
    commitment_cost: float = 0.25
    restart_threshold: float = 0.0

    def setup(self):
        shape = (self.num_codes, self.code_dim)
        self.embedding = self.variable("codebook", "embedding", self._normal, shape)
        self.cluster_size = self.variable("codebook", "cluster_size", jnp.zeros, shape[:1])
        self.ema_w = self.variable("codebook", "ema_w", self._normal, shape)

    def _normal(self, shape):
        return jax.random.normal(self.make_rng("params"), shape)

    @property
    def table(self) -> jax.Array:
        """f32[K, D], the codebook."""
        return jnp.asarray(self.embedding.value)

    def lookup(self, codes: jax.Array) -> jax.Array:
        """int32[...] -> f32[..., D]."""
        return self.table[codes]

    def expect(self, probabilities: jax.Array) -> jax.Array:
        """Soft tokens: f32[..., K] -> f32[..., D], the probability-weighted mean of the codes."""
        return jnp.einsum("...k,kd->...d", probabilities.astype(jnp.float32), self.table)

    def __call__(self, z: jax.Array, train: bool = False, weight_B: jax.Array | None = None) -> Quantized:
        """Quantizes z [..., D]; in training also moves the EMA codebook (after the assignment and the loss).

        Where `weight_B` f32[B] is given, rows of z [B, ..., D] with weight 0 count nowhere.
        """
        z = z.astype(jnp.float32)
        codes = nearest_codes(z, self.table)
        quantized = self.lookup(codes)
        loss = self.commitment_cost * losses.mse(z, jax.lax.stop_gradient(quantized), weight_B)
        weight_N = None if weight_B is None else jnp.repeat(weight_B, codes.size // codes.shape[0])
        one_hot_NK = losses.real_rows(jax.nn.one_hot(codes.reshape(-1), self.num_codes), weight_N)
        counts_K = one_hot_NK.sum(0)
        if train and not self.is_initializing():
            self._learn(jax.lax.stop_gradient(z).reshape(-1, self.code_dim), one_hot_NK, counts_K, weight_N)
        share_K = counts_K / jnp.sum(counts_K)
        return Quantized(
            z=z + jax.lax.stop_gradient(quantized - z),
            codes=codes,
            loss=loss,
            perplexity=jnp.exp(-jnp.sum(share_K * jnp.log(share_K + 1e-10))),
            usage=jnp.mean(counts_K > 0),
        )

    def open_step(self) -> None:
        """Needs `pending` to be mutable."""
        self.put_variable("pending", "counts", jnp.zeros(self.num_codes))
        for name in ("sums", "picks") if self.restart_threshold > 0 else ("sums",):
            self.put_variable("pending", name, jnp.zeros((self.num_codes, self.code_dim)))

    def close_step(self) -> None:
        """Needs `codebook` to be mutable."""
        self._move(*(self.get_variable("pending", name) for name in ("counts", "sums", "picks")))

    def _learn(self, z_ND: jax.Array, one_hot_NK: jax.Array, counts_K: jax.Array, weight_N: jax.Array | None) -> None:
        sums_KD = jnp.einsum("nk,nd->kd", one_hot_NK, z_ND, precision="highest")
        picks_KD = None
        if self.restart_threshold > 0:
            picks_KD = z_ND[self._draw(z_ND.shape[0], weight_N)]
        if not self.has_variable("pending", "counts"):
            self._move(counts_K, sums_KD, picks_KD)
            return
        for name, value in (("counts", counts_K), ("sums", sums_KD)):
            self.put_variable("pending", name, self.get_variable("pending", name) + value)
        if picks_KD is not None:
            self.put_variable("pending", "picks", picks_KD)  # the last micro-batch's: rows are in random order

    def _draw(self, count: int, weight_N: jax.Array | None) -> jax.Array:
        """int32[K] random indices below `count`, of those whose weight is not 0."""
        rng, shape = self.make_rng("restart"), (self.num_codes,)
        if weight_N is None:
            return jax.random.randint(rng, shape, 0, count)
        real_first_N = jnp.argsort(weight_N == 0, stable=True)
        return real_first_N[jax.random.randint(rng, shape, 0, jnp.sum(weight_N).astype(jnp.int32))]

    def _move(self, counts_K: jax.Array, sums_KD: jax.Array, picks_KD: jax.Array | None) -> None:
        size_K, ema_w_KD, embedding_KD = ema_update(
            self.cluster_size.value, self.ema_w.value, counts_K, sums_KD, self.decay, self.epsilon
        )
        if self.restart_threshold > 0:
            dead_K = size_K < self.restart_threshold
            size_K = jnp.where(dead_K, 1.0, size_K)
            ema_w_KD = jnp.where(dead_K[:, None], picks_KD, ema_w_KD)
            embedding_KD = jnp.where(dead_K[:, None], picks_KD, embedding_KD)
        self.cluster_size.value, self.ema_w.value, self.embedding.value = size_K, ema_w_KD, embedding_KD
