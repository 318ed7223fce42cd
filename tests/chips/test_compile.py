"""Compiles for a TPU that is not there; needs libtpu (`pip install ".[chips]"`)."""

import chips
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models import window_attention
from aitok_jax.models.swin_v2 import shift_regions

pytest.importorskip("libtpu", reason='no libtpu: pip install ".[chips]" to compile for TPUs')
WINDOW, HEADS, WINDOWS = 15, 8, (2, 2)


def test_attention_and_its_gradients_move_operands_and_results_alone():
    regions = shift_regions(WINDOWS[0] * WINDOW, WINDOWS[1] * WINDOW, WINDOW, WINDOW // 2)
    one = jax.sharding.SingleDeviceSharding(chips.devices_of("v5e:2x2")[0])
    x = jax.ShapeDtypeStruct((8 * len(regions), WINDOW**2, 32 * HEADS), jnp.bfloat16, sharding=one)
    bias = jax.ShapeDtypeStruct((HEADS, (2 * WINDOW - 1) ** 2), jnp.float32, sharding=one)

    def gradients(q, k, v, bias, dout):
        out, pull = jax.vjp(window_attention.attention(WINDOW, regions), q, k, v, bias)
        return out, *pull(dout)

    program = hlo.Program(jax.jit(gradients).lower(x, x, x, bias, x).compile().as_text())
    operations = program.operations()
    kernels = [each for each in operations if "pallas_call" in each.label and each.instruction.opcode == "custom-call"]
    assert len(kernels) == 2
    kinds = {each.opcode for body in program.computations.values() for each in body}
    assert not kinds & {"gather", "scatter"}
    least = 2 * np.prod(x.shape) * (4 + 8)  # q, k, v, out forward; with their gradients and that of out backward
    assert least <= hlo.hbm_bytes(operations) < 3 * least  # window·window·heads·windows floats would be 20 times
