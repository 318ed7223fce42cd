"""The mask tokenizer on real COCO masks: a short training keeps most of the validation masks' shape."""

import config_files
import pytest

from aitok_jax.training import loop

pytestmark = pytest.mark.optimized


def test_mask_tokenizer_keeps_real_masks(coco_subset, tmp_path):
    """250 steps on the 352 training masks; average precision of the 264 validation masks, of which 4 are crowds."""
    config = config_files.load("vqvae_mask", "hidden=8,faithful=false")
    config.data.root, config.data.cache = str(coco_subset), True
    config.task.tokenizer.code_dim = 32
    config.batch_size, config.eval_batch_size = 32, 64
    config.train_steps, config.eval_every, config.log_every = 250, 0, 50
    config.optim.learning_rate, config.optim.warmup_steps = 2e-3, 30
    metrics = loop.train(config, tmp_path)
    assert metrics["mask_tokenizer/mask_ap"] >= 0.5
    assert metrics["mask_tokenizer/mask_ap50"] >= 0.85
    assert metrics["mask_tokenizer/mask_iou"] >= 0.75
