"""The real RGB-D frames, in the published layout."""

import config_files
import pytest

from aitok_jax.training import loop

pytestmark = pytest.mark.optimized


def test_tokenizer_on_the_real_frames(nyu_frames, tmp_path):
    """The published layout, crops and evaluation; a short run nearly halves the RMSE, 3.42 m after one step."""
    data = tmp_path / "nyu"
    data.mkdir()
    for scene in nyu_frames.iterdir():
        (data / scene.name).symlink_to(scene)
    config = config_files.load("vqvae_depth", "hidden=4,learning_rate=0.003")
    config.data.root, config.data.train_list, config.data.test_list = str(data), "list.txt", "list.txt"
    config.data.test_subfolder, config.data.cache = "", True
    config.data.size = config.task.image_size = 160
    config.log_every, config.train_steps = 10, 150
    assert loop.train(config, tmp_path / "run")["tokenizer/rmse"] < 2.05
