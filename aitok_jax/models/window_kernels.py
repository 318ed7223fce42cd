"""Window attention as two Pallas kernels for TPU: nothing of the size of logits or of the pairs' bias leaves the chip.

    out = forward(q, k, v, table, regions, window)
    dq, dk, dv, dtable = backward(q, k, v, table, out, dout, regions, window)

q, k, v, out: [N,T,C], T = w², the heads side by side in C; q and k normalised and scaled. table:
f32[heads,(2w−1)²], the bias of every offset. regions: int32[W,T], of the W windows of an image, or None.

A program has the heads that lie in 128 lanes. To take one of them it sets the lanes of the others to zero: a product
over 128 lanes costs the matrix unit what one over 32 does, and nothing moves between lanes. Programs run group by group
and, in a group, window by window, so that the bias of the pairs is made once a group, and its gradient, too large for
memory, is summed over all windows where it is and leaves as that of strips (`position_bias`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from aitok_jax.models.position_bias import strip_start

LANES, TILE_ROWS, MOST_ROWS = 128, 16, 320
MEMORY = 60 * 2**20  # bytes of vector memory that a plan may take; v5p has 64 MiB, v5e and v6e have 128
SMALL_MEMORY = {f"TPU {kind}": 14 * 2**20 for kind in ("v2", "v3", "v4", "v4 lite")}  # these have 16
APART = -100.0  # added to the logits of pairs that must not see each other
PADDING = -1e9  # the bias of keys that are none


class Plan(NamedTuple):
    """Attributes:
    window: side w.
    heads: of a program.
    width: channels of a head.
    length: T rounded up to whole tiles.
    rows: queries that are taken at a time; divides `length`.
    """

    window: int
    heads: int
    width: int
    length: int
    rows: int

    @property
    def positions(self) -> int:
        return self.window**2

    @property
    def bytes(self) -> int:
        """Of vector memory, in the backward pass: bias and its gradient; operands and results, each twice."""
        blocks = 2 * 7 + 6
        strips = -(-self.window // 8) * 8 * -(-self.side * self.window // LANES) * LANES
        return self.length * (2 * 4 * self.heads * self.length + 4 * blocks * max(self.heads * self.width, LANES)) + (
            4 * strips
        )

    @property
    def side(self) -> int:
        """Offsets along a side."""
        return 2 * self.window - 1

    @property
    def lanes(self) -> int:
        """Of a row of offsets."""
        return -(-self.side // LANES) * LANES


def plan(window: int, heads: int, width: int) -> Plan:
    side_by_side = max(1, LANES // width)
    group = side_by_side if heads % side_by_side == 0 else heads
    length = -(-(window**2) // TILE_ROWS) * TILE_ROWS
    rows = max(n for n in range(TILE_ROWS, min(length, MOST_ROWS) + 1, TILE_ROWS) if length % n == 0)
    return Plan(window, group, width, length, rows)


@functools.partial(jax.jit, static_argnames=("window", "interpret"))  # traced once for all layers of one size
def forward(
    q_NTC: jax.Array,
    k_NTC: jax.Array,
    v_NTC: jax.Array,
    table_hP: jax.Array,
    regions_WT: np.ndarray | None,
    window: int,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q·k + bias + regions)·v of every window and head, [N,T,C] in the dtype of v."""
    call = _Call(q_NTC, table_hP, regions_WT, window, interpret)
    channels = call.plan.heads * call.plan.width
    scratch = [call.pairs, call.strips, *(pltpu.VMEM((call.plan.length, channels), x.dtype) for x in (k_NTC, v_NTC))]
    return call(
        _forward_kernel,
        inputs=(q_NTC, k_NTC, v_NTC),
        outputs=(jax.ShapeDtypeStruct(q_NTC.shape, v_NTC.dtype),),
        scratch=scratch,
        products=2,
    )[0]


