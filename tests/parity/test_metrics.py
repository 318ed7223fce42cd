"""Depth metrics, test-time windows and depth losses against the published system's numbers."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from aitok_jax.evaluators.metrics import inside
from aitok_jax.models import losses
from aitok_jax.tasks.modalities.depth import EIGEN_CROP, METRICS, MIN_DEPTH, Depth, mend
from aitok_jax.tasks.windows import cut, merge, predict_windows, window_starts

pytestmark = cases.find("metrics*")
GRADIENT = 1e-3


@pytest.fixture
def case(name):
    return cases.load(name)


def measured(case):
    return Depth().measured(case["in/gt"]) & inside(EIGEN_CROP, *case["in/gt"].shape)


def test_valid_pixels_and_mended_predictions(case):
    valid, kept = np.asarray(measured(case)), len(case["out/crop_gt"])
    assert valid.sum() == case.hp.get("valid_pixels", kept)  # a slice has the first of them
    np.testing.assert_array_equal(case["in/gt"][valid][:kept], case["out/crop_gt"])
    mended = np.asarray(mend(case["in/pred"], Depth().max_depth))
    np.testing.assert_array_equal(mended[valid][:kept], case["out/crop_pred"])


@pytest.mark.parametrize("metric", METRICS)
def test_depth_metric(case, metric):
    metrics = Depth().metrics(case["in/pred"][None], case["in/gt"][None], measured(case)[None])
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
    """With a number of windows of their own, which `predict_windows` never has."""
    fake = _parse_predictor(case.hp["fake_predictor"])
    tags = [tag for tag in case.hp["tt"] if f"in/tt_{tag}_img" in case]
    assert tags
    for tag in tags:
        options, images_BHWC = case.hp["tt"][tag], cases.nhwc(case[f"in/tt_{tag}_img"])
        height, width = images_BHWC.shape[1:3]
        assert (height, width) == (options["h"], options["w"])
        starts = published.window_starts(height, width, options["shift_size"])
        windows = cut(jnp.asarray(images_BHWC), starts)
        maps = fake(windows)["depth"]
        if options["flip"]:
            maps = (maps + fake(windows[:, :, ::-1])["depth"][:, :, ::-1]) / 2
        cases.check(jnp.maximum(merge(maps, height, width, starts), MIN_DEPTH), case[f"out/tt_{tag}_pred"])
        if starts == window_starts(height, width):
            predicted = jax.jit(partial(predict_windows, fake, flip=options["flip"]))(images_BHWC)
            cases.check(jnp.maximum(predicted["depth"], MIN_DEPTH), case[f"out/tt_{tag}_pred"])


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
