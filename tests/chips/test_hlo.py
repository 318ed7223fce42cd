"""The counter of bytes, on programs whose bytes are known."""

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.parallel import sharding

N = 256
LOOP = """HloModule example

%sliced (p0: f32[8,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[8,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %row = f32[1,1024]{1,0} dynamic-slice(f32[8,1024]{1,0} %p0, s32[] %p1, s32[] %zero), dynamic_slice_sizes={1,1024}
}

%body (carry: (s32[], f32[8,1024], bf16[1024])) -> (s32[], f32[8,1024], bf16[1024]) {
  %carry = (s32[], f32[8,1024]{1,0}, bf16[1024]{0:T(1024)(128)(2,1)S(1)}) parameter(0)
  %i = s32[] get-tuple-element((s32[], f32[8,1024], bf16[1024]) %carry), index=0
  %all = f32[8,1024]{1,0} get-tuple-element((s32[], f32[8,1024], bf16[1024]) %carry), index=1
  %on_chip = bf16[1024]{0:T(1024)(128)(2,1)S(1)} get-tuple-element((s32[], f32[8,1024], bf16[1024]) %carry), index=2
  %row = f32[1,1024]{1,0} fusion(f32[8,1024]{1,0} %all, s32[] %i), kind=kLoop, calls=%sliced, MORE
  %sum = f32[1,1024]{1,0} all-reduce(f32[1,1024]{1,0} %row), replica_groups={}, to_apply=%add
  ROOT %next = (s32[], f32[8,1024]{1,0}, bf16[1024]{0:S(1)}) tuple(s32[] %i, f32[8,1024]{1,0} %all, bf16[1024] %on_chip)
}

%condition (carry: (s32[], f32[8,1024], bf16[1024])) -> pred[] {
  %carry = (s32[], f32[8,1024]{1,0}, bf16[1024]{0:S(1)}) parameter(0)
  %i = s32[] get-tuple-element((s32[], f32[8,1024], bf16[1024]) %carry), index=0
  %last = s32[] constant(8)
  ROOT %less = pred[] compare(s32[] %i, s32[] %last), direction=LT
}

ENTRY %main (x: f32[8,1024], y: bf16[1024]) -> f32[8,1024] {
  %x = f32[8,1024]{1,0} parameter(0)
  %y = bf16[1024]{0} parameter(1)
  %zero = s32[] constant(0)
  %copied = bf16[1024]{0:T(1024)(128)(2,1)S(1)} copy(bf16[1024]{0} %y)
  %start = (s32[], f32[8,1024]{1,0}, bf16[1024]{0:S(1)}) tuple(s32[] %zero, f32[8,1024]{1,0} %x, bf16[1024] %copied)
  %loop = (s32[], f32[8,1024]{1,0}, bf16[1024]{0:S(1)}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8,1024]{1,0} get-tuple-element((s32[], f32[8,1024], bf16[1024]) %loop), index=1
}
""".replace("MORE", 'metadata={op_name="a/b12"}, backend_config={"estimated_cycles":"70"}')


def compiled(function, *args):
    return hlo.Program(jax.jit(function).lower(*args).compile().as_text()).operations()


def matrix():
    return np.ones((N, N), np.float32)


def test_an_operation_moves_its_operands_and_its_result():
    assert hlo.hbm_bytes(compiled(lambda x, y: x * y + 1, matrix(), matrix())) == 3 * 4 * N * N


def test_a_product_moves_three_matrices_each_trip():
    def loop(x, y):
        return jax.lax.scan(lambda carry, _: (carry @ y, None), x, length=10)[0]

    operations = compiled(loop, matrix(), matrix())
    (product,) = (each for each in operations if "dot_general" in each.label)
    assert (product.times, product.hbm_bytes) == (10, 3 * 4 * N * N)


