"""Depth metrics, test-time windows and depth losses against the published system's numbers (DESIGN.md section 3)."""

import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax.evaluators.metrics import DEPTH_METRICS, EIGEN_CROP, depth_metrics, mend_prediction, valid_pixels
from aitok_jax.models import losses
from aitok_jax.tasks.windows import predict_windows

pytestmark = cases.find("metrics*")
GRADIENT = 1e-3


@pytest.fixture
def case(name):
    return cases.load(name)


def test_valid_pixels_and_mended_predictions(case):
    valid = np.asarray(valid_pixels(case["in/gt"][None], crop=EIGEN_CROP)[0])
    np.testing.assert_array_equal(case["in/gt"][valid], case["out/crop_gt"])
    np.testing.assert_array_equal(np.asarray(mend_prediction(case["in/pred"]))[valid], case["out/crop_pred"])


@pytest.mark.parametrize("metric", DEPTH_METRICS)
def test_depth_metric(case, metric):
    metrics = depth_metrics(case["in/pred"][None], case["in/gt"][None], crop=EIGEN_CROP)
    cases.check(metrics[metric][0], case[f"out/metric_{metric}"])


@pytest.mark.parametrize(
    ("loss_name", "prediction", "loss"),
    [
        ("silog", "in/loss_pred", losses.silog),
        ("mse_ignore_zero", "in/loss_pred", losses.mse_ignore_zero),
        ("silog_clipped", "in/loss_pred_neg", lambda p, t: losses.silog(p, t, min_prediction=1e-3)),
    ],
)
def test_loss_and_gradient(case, loss_name, prediction, loss):
    value, gradient = jax.value_and_grad(loss)(case[prediction], case["in/loss_target"])
    cases.check(value, case[f"out/{loss_name}"])
    cases.check(gradient, case[f"out/{loss_name}_grad"], GRADIENT)


def test_test_time_windows(case):
    settings = case.hp
    fake = _parse_predictor(settings["fake_predictor"])
    assert settings["tt"]
    for tag, options in settings["tt"].items():
        images_BHWC = np.moveaxis(case[f"in/tt_{tag}_img"], 1, -1)
        assert images_BHWC.shape[1:3] == (options["h"], options["w"])
        run = jax.jit(
            lambda images, o=options: predict_windows(
                fake, images, flip=o["flip"], count=o["shift_size"], min_value=1e-3
            )
        )
        cases.check(run(images_BHWC)["depth"], case[f"out/tt_{tag}_pred"])


def _parse_predictor(formula):
    """The fake predictor from its formula in the case's hyper-parameters: 'pred[b,y,x] = terms  (explanation)'."""
    text = formula.split("=", 1)[1].split("(")[0]
    terms = [term.split("*") for term in text.replace(" ", "").replace("-", "+-").split("+") if term]

    def factor(token, images, y, x):
        sign, token = (-1.0, token[1:]) if token.startswith("-") else (1.0, token)
        if channel := re.fullmatch(r"img\[b,(\d+)\]", token):
            return sign * images[..., int(channel[1])]
        if token in ("x/w", "y/h"):
            return sign * (x if token == "x/w" else y)
        return sign * jnp.full(images.shape[:3], float(token))

    def predict(images_NSSC):
        _, height, width, _ = images_NSSC.shape
        y, x = jnp.meshgrid(jnp.arange(height) / height, jnp.arange(width) / width, indexing="ij")
        y, x = (jnp.broadcast_to(v, images_NSSC.shape[:3]) for v in (y, x))
        total = jnp.zeros(images_NSSC.shape[:3])
        for term in terms:
            product = jnp.ones(images_NSSC.shape[:3])
            for token in term:
                product = product * factor(token, images_NSSC, y, x)
            total = total + product
        return {"depth": total}

    return predict
