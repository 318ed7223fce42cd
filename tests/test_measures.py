"""What tables measure beside the evaluation: the error where the sensor lost the depth, and of bins alone."""

import dataclasses

import jax.numpy as jnp
import measures
import numpy as np
import pytest
import setups
from PIL import Image

from aitok_jax.config import format_workdir
from aitok_jax.data import datasets, scenes
from aitok_jax.models.bins import BinsTokenizer
from aitok_jax.tasks.modalities import Depth


@dataclasses.dataclass(frozen=True)
class Constant:
    """Predicts 2 m, and 100 m where the sensor has a depth, which must not count."""

    def predict(self, params, model_state, batch):
        return {"depth": jnp.where(batch["depth"] > 0, 100.0, 2.0 + params["bias"])}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("holes")
    config = setups.scenes(smoke=True)["depth"]
    scenes.ensure(folder / "scenes", **dict(config.data.render), workers=1)
    measures.write_exact_list(folder / "scenes")
    return format_workdir(config, str(folder))


def test_only_pixels_that_the_sensor_lost_count(config):
    exact = config.data.copy_and_resolve_references()
    exact.unlock().test_list = measures.EXACT
    sensor, exact = datasets.build(config.data), datasets.build(exact)
    variables = {"params": {"bias": jnp.zeros(())}, "model_state": {}}
    found = measures.rmse_in_holes(Constant(), variables, sensor, exact, batch_size=8)
    expected = []
    for line in (sensor_list := (measures.Path(config.data.root) / "test.txt").read_text().splitlines()):
        seen, true = (
            np.asarray(Image.open(config.data.root + line.split()[1].replace("sync", kind))) / 1000
            for kind in ("sync", "exact")
        )
        expected.append(np.sqrt(np.mean((true[seen == 0] - 2) ** 2)))
    assert len(sensor_list) == 2
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-4)


def test_bins_reconstruct_to_half_a_bin():
    part = measures.BinsPart(Depth(), BinsTokenizer(downsample=8, num_codes=128, max_value=10.0), None)
    depth = jnp.full((2, 16, 24), 3.21)
    decoded = part.predict({}, {}, {"depth": depth})["depth"]
    assert decoded.shape == depth.shape
    assert 0 < float(jnp.abs(decoded - depth).max()) <= 5 / 128