def test_of_a_buffer_that_is_sliced_the_slice_counts():
    def loop(rows):
        return jax.lax.scan(lambda carry, row: (carry + row, None), jnp.zeros(N), rows)[0]

    operations = compiled(loop, np.ones((1000, N), np.float32))
    assert 2 * 4 * N * 1000 <= hlo.hbm_bytes(operations) <= 5 * 4 * N * 1000  # not 1000 times the whole of it


@pytest.mark.parametrize("trips", ["", ', backend_config={"known_trip_count":{"n":"8"}}'])
def test_loops_chip_memory_slices_cycles_and_collectives(trips):
    program = hlo.Program(LOOP.replace("body=%body", f"body=%body{trips}"))
    operations = program.operations()
    row = 4 * 1024
    moved = {each.instruction.name: (each.times, each.hbm_bytes) for each in operations}
    assert moved["copied"] == (1, 2 * 1024)  # what arrives lies on the chip
    assert moved["row"] == (8, 2 * row + 4)  # the slice, read and written, and its index
    assert moved["sum"] == (8, 2 * row)
    assert hlo.hbm_bytes(operations) == 2 * 1024 + 8 * (4 * row + 4)
    assert hlo.cycles(operations) == 8 * 70
    assert hlo.collectives(operations) == {"all-reduce": {"instructions": 1, "runs": 8, "bytes": 8 * row}}
    assert hlo.largest(operations, 1) == [("fusion a/b#", 8 * (2 * row + 4), 8)]


def test_serial_operations_are_found_inside_of_fusions():
    program = hlo.Program(jax.jit(lambda x, i: x[i] + 1).lower(matrix()[0], np.arange(9)).compile().as_text())
    assert len(hlo.serial(program.operations(), program)) == 1


def test_collectives_of_eight_devices():
    mesh = sharding.make_mesh()
    rows = jax.device_put(matrix(), sharding.batch_sharding(mesh))
    found = hlo.collectives(compiled(lambda x: jnp.sum(x, 0), rows))
    assert found == {"all-reduce": {"instructions": 1, "runs": 1, "bytes": 4 * N}}


def test_slices_between_memories_are_what_arrives():
    text = """HloModule m

ENTRY %main (p: f32[256,128]) -> f32[64,128] {
  %p = f32[256,128]{1,0} parameter(0)
  %room = f32[1000]{0} custom-call(), custom_call_target="AllocateBuffer"
  %s = ((f32[256,128]{1,0}), f32[64,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:64], [0:128]}
  ROOT %d = f32[64,128]{1,0:S(1)} slice-done(%s)
}
"""
    assert hlo.hbm_bytes(hlo.Program(text).operations()) == pytest.approx(4 * 64 * 128, abs=4)


def test_fusions_that_slice_inside_fusions_read_the_slice():
    text = """HloModule m

%inner (a: f32[8,100], i: s32[]) -> f32[1,100] {
  %a = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,100]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,100}
}

%outer (b: f32[8,100], j: s32[], c: f32[8,100]) -> (f32[8,100], f32[1,100]) {
  %b = f32[8,100]{1,0} parameter(0)
  %j = s32[] parameter(1)
  %c = f32[8,100]{1,0} parameter(2)
  %none = s32[] constant(0)
  %part = f32[1,100]{1,0} fusion(%b, %j), kind=kLoop, calls=%inner
  %whole = f32[8,100]{1,0} dynamic-update-slice(%c, %part, %j, %none)
  ROOT %both = (f32[8,100]{1,0}, f32[1,100]{1,0}) tuple(%whole, %part)
}

ENTRY %main (x: f32[8,100], n: s32[], y: f32[8,100]) -> (f32[8,100], f32[1,100]) {
  %x = f32[8,100]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %y = f32[8,100]{1,0} parameter(2)
  ROOT %f = (f32[8,100]{1,0}, f32[1,100]{1,0}) fusion(%x, %n, %y), kind=kLoop, calls=%outer
}
"""
    row = 4 * 100
    assert hlo.hbm_bytes(hlo.Program(text).operations()) == row + 4 + 2 * row  # read, the index, the update and the row
