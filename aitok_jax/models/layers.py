"""What backbone and transformer are both made of."""

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

INIT_STD = 0.02  # of linear layers and embeddings
trunc_normal = nn.initializers.truncated_normal(INIT_STD)
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}
"""What a block keeps for the backward pass: everything; the outputs of linear layers; only what goes into it."""
ATTENDED = "attended"  # the name of the results of attention, for PRODUCTS
PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names(ATTENDED)
)


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of a block.

    Attributes:
        dim: channels in and out.
        num_heads: of the attention; divides `dim`.
        hidden: channels inside the MLP.
        drop_path, dropout: probabilities, of a whole branch (may be traced) and inside the MLP.
        dtype, param_dtype: of arithmetic and of parameters.
    """

    dim: int
    num_heads: int
    hidden: int
    drop_path: float | jax.Array = 0.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def dense(self, features: int, name: str | None = None, use_bias: bool = True) -> nn.Dense:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return nn.Dense(features, use_bias=use_bias, kernel_init=trunc_normal, **dtypes, name=name)

    def norm(self, epsilon: float, name: str | None = None) -> nn.LayerNorm:
        """In float32."""
        return nn.LayerNorm(epsilon=epsilon, dtype=jnp.float32, param_dtype=self.param_dtype, name=name)

    def cast_norm(self, epsilon: float, name: str | None = None) -> Callable[[jax.Array], jax.Array]:
        """The same, with its result in `dtype`."""
        layer = self.norm(epsilon, name)
        return lambda x: layer(x).astype(self.dtype)


class DropPath(nn.Module):
    """Drops the branch of whole examples with probability `rate`; rng stream `dropout`."""

    rate: float | jax.Array

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or (isinstance(self.rate, float) and self.rate == 0.0):
            return x
        keep = 1 - self.rate
        mask = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0],) + (1,) * (x.ndim - 1))
        return x * (mask / keep).astype(x.dtype)


class Mlp(nn.Module):
    """Linear → exact GELU → dropout → Linear."""

    widths: Widths

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        y = jax.nn.gelu(self.widths.dense(self.widths.hidden, "fc1")(x), approximate=False)
        y = nn.Dropout(self.widths.dropout, deterministic=not train)(y)
        return self.widths.dense(x.shape[-1], "fc2")(y)


def check_remat(remat: str) -> None:
    """ValueError where REMAT has no such policy."""
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r} must be one of {', '.join(REMAT)}")


def check_sizes(module: nn.Module, *names: str) -> None:
    """ValueError where a field, or an entry of it, is below 1."""
    for name in names:
        value = getattr(module, name)
        for i, size in enumerate(value if isinstance(value, Sequence) else (value,)):
            if size < 1:
                place = f"[{i}]" if isinstance(value, Sequence) else ""
                raise ValueError(f"{name}{place}={size} must be at least 1")


def rematerialized(block: type[nn.Module], remat: str, train_argument: int) -> type[nn.Module]:
    """The class of a block under a policy of REMAT; names and values of its parameters stay.

    Args:
        block: its `__call__` has `train` as the argument of this number, counted from 1.
    """
    policy = REMAT[remat]
    return block if policy is None else nn.remat(block, policy=policy, static_argnums=(train_argument,))


def checkpointed(function: Callable, remat: str) -> Callable:
    """A function, the body of a loop, under a policy of REMAT.

    What a loop keeps for the backward pass is written to memory, all of it; so even `none` keeps the results of
    products and attention alone, and computes again what is made of them element by element.
    """
    policy = REMAT[remat] or PRODUCTS
    return jax.checkpoint(function, policy=policy, prevent_cse=False)
