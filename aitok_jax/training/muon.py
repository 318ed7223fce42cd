"""Muon, an aid for solvers with random weights, which learn in half of the steps; no published set-up has it."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax


def labels(params: Mapping) -> Mapping:
    """'muon' for the kernels of linear layers and convolutions, 'adam' for everything else."""

    def label(keys, value):
        matrix = value.ndim >= 2 and keys[-1].key == "kernel" and "rpe_mlp" not in path_of(keys)
        return "muon" if matrix else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def scale_by_muon() -> optax.GradientTransformation:
    """Muon: the momentum's singular values all become about 1, scaled to Adam's usual size (arXiv 2502.16982).

    A convolution's kernel is the matrix [height·width·in, out]. Matrices of one shape are orthogonalised together, as
    one batch, and the wide way round, which is several times faster than one after the other. Three iterations after
    scaling by the Schatten norm (arXiv 2506.10935) do about as well as the usual five.
    """
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
    muon = optax.contrib.scale_by_muon(
        ns_steps=3,
        preconditioning="schatten",
        weight_dimension_numbers=lambda stacks: jax.tree.map(lambda _: axes, stacks),
    )

    def update(updates, state, params=None):
        leaves, structure = jax.tree.flatten(updates)
        matrices = [_wide(leaf) for leaf in leaves]
        stacks, state = muon.update(_stack(matrices), state)
        stacked = {name: iter(0.2 * math.sqrt(stack.shape[2]) * stack) for name, stack in stacks.items()}
        new = [_like(next(stacked[_size(m)]), leaf) for m, leaf in zip(matrices, leaves, strict=True)]
        return structure.unflatten(new), state

    def init(params):
        return muon.init(_stack([_wide(leaf) for leaf in jax.tree.leaves(params)]))

    return optax.GradientTransformation(init, update)


def _wide(kernel: jax.Array) -> jax.Array:
    """[..., in, out] as a matrix that is at least as wide as high."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _like(matrix: jax.Array, kernel: jax.Array) -> jax.Array:
    """The inverse of `_wide`."""
    turned = kernel.size // kernel.shape[-1] > kernel.shape[-1]
    return (matrix.T if turned else matrix).reshape(kernel.shape)


def _stack(matrices: list[jax.Array]) -> dict[str, jax.Array]:
    """By size, [number, rows, columns]."""
    groups: dict[str, list] = {}
    for matrix in matrices:
        groups.setdefault(_size(matrix), []).append(matrix)
    return {size: jnp.stack(group) for size, group in groups.items()}


def _size(matrix: jax.Array) -> str:
    return f"{matrix.shape[0]}x{matrix.shape[1]}"


def path_of(keys: tuple) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
