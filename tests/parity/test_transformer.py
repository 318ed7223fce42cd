"""Token transformer against the published system: teacher forcing, gradients, decoding of depth tokens."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from aitok_jax.convert import rules
from aitok_jax.models import decode
from aitok_jax.models.decode_objects import CLASS_SLOT, decode_objects, nucleus
from aitok_jax.models.transformer import sine_positions
from aitok_jax.tasks.modalities.depth import Depth
from aitok_jax.tasks.objects import DETECTION_ID, INSTANCES_ID

pytestmark = cases.find("transformer_*")
DEPTH, INSTANCES, DETECTION = Depth.task_id, INSTANCES_ID, DETECTION_ID


@pytest.fixture
def case(name):
    return cases.load(name)


@pytest.fixture
def params(case):
    sd = case.state_dict()
    return published.from_state_dict({f"transformer.{k}": v for k, v in sd.items()})["params"]["transformer"]


def build(case, params, parallel):
    tasks, length, _ = params["dec_embed"].shape
    return published.transformer({**case.hp, "parallel": parallel}, length, tasks)


def test_vocabulary_offsets(case):
    offsets, vocab = case.hp["offsets"], published.vocabulary(case.hp)
    assert vocab.classes.start == offsets["class_offset"]
    assert vocab.end_of_sequence == offsets["special_offset"]
    assert vocab.noise == offsets["noise_label"]
    assert vocab.codes_of("mask").start == offsets["mask_offset"]
    assert vocab.codes_of("depth").start == offsets["depth_offset"]
    assert vocab.codes_of("depth").stop == offsets["enddepth_offset"]


def test_sine_positions(case):
    table = case.state_dict()["enc_embed"]
    _, h, w, d = table.shape
    cases.check(sine_positions(h, w, d).reshape(table.shape), table)


def test_teacher_forcing_and_gradients(case, params):
    model = build(case, params, parallel=False)
    src, seq, task = cases.nhwc(case["in/src_big"]), case["in/tf_seq"], case["in/tf_task"]

    def loss(params, src):
        logits = model.apply({"params": params}, src, seq, task)
        return jnp.mean(logits * case["in/tf_weight"]), logits

    (_, logits), (grads, src_grad) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, src)
    cases.check(logits, case["out/tf_logits"])
    memory = model.apply({"params": params}, src, method="encode")
    cases.check(memory, case["out/tf_memory"])
    cases.check(src_grad, cases.nhwc(case["out/tf_grad/src"]), 1e-3)
    for key in case.keys("out/tf_grad/"):
        name = key.removeprefix("out/tf_grad/")
        if name != "src":
            path = rules.locate(f"transformer.{name}")
            cases.check(cases.leaf(grads, path[2:]), rules.to_layout(path, case[key]), 1e-3)


def test_two_sequences_of_one_small_map(case, params):
    src = np.repeat(cases.nhwc(case["in/src_small"][:1]), len(case["in/tf2_seq"]), 0)
    model = build(case, params, parallel=False)
    cases.check(model.apply({"params": params}, src, case["in/tf2_seq"], case["in/tf2_task"]), case["out/tf2_logits"])


def test_parallel_teacher_forcing(case, params):
    model = build(case, params, parallel=True)
    src = cases.nhwc(case["in/src_small"])
    cases.check(model.apply({"params": params}, src, case["in/tf2_seq"], DEPTH), case["out/tfpar_logits"])


def decode_depth(case, params, *, parallel=False, **options):
    model = build(case, params, parallel)
    memory = model.apply(
        {"params": params},
        model.apply({"params": params}, cases.nhwc(case["in/src_small"]), method="encode"),
        method="memory_keys_values",
    )
    window = published.vocabulary(case.hp).codes_of("depth").slice
    length = int(case["in/depth_pred_len"])
    run = jax.jit(lambda p, m: decode.decode(model, p, m, task=DEPTH, length=length, window=window, **options))
    return run(params, memory), window


@pytest.mark.parametrize(
    ("tag", "options"),
    [
        ("soft", {"soft_input": True}),
        ("hard", {"soft_input": False}),
        ("par", {"soft_input": False, "parallel": True}),
    ],
)
def test_depth_decoding(case, params, tag, options):
    decoded, window = decode_depth(case, params, **options)
    cases.check(decoded.logits, case[f"out/depth_{tag}_logits"])
    cases.check(decoded.logits, case[f"out/depth_{tag}_steplogits"][..., window])
    np.testing.assert_array_equal(decoded.tokens, case[f"out/depth_{tag}_tokens"])


def check_objects(case, params, tag, task, mask_tokens, **options):
    """Tokens in the case count from the start of their slot's window."""
    model, vocabulary = build(case, params, parallel=False), published.vocabulary(case.hp)
    starts = [vocabulary.coordinates.start] * CLASS_SLOT + [vocabulary.classes.start]
    starts += [vocabulary.codes_of("mask").start] * mask_tokens
    theirs = case[f"out/{tag}_tokens"]
    count = theirs.shape[1] // len(starts)

    @jax.jit
    def run(params, src):
        memory = model.apply({"params": params}, src, method="encode")
        memory = model.apply({"params": params}, memory, method="memory_keys_values")
        return decode_objects(
            model, params, memory, vocabulary, task=task, num_objects=count, mask_tokens=mask_tokens, **options
        )

    decoded = run(params, cases.nhwc(case["in/src_big"][: len(theirs)]))
    np.testing.assert_array_equal((decoded.tokens - np.reshape(starts, (1, 1, -1))).reshape(theirs.shape), theirs)
    cases.check(decoded.scores, case[f"out/{tag}_scores"])
    assert decoded.steps == theirs.shape[1]
    return decoded


@pytest.mark.parametrize("soft_detokenize", [0, 1])
@pytest.mark.parametrize("soft_input", [0, 1])
def test_instance_decoding(case, params, soft_detokenize, soft_input):
    tag = f"insseg_vae{soft_detokenize}_tr{soft_input}"
    mask_tokens = int(case["in/mask_token_length"])
    decoded = check_objects(case, params, tag, INSTANCES, mask_tokens, soft_input=bool(soft_input))
    if soft_detokenize:
        cases.check(decoded.mask_logits, case[f"out/{tag}_masklogits"])


def test_detection_decoding(case, params):
    check_objects(case, params, "det", DETECTION, 0, soft_input=False)


def test_nucleus(case):
    probabilities = jax.nn.softmax(jnp.asarray(case["out/nucleus_depth_logits"]))
    kept = nucleus(probabilities, case.hp["nucleus_top_p"])
    cases.check(kept, case["out/nucleus_depth_probs"])
    np.testing.assert_array_equal(kept.argmax(-1), case["out/nucleus_depth_tokens"])
    np.testing.assert_array_equal((kept > 0).sum(-1).max(0), case.notes["nucleus_kept"])
