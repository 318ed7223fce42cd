"""VQ-VAE against the published system: codes, decoding, losses, gradients, EMA codebook and four updates."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import published

from aitok_jax.convert import rules
from aitok_jax.models.quantizer import Quantizer
from aitok_jax.models.vqvae import VQVAE

pytestmark = cases.find("vqvae_*")


def build(hp):
    return VQVAE(
        hidden=hp["vae_hidden_dim"],
        downsample=hp["downsample_ratio"],
        num_res_blocks=hp["num_resnet_blocks"],
        num_codes=hp["num_tokens"],
        code_dim=hp["codebook_dim"],
        objective=hp["loss_type"],
        use_norm=hp["use_norm"],
        max_value=hp["max_value"],
        decay=hp["ema_decay"],
        epsilon=hp["ema_epsilon"],
        commitment_cost=hp["commitment_cost"],
    )


def load(name):
    case = cases.load(name)
    tree = published.from_state_dict(case.state_dict())
    return case, build(case.hp), {"params": tree["params"], **tree["model_state"]}


def test_encode_and_decode(name):
    case, model, variables = load(name)
    images = cases.nhwc(case["in/img"])
    features = model.apply(variables, images, method="encode_features")
    cases.check(features, cases.nhwc(case["out/enc_logits"]))
    codes = model.apply(variables, images, method="encode")
    np.testing.assert_array_equal(codes, case["out/codes"])
    np.testing.assert_array_equal(codes.reshape(codes.shape[0], -1), case["out/ait_encode"])
    decoded = model.apply(variables, codes, method="decode")
    cases.check(decoded, cases.nhwc(case["out/decode_hard"]))
    cases.check(decoded[..., 0], case["out/ait_decode"])


def test_soft_decoding(name):
    case, model, variables = load(name)
    logits = cases.nhwc(case["in/soft_logits"])
    keys = case.keys("out/decode_soft_tau")
    assert keys
    for key in keys:
        warmed = model.clone(soft_temperature=float(key.removeprefix("out/decode_soft_tau")))
        cases.check(warmed.apply(variables, logits, method="decode_soft")[..., 0], case[key])


def test_evaluation_losses(name):
    case, model, variables = load(name)
    images = cases.nhwc(case["in/img"])
    result = model.apply(variables, images)
    cases.check(result.loss, case["out/eval_total"])
    cases.check(result.reconstruction_loss, case["out/eval_recon"])
    cases.check(result.output, cases.nhwc(case["out/eval_out"]))
    plain = model.clone(objective="mse").apply(variables, images)
    cases.check(plain.reconstruction_loss, case["out/ait_eval_recon"])
    cases.check(plain.quantized.loss, case["out/ait_eval_vq"])
    cases.check(plain.loss, case["out/ait_eval_total"])
    if "out/ait_eval_out" in case:
        cases.check(plain.output, cases.nhwc(case["out/ait_eval_out"]))


def training_step(case, model):
    images = cases.nhwc(case["in/train_img"])
    target = cases.nhwc(case["in/train_label"]) if "in/train_label" in case else images

    def loss(params, codebook):
        result, state = model.apply(
            {"params": params, "codebook": codebook}, images, target, train=True, mutable=["codebook"]
        )
        return result.loss, (result, state["codebook"])

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_training_step(name):
    case, model, variables = load(name)
    (total, (result, codebook)), grads = training_step(case, model)(variables["params"], variables["codebook"])
    cases.check(total, case["out/train_total"])
    cases.check(result.reconstruction_loss, case["out/train_recon"])
    cases.check(result.quantized.loss, case["out/train_vq"])
    cases.check(result.output, cases.nhwc(case["out/train_out"]))
    np.testing.assert_array_equal(result.quantized.codes, case["out/train_codes"])
    cases.check(result.quantized.perplexity, case["out/train_perplexity"])
    for ours, theirs in {"embedding": "embedding", "cluster_size": "ema_cluster_size", "ema_w": "ema_w"}.items():
        cases.check(codebook["quantizer"][ours], case[f"out/train_{theirs}"])
    for key in case.keys("out/grad/"):
        path = rules.locate(key.removeprefix("out/grad/"))
        cases.check(cases.leaf(grads, path[1:]), rules.to_layout(path, case[key]), 1e-3)


def test_four_updates(name):
    case, model, variables = load(name)
    kind, _, rate = case.hp["optimizer"].split()
    optimizer = {"adam": optax.adam, "adamw": lambda lr: optax.adamw(lr, weight_decay=0.01)}[kind](float(rate))
    params, codebook = variables["params"], variables["codebook"]
    state, step = optimizer.init(params), training_step(case, model)
    losses = []
    for _ in range(len(case["out/opt_losses"])):
        (total, (_, codebook)), grads = step(params, codebook)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(total)
    cases.check(jnp.stack(losses), case["out/opt_losses"])
    for key in case.keys("out/opt_final/"):
        name = key.removeprefix("out/opt_final/")
        if name == "_ema_cluster_size":
            cases.check(codebook["quantizer"]["cluster_size"], case[key], 1e-3)
        else:
            path = rules.locate(name)
            cases.check(cases.leaf(params, path[1:]), rules.to_layout(path, case[key]), 1e-3)


def test_codebook_from_the_published_start(name):
    """Counts start at 0, so codes that are not chosen jump to about 1e5: a difference that must be kept."""
    case, hp = cases.load(name), cases.load(name).hp
    start = case["in/ema0_embedding"]
    quantizer = Quantizer(
        *start.shape, decay=hp["ema_decay"], epsilon=hp["ema_epsilon"], commitment_cost=hp["commitment_cost"]
    )
    codebook = {"embedding": start, "cluster_size": jnp.zeros(len(start)), "ema_w": case["in/ema0_ema_w"]}
    z = cases.nhwc(case["in/ema0_z"])
    result, state = quantizer.apply({"codebook": codebook}, z, train=True, mutable=["codebook"])
    cases.check(result.loss, case["out/ema0_loss"])
    cases.check(result.z, cases.nhwc(case["out/ema0_quantized"]))
    np.testing.assert_array_equal(result.codes, case["out/ema0_codes"])
    cases.check(state["codebook"]["embedding"], case["out/ema0_embedding"])
    cases.check(state["codebook"]["cluster_size"], case["out/ema0_cluster_size"])
    cases.check(state["codebook"]["ema_w"], case["out/ema0_ema_w"])
