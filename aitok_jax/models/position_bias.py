"""The position bias of window attention: of every offset in a window, and of every pair of its positions.

Of a query at row y, column x and a key at row v, column u of a window of side w, the bias is that of the offset
(y − v, x − u), number (y − v + w − 1)·(2w − 1) + x − u + w − 1 of a table. A gather of all w⁴ of them, and the
scatter-add that is its gradient, run one number after the other on a TPU; here slices do it.
"""

import jax
import jax.numpy as jnp
import numpy as np


def relative_coordinates(window: int, pretrain_window: int) -> np.ndarray:
    """Log-spaced offsets in a window: f32[(2w−1)², 2], (Δrow, Δcolumn) from −(w−1) to w−1, row-major.

    Offsets are divided by (pretrain_window − 1) and multiplied by 8, then sign·log2(1 + |·|)/log2(8).
    """
    offsets = np.arange(-(window - 1), window, dtype=np.float32)
    table = np.stack(np.meshgrid(offsets, offsets, indexing="ij"), -1).reshape(-1, 2)
    table = table / max(pretrain_window - 1, 1) * 8
    return (np.sign(table) * np.log2(1 + np.abs(table)) / np.log2(8)).astype(np.float32)


def relative_index(window: int) -> np.ndarray:
    """int32[w², w²]: the row of `relative_coordinates` of every (query, key) pair of a window."""
    y, x = np.divmod(np.arange(window * window, dtype=np.int32), window)
    rows = y[:, None] - y[None] + window - 1
    columns = x[:, None] - x[None] + window - 1
    return rows * (2 * window - 1) + columns


def strips(table_hP: jax.Array, window: int) -> jax.Array:
    """f32[h,(2w−1)²] of every offset -> f32[h, w, (2w−1)·w], what the queries of a column see.

    Entry [x, a·w + u] is the bias of a query in column x and a key in column u that lies a − (w − 1) rows below it. The
    w² keys of a window follow each other there, from `strip_start` on.

    Of one row of offsets, turned round, column x sees the w numbers from w − 1 − x on. Repeated with a period of 2w and
    cut into rows of 2w − 1 numbers, each row is the one before moved by one place, so that one cut gives all columns.
    """
    w, side = window, 2 * window - 1
    turned = table_hP.reshape(-1, side, side)[:, ::-1, ::-1]
    periods = jnp.broadcast_to(jnp.pad(turned, ((0, 0), (0, 0), (0, 1)))[:, :, None], (len(turned), side, w, 2 * w))
    moved = periods.reshape(-1, side, 2 * w * w)[:, :, : w * side].reshape(-1, side, w, side)
    return moved[..., w - 1 :].transpose(0, 2, 1, 3).reshape(-1, w, side * w)


def strip_start(row: int, window: int) -> int:
    """Where the keys of a window begin in a strip for queries of this row."""
    return (window - 1 - row) * window


def expand(table_hP: jax.Array, window: int) -> jax.Array:
    """f32[h,(2w−1)²] of every offset -> f32[h, w², w²] of every (query, key) pair, as by `relative_index`."""
    of_columns = strips(table_hP, window)
    starts = [strip_start(row, window) for row in range(window)]
    rows = [of_columns[:, :, start : start + window**2] for start in starts]
    return jnp.stack(rows, 1).reshape(-1, window**2, window**2)


def collapse(pairs_hTT: jax.Array, window: int) -> jax.Array:
    """f32[h, w², w²] -> f32[h, (2w−1)²]: the sum over the pairs of each offset, the transpose of `expand`."""
    table = jax.ShapeDtypeStruct((pairs_hTT.shape[0], (2 * window - 1) ** 2), pairs_hTT.dtype)
    return jax.linear_transpose(lambda table_hP: expand(table_hP, window), table)(pairs_hTT)[0]
