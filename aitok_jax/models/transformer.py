"""The solver's encoder–decoder over one flat vocabulary, with an explicit key/value cache."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from aitok_jax.models import causal_attention
from aitok_jax.models.layers import DropPath, Mlp, Widths, check_remat, check_sizes, rematerialized, trunc_normal

KeyValue = tuple[jax.Array, jax.Array]  # each [B, heads, T, d]
Cache = tuple[jax.Array, jax.Array]
"""Keys and values so far, each [B·heads, T, d], as the products of a step take them: with another layout, or one axis
more, XLA copies the whole cache at every step."""
EPSILON = 1e-5  # of all LayerNorms here


def sine_positions(height: int, width: int, dim: int, temperature: float = 10000.0) -> np.ndarray:
    """f32[height·width, dim]: rows in the first half of the channels, columns in the second; sine, cosine, sine, …"""
    half = dim // 2
    frequency = temperature ** (2 * (np.arange(half) // 2) / half)
    table = np.zeros((height, width, dim), np.float64)
    for axis, size in enumerate((height, width)):
        angle = np.arange(size)[:, None] / frequency
        waves = np.where(np.arange(half) % 2 == 0, np.sin(angle), np.cos(angle))
        table[..., axis * half : (axis + 1) * half] = waves[:, None] if axis == 0 else waves[None]
    return table.reshape(height * width, dim).astype(np.float32)


class Attention(nn.Module):
    """Multi-head attention; softmax in float32."""

    widths: Widths

    def setup(self):
        self.wq, self.wk, self.wv, self.proj = (self.widths.dense(self.widths.dim) for _ in range(4))

    def keys_values(self, x_BTD: jax.Array) -> KeyValue:
        """[B,T,D] -> keys and values, each [B,heads,T,d]."""
        return self._split(self.wk(x_BTD)), self._split(self.wv(x_BTD))

    def attend(self, x_BQD: jax.Array, keys_values: KeyValue, mask: jax.Array | None = None) -> jax.Array:
        """Queries of x [B,Q,D] over the keys; mask bool, broadcast against [B,heads,Q,T], True where allowed."""
        keys, values = keys_values
        logits = jnp.einsum("bhqd,bhkd->bhqk", self._queries(x_BQD), keys, preferred_element_type=jnp.float32)
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits).astype(self.widths.dtype)
        return self._project(jnp.einsum("bhqk,bhkd->bqhd", weights, values))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return self.attend(x_BTD, self.keys_values(x_BTD))

    def causal(self, x_BTD: jax.Array) -> jax.Array:
        """Every position of x over itself and those before it."""
        t, keys_values = x_BTD.shape[1], self.keys_values(x_BTD)
        if t < causal_attention.LONG:
            return self.attend(x_BTD, keys_values, jnp.tril(jnp.ones((1, 1, t, t), bool)))
        return self._project(causal_attention.attend(self._queries(x_BTD), *keys_values).swapaxes(1, 2))

    def _queries(self, x_BQD: jax.Array) -> jax.Array:
        return self._split(self.wq(x_BQD)) * (self.widths.dim // self.widths.num_heads) ** -0.5

    def _project(self, out_BQhd: jax.Array) -> jax.Array:
        return self.proj(out_BQhd.reshape(*out_BQhd.shape[:2], self.widths.dim))

    def _split(self, x: jax.Array) -> jax.Array:
        heads = self.widths.num_heads
        return x.reshape(*x.shape[:2], heads, self.widths.dim // heads).swapaxes(1, 2)


class EncoderBlock(nn.Module):
    """Pre-norm block: x += attention(LN1 x); x += MLP(LN2 x)."""

    widths: Widths

    def setup(self):
        self.norm1, self.norm2 = (self.widths.norm(EPSILON) for _ in range(2))
        self.attn, self.mlp = Attention(self.widths), Mlp(self.widths)
        self.drop_path_layer = DropPath(self.widths.drop_path)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x += self.drop_path_layer(self.attn(self.norm1(x)), train)
        return x + self.drop_path_layer(self.mlp(self.norm2(x), train), train)


class DecoderBlock(nn.Module):
    """Pre-norm block: causal self-attention; cross-attention with the same LN2 on x and the memory; MLP."""

    widths: Widths

    def setup(self):
        self.norm1, self.norm2, self.norm3 = (self.widths.norm(EPSILON) for _ in range(3))
        self.attn, self.crossattn, self.mlp = Attention(self.widths), Attention(self.widths), Mlp(self.widths)
        self.drop_path_layer = DropPath(self.widths.drop_path)

    def memory_keys_values(self, memory_BMD: jax.Array) -> KeyValue:
        return self.crossattn.keys_values(self.norm2(memory_BMD))

    def __call__(self, x_BTD: jax.Array, memory: KeyValue, train: bool) -> jax.Array:
        x = x_BTD + self.drop_path_layer(self.attn.causal(self.norm1(x_BTD)), train)
        return self._rest(x, memory, train)

    def step(self, x_B1D: jax.Array, memory: KeyValue, cache: Cache, index: jax.Array) -> tuple[jax.Array, Cache]:
        """One position: writes its keys and values at `index` of the cache and attends to positions 0..index."""
        normed = self.norm1(x_B1D)
        new = self.attn.keys_values(normed)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(old, each.reshape(-1, *each.shape[2:]), index, axis=1)
            for old, each in zip(cache, new, strict=True)
        )
        seen = (jnp.arange(cache[0].shape[1]) <= index).reshape(1, 1, 1, -1)
        keys_values = tuple(each.reshape(*new[0].shape[:2], *each.shape[1:]) for each in cache)
        return self._rest(x_B1D + self.attn.attend(normed, keys_values, seen), memory, False), cache

    def _rest(self, x: jax.Array, memory: KeyValue, train: bool) -> jax.Array:
        x += self.drop_path_layer(self.crossattn.attend(self.norm2(x), memory), train)
        return x + self.drop_path_layer(self.mlp(self.norm3(x), train), train)


class Blocks(nn.Module):
    """A stack of encoder or decoder blocks."""

    block: type[nn.Module]
    num_layers: int
    widths: Widths

    def setup(self):
        self.blocks = [self.block(self.widths) for _ in range(self.num_layers)]


class TokenTransformer(nn.Module):
    """Backbone map -> memory -> logits over the vocabulary; the output weights are the input embedding.

    Attributes:
        dim: D. num_heads, hidden, encoder_layers, decoder_layers: of the blocks.
        vocab_size: V. max_length: longest sequence; num_tasks: task and position tables are per task.
        position_temperature: of the image's sine positions; 10000 as published. The positions of a small grid then
            differ in few channels only, and the decoder takes long to learn where to look: give it a small one.
        parallel: AiT-P: every token input is one learned vector, so that one causal pass predicts all positions.
        remat: what blocks keep for the backward pass, of `layers.REMAT`.
    """

    dim: int = 256
    num_heads: int = 8
    hidden: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    vocab_size: int = 2339
    max_length: int = 2100
    num_tasks: int = 4
    position_temperature: float = 10000.0
    parallel: bool = False
    drop_path: float = 0.1
    dropout: float = 0.1
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check_remat(self.remat)
        check_sizes(self, "dim", "num_heads", "hidden", "max_length", "num_tasks")
        if self.dim % (2 * self.num_heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2·num_heads={2 * self.num_heads}")
        super().__post_init__()

    def setup(self):
        widths = Widths(
            dim=self.dim,
            num_heads=self.num_heads,
            hidden=self.hidden,
            drop_path=self.drop_path,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )
        self.encoder = Blocks(rematerialized(EncoderBlock, self.remat, 2), self.encoder_layers, widths)
        self.decoder = Blocks(rematerialized(DecoderBlock, self.remat, 3), self.decoder_layers, widths)
        self.input_dropout = nn.Dropout(self.dropout)
        self.input_proj, self.proj = widths.dense(self.dim), widths.dense(self.dim)
        norms = (widths.norm(EPSILON) for _ in range(5))
        self.stem_ln, self.encout_ln, self.proj_ln, self.proj_mlp_ln, self.norm = norms
        self.proj_mlp = Mlp(widths)
        self.drop_path_layer = DropPath(self.drop_path)

        def table(name, *shape, init=trunc_normal):
            return self.param(name, init, shape, self.param_dtype)

        self.voc_embed = table("voc_embed", self.vocab_size, self.dim)
        self.outp_bias = table("outp_bias", self.vocab_size, init=nn.initializers.zeros)
        self.task_embed = table("task_embed", self.num_tasks, self.dim)
        self.dec_embed = table("dec_embed", self.num_tasks, self.max_length, self.dim)
        if self.parallel:
            self.mask_embed = table("mask_embed", self.dim)

    def encode(self, features_BHWC: jax.Array, train: bool = False) -> jax.Array:
        """Backbone map [B,h,w,C] -> memory [B, h·w, D]."""
        b, h, w, c = features_BHWC.shape
        positions_1LD = jnp.asarray(sine_positions(h, w, self.dim, self.position_temperature))[None]
        x = self.input_dropout(features_BHWC.reshape(b, h * w, c), deterministic=not train)
        x = self.stem_ln(self.input_proj(x)) + positions_1LD
        for block in self.encoder.blocks:
            x = block(x, train)
        x = self.proj_ln(self.proj(self.encout_ln(x))) + positions_1LD
        return x + self.drop_path_layer(self.proj_mlp(self.proj_mlp_ln(x), train), train)

    def memory_keys_values(self, memory_BMD: jax.Array) -> list[KeyValue]:
        """Keys and values of the cross-attention of every decoder layer; they do not depend on the step."""
        return [block.memory_keys_values(memory_BMD) for block in self.decoder.blocks]

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """int[B,T] tokens -> [B,T,D] inputs; the parallel model gives the same vector for every token."""
        if self.parallel:
            return jnp.broadcast_to(self.mask_embed.reshape(1, 1, -1), (*tokens_BT.shape, self.dim))
        return self.voc_embed[tokens_BT]

    def positions(self, task: int | jax.Array, length: int) -> jax.Array:
        """Learned position vectors of one task [1, length, D], or of int[B] tasks [B, length, D].

        Raises:
            ValueError: where the sequence is longer than the table.
        """
        if length > self.max_length:
            raise ValueError(f"a sequence of {length} tokens is longer than max_length={self.max_length}")
        return self.dec_embed[jnp.atleast_1d(task), :length]

    def start(self, task: int | jax.Array, batch: int) -> jax.Array:
        """The task embedding, the input of position 0: [B,1,D]."""
        return jnp.broadcast_to(self.task_embed[jnp.atleast_1d(task), None], (batch, 1, self.dim))

    def decode(
        self,
        memory: list[KeyValue],
        tokens_BT: jax.Array,
        task: int | jax.Array,
        train: bool = False,
        window: slice = slice(None),
    ) -> jax.Array:
        """Teacher forcing: logits f32[B,T+1,V] of every position, after the task embedding and the first T tokens."""
        x = jnp.concatenate([self.start(task, tokens_BT.shape[0]), self.embed(tokens_BT)], axis=1)
        x = x + self.positions(task, x.shape[1])
        for block, keys_values in zip(self.decoder.blocks, memory, strict=True):
            x = block(x, keys_values, train)
        return self.logits(x, window)

    def logits(self, x: jax.Array, window: slice = slice(None)) -> jax.Array:
        """Decoder output [...,D] -> f32 logits of the vocabulary, or of one window of it."""
        x = self.norm(x).astype(jnp.float32)
        table_VD, bias_V = self.voc_embed[window].astype(jnp.float32), self.outp_bias[window].astype(jnp.float32)
        return jnp.einsum("...d,vd->...v", x, table_VD) + jnp.expand_dims(bias_V, range(x.ndim - 1))

    def empty_cache(self, batch: int, length: int) -> list[Cache]:
        """Zeros for `length` positions of every decoder layer."""
        shape = (batch * self.num_heads, length, self.dim // self.num_heads)
        return [(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.decoder_layers)]

    def step(
        self, x_BD: jax.Array, memory: list[KeyValue], cache: list[Cache], index: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """One decoding step: input vector (embedding + position) -> decoder output [B,D] and the cache with it in."""
        x, new = x_BD[:, None], []
        for block, keys_values, old in zip(self.decoder.blocks, memory, cache, strict=True):
            x, updated = block.step(x, keys_values, old, index)
            new.append(updated)
        return x[:, 0], new

    def __call__(
        self, features_BHWC: jax.Array, tokens_BT: jax.Array, task: int | jax.Array, train: bool = False
    ) -> jax.Array:
        """Backbone map and input tokens -> logits f32[B,T+1,V]."""
        memory = self.memory_keys_values(self.encode(features_BHWC, train))
        return self.decode(memory, tokens_BT, task, train)
