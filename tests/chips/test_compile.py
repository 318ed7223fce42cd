"""Compiles for a TPU that is not there; needs libtpu (`pip install ".[chips]"`)."""

import chips
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.models import decode, window_attention
from aitok_jax.models.swin_v2 import shift_regions
from aitok_jax.models.transformer import TokenTransformer

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
    least = 2 * np.prod(x.shape) * 8  # q, k, v and the gradient of out are read once; out and three gradients written
    assert least <= hlo.hbm_bytes(operations) < 3 * least  # window·window·heads·windows floats would be 30 times


def test_a_decoding_step_is_few_operations():
    layers = 2
    model = TokenTransformer(dim=256, num_heads=8, decoder_layers=layers, vocab_size=200, max_length=32, num_tasks=1)
    one = jax.sharding.SingleDeviceSharding(chips.devices_of("v5e:2x2")[0])
    arguments = (jnp.zeros((1, 2, 2, 8)), jnp.zeros((1, 2), int), 0)
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    memory = [(jax.ShapeDtypeStruct((1, 8, 225, 32), jnp.float32),) * 2] * layers
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), (params, memory))
    options = {"task": 0, "length": 32, "window": slice(72, 200), "soft_input": True}
    compiled = jax.jit(lambda p, m: decode.decode(model, p, m, **options)).lower(*given).compile()
    steps = [each for each in hlo.Program(compiled.as_text()).operations() if each.times == 32]
    assert sum("decode_attention" in each.label for each in steps) == 2 * layers
    costly = [each for each in steps if (each.cycles or 0) > 1000]
    assert len(costly) <= 15 * layers + 15  # the plain step has 35 a layer
