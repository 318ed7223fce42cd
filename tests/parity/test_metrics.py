"""Depth metrics, test-time windows and depth losses against the published system's numbers (DESIGN.md section 3)."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aitok_jax import losses
from aitok_jax.geometry import predict_windows
from aitok_jax.metrics import DEPTH_METRICS, EIGEN_CROP, depth_metrics, mend_prediction, valid_pixels

FOLDER = Path(os.environ.get("AITOK_PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))
CASES = sorted(FOLDER.glob("metrics*.npz"))
VALUE, GRADIENT = 1e-4, 1e-3


@pytest.fixture(scope="module", params=CASES or [None], ids=lambda path: path.stem if path else "none")
def case(request):
    if request.param is None:
        pytest.skip(f"no metrics*.npz in {FOLDER}; set AITOK_PARITY_DIR")
    return request.param.stem, dict(np.load(request.param))


def relative_error(ours, reference):
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape
    return np.linalg.norm(ours - reference) / max(np.linalg.norm(reference), 1e-12)


def test_valid_pixels_and_mended_predictions(case):
    _, arrays = case
    valid = np.asarray(valid_pixels(arrays["in/gt"][None], crop=EIGEN_CROP)[0])
    np.testing.assert_array_equal(arrays["in/gt"][valid], arrays["out/crop_gt"])
    np.testing.assert_array_equal(np.asarray(mend_prediction(arrays["in/pred"]))[valid], arrays["out/crop_pred"])


@pytest.mark.parametrize("name", DEPTH_METRICS)
def test_depth_metric(case, name):
    _, arrays = case
    metrics = depth_metrics(arrays["in/pred"][None], arrays["in/gt"][None], crop=EIGEN_CROP)
    assert relative_error(metrics[name][0], arrays[f"out/metric_{name}"]) < VALUE


@pytest.mark.parametrize(
    ("name", "prediction", "loss"),
    [
        ("silog", "in/loss_pred", losses.silog),
        ("mse_ignore_zero", "in/loss_pred", losses.mse_ignore_zero),
        ("silog_clipped", "in/loss_pred_neg", lambda p, t: losses.silog(p, t, min_prediction=1e-3)),
    ],
)
def test_loss_and_gradient(case, name, prediction, loss):
    _, arrays = case
    value, gradient = jax.value_and_grad(loss)(arrays[prediction], arrays["in/loss_target"])
    assert relative_error(value, arrays[f"out/{name}"]) < VALUE
    assert relative_error(gradient, arrays[f"out/{name}_grad"]) < GRADIENT


def test_test_time_windows(case):
    name, arrays = case
    settings = json.loads((FOLDER / "notes.json").read_text())[name]["hp"]
    fake = _parse_predictor(settings["fake_predictor"])
    assert settings["tt"]
    for tag, options in settings["tt"].items():
        images_BHWC = np.moveaxis(arrays[f"in/tt_{tag}_img"], 1, -1)
        assert images_BHWC.shape[1:3] == (options["h"], options["w"])
        run = jax.jit(
            lambda images, o=options: predict_windows(
                fake, images, flip=o["flip"], count=o["shift_size"], min_value=1e-3
            )
        )
        assert relative_error(run(images_BHWC)["depth"], arrays[f"out/tt_{tag}_pred"]) < VALUE, tag


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