@functools.partial(jax.jit, static_argnames=("window", "interpret"))
def backward(
    q_NTC: jax.Array,
    k_NTC: jax.Array,
    v_NTC: jax.Array,
    table_hP: jax.Array,
    out_NTC: jax.Array,
    dout_NTC: jax.Array,
    regions_WT: np.ndarray | None,
    window: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of `forward`: of q, k, v, and f32[heads,(2w−1)²] of the table."""
    call = _Call(q_NTC, table_hP, regions_WT, window, interpret)
    shape = (call.plan.length, call.plan.heads * call.plan.width)
    copies = [pltpu.VMEM(shape, x.dtype) for x in (q_NTC, k_NTC, v_NTC, dout_NTC)]
    sums = [pltpu.VMEM(shape, jnp.float32)] * 2
    *gradients, doffsets = call(
        _backward_kernel,
        inputs=(q_NTC, k_NTC, v_NTC, out_NTC, dout_NTC),
        outputs=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_NTC, k_NTC, v_NTC, call.offsets)),
        scratch=[call.pairs, call.pairs, call.strips, *copies, *sums],
        products=5,
    )
    side = call.plan.side
    return *gradients, doffsets[:, :side, :side].reshape(table_hP.shape)[:, ::-1]


class _Call:
    """What both kernels are called with."""

    def __init__(self, q_NTC, table_hP, regions_WT, window, interpret):
        self.shape, self.dtype, self.interpret = q_NTC.shape, q_NTC.dtype, interpret
        self.num_heads = table_hP.shape[0]
        self.plan = plan(window, self.num_heads, q_NTC.shape[2] // self.num_heads)
        self.regions = regions_WT
        side, lanes = self.plan.side, self.plan.lanes
        squares = table_hP[:, ::-1].reshape(-1, side, side)
        self.offsets = jnp.pad(squares, ((0, 0), (0, -side % 8), (0, lanes - side)))
        self.strips = pltpu.VMEM((window, side * window), jnp.float32)
        self.pairs = pltpu.VMEM((self.plan.heads, self.plan.length, self.plan.length), jnp.float32)

    def __call__(self, kernel: Callable, inputs: tuple, outputs: tuple, scratch: list, products: int) -> Any:
        (n, t, c), p = self.shape, self.plan
        heads = pl.BlockSpec((1, p.length, p.heads * p.width), lambda group, i: (i, 0, group))
        offsets = pl.BlockSpec((p.heads, *self.offsets.shape[1:]), lambda group, i: (group, 0, 0))
        in_specs, out_specs = [offsets, *[heads] * len(inputs)], [heads] * len(outputs)
        inputs, scratch = (self.offsets, *inputs), list(scratch)
        if outputs[-1].shape == self.offsets.shape:
            out_specs[-1] = offsets
        if self.regions is not None:
            count = self.regions.shape[0]
            in_specs.append(pl.BlockSpec((1, 1, p.length), lambda _, i: (jax.lax.rem(i, count), 0, 0)))
            inputs += (jnp.pad(jnp.asarray(self.regions, jnp.float32), ((0, 0), (0, p.length - t)))[:, None],)
            scratch.append(pltpu.VMEM((p.length, 8), jnp.float32))
        moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *outputs))
        return pl.pallas_call(
            functools.partial(kernel, p, len(inputs), len(outputs), self.regions is not None, n),
            grid=(self.num_heads // p.heads, n),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=outputs,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=MEMORY
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * n * t * t * c, transcendentals=n * self.num_heads * t * t, bytes_accessed=moved
            ),
            interpret=self.interpret,
            name=f"{kernel.__name__.strip('_')}_{self.num_heads // p.heads}x{n}",
        )(*inputs)


def _forward_kernel(p: Plan, inputs: int, outputs: int, masked: bool, n: int, *refs) -> None:
    del outputs, n
    offsets_ref, q_ref, k_ref, v_ref, *region_ref = refs[:inputs]
    o_ref, bias_ref, strips_ref, k, v, *columns_ref = refs[inputs:]
    pl.when(pl.program_id(1) == 0)(lambda: _fill_bias(p, bias_ref, strips_ref, offsets_ref))
    regions = _regions(*region_ref, *columns_ref) if masked else None
    k[...], v[...] = _whole(p, k_ref), _whole(p, v_ref)
    lanes = _lanes(p, q_ref)

    def step(head, at):
        q = _only(lanes, head, q_ref[0, at])
        weights, inverse = _weights(q, k[...], bias_ref[head, at], regions, at)
        out = _dot(weights.astype(v.dtype), v[...], 1, 0) * inverse
        o_ref[0, at] = jnp.where(lanes == head, out.astype(o_ref.dtype), o_ref[0, at])

    _each(p, step)


def _backward_kernel(p: Plan, inputs: int, outputs: int, masked: bool, n: int, *refs) -> None:
    """With P the weights, O = PV and dP = dO·Vᵀ: dS = P(dP − Σ dO·O), the sum over channels (arXiv 2205.14135)."""
    offsets_ref, q_ref, k_ref, v_ref, o_ref, do_ref, *region_ref = refs[:inputs]
    dq_ref, dk_ref, dv_ref, doffsets_ref = refs[inputs : inputs + outputs]
    bias_ref, dbias_ref, strips_ref, q, k, v, do, dk, dv, *columns_ref = refs[inputs + outputs :]

    @pl.when(pl.program_id(1) == 0)
    def _():
        _fill_bias(p, bias_ref, strips_ref, offsets_ref)
        dbias_ref[...] = jnp.zeros_like(dbias_ref)

    regions = _regions(*region_ref, *columns_ref) if masked else None
    for copy, ref in ((q, q_ref), (k, k_ref), (v, v_ref), (do, do_ref)):
        copy[...] = _whole(p, ref)
    dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)
    lanes = _lanes(p, q_ref)

    def step(head, at):
        q_head, do_head = _only(lanes, head, q[at]), _only(lanes, head, do[at])
        weights, inverse = _weights(q_head, k[...], bias_ref[head, at], regions, at)
        weights *= inverse
        product = do_head.astype(jnp.float32) * o_ref[0, at].astype(jnp.float32)
        total = jnp.sum(jnp.where(do_head == 0, 0.0, product), -1, keepdims=True)  # beyond T, out may be no number
        ds = weights * (_dot(do_head, v[...], 1, 1) - total)
        dbias_ref[head, at] += ds
        weights, ds = weights.astype(v.dtype), ds.astype(q.dtype)
        dq = _dot(ds, k[...], 1, 0)
        dq_ref[0, at] = jnp.where(lanes == head, dq.astype(dq_ref.dtype), dq_ref[0, at])
        dk[...] += _dot(ds, q_head, 0, 0)
        dv[...] += _dot(weights, do_head, 0, 0)

    _each(p, step)
    dk_ref[0], dv_ref[0] = dk[...].astype(dk_ref.dtype), dv[...].astype(dv_ref.dtype)
    pl.when(pl.program_id(1) == n - 1)(lambda: _sum_bias(p, doffsets_ref, strips_ref, dbias_ref))


def _fill_bias(p: Plan, bias_ref, strips_ref, offsets_ref) -> None:
    """[heads,length,length] of all pairs; keys beyond T get PADDING, queries beyond T are never read.

    Of one row of offsets, turned round, column x of the queries sees the w numbers from w − 1 − x on: all columns
    together are that row, moved by one lane more from column to column. Side by side these make a strip, of which each
    row of queries sees a part (see `position_bias.strips`).
    """

    shape = (-(-p.window // 8) * 8, p.lanes)

    def fill(head, _):
        if p.length > p.positions:
            column = jax.lax.broadcasted_iota(jnp.int32, (p.length, p.length), 1)
            bias_ref[head] = jnp.where(column < p.positions, 0.0, PADDING)
        for a in range(p.side):
            row = pltpu.roll(jnp.broadcast_to(offsets_ref[head, pl.ds(a, 1), :], shape), p.lanes - (p.window - 1), 1)
            strips_ref[:, pl.ds(a * p.window, p.window)] = _stagger(row, 1)[: p.window, : p.window]
        for row in range(p.window):
            of_row = strips_ref[:, pl.ds(strip_start(row, p.window), p.positions)]
            bias_ref[head, pl.ds(row * p.window, p.window), pl.ds(0, p.positions)] = of_row
        return 0

    jax.lax.fori_loop(0, p.heads, fill, 0)


def _sum_bias(p: Plan, doffsets_ref, strips_ref, dbias_ref) -> None:
    """The transpose of `_fill_bias`."""
    doffsets_ref[...] = jnp.zeros_like(doffsets_ref)
    padding = ((0, -p.window % 8), (0, p.lanes - p.window))

    def add(head, _):
        strips_ref[...] = jnp.zeros_like(strips_ref)
        for row in range(p.window):
            at = pl.ds(strip_start(row, p.window), p.positions)
            strips_ref[:, at] += dbias_ref[head, pl.ds(row * p.window, p.window), pl.ds(0, p.positions)]
        for a in range(p.side):
            moved = jnp.pad(strips_ref[:, pl.ds(a * p.window, p.window)], padding)
            back = pltpu.roll(_stagger(moved, -1), p.window - 1, 1)
            doffsets_ref[head, pl.ds(a, 1), :] = jnp.sum(back, 0, keepdims=True)
        return 0

    jax.lax.fori_loop(0, p.heads, add, 0)


def _stagger(x: jax.Array, sign: int) -> jax.Array:
    """Row i of x, f32[rows,lanes], moved round by i lanes, to the right or, for sign −1, to the left."""
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    for bit in range((x.shape[0] - 1).bit_length()):
        moved = pltpu.roll(x, sign * 2**bit % x.shape[1], 1)
        x = jnp.where(jax.lax.rem(jax.lax.div(row, 2**bit), 2) == 1, moved, x)
    return x


def _whole(p: Plan, ref) -> jax.Array:
    """[length,channels] of a block, zero beyond T, where the block holds anything."""
    x = ref[0]
    row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return x if p.length == p.positions else jnp.where(row < p.positions, x, jnp.zeros_like(x))


def _regions(row_ref, column_ref) -> tuple[Any, jax.Array]:
    """The regions of the queries, as the first column of a reference, and of the keys, as a row."""
    row = row_ref[0]
    column_ref[...] = jnp.transpose(jnp.broadcast_to(row, (8, row.shape[-1])))
    return column_ref, row


def _lanes(p: Plan, ref) -> jax.Array:
    """int32[rows,channels]: the head, of those of the program, that a lane belongs to."""
    return jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (p.rows, ref.shape[-1]), 1), p.width)


def _only(lanes: jax.Array, head: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(lanes == head, x, jnp.zeros_like(x))


def _weights(q, k, bias, regions, at) -> tuple[jax.Array, jax.Array]:
    """exp(logits − their maximum), f32[rows,length], and f32[rows,1] that makes each row's sum 1."""
    logits = _dot(q, k, 1, 1) + bias
    if regions is not None:
        columns, row = regions
        logits += jnp.where(columns[at, :1] == row, 0.0, APART)
    weights = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    return weights, 1.0 / jnp.sum(weights, -1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    contracted = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)


def _each(p: Plan, step: Callable[[jax.Array, Any], None]) -> None:
    """step(head, rows of its queries) for all of them."""

    def rows(i, head):
        step(head, pl.ds(pl.multiple_of(i * p.rows, p.rows), p.rows))
        return head

    def heads(head, _):
        return jax.lax.fori_loop(0, p.length // p.rows, rows, head) * 0

    jax.lax.fori_loop(0, p.heads, heads, 0)
