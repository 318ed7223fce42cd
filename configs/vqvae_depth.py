"""Stage 1: the depth tokenizer on NYUv2 (arXiv 2301.02229, VQ-VAE).

    python -m aitok_jax.main --config=configs/vqvae_depth.py --workdir=runs/vqvae_depth --config.data.root=DATA/nyu

Arguments, for example `configs/vqvae_depth.py:num_codes=64,downsample=16`:
    num_codes=128, hidden=16, downsample=32, res_blocks=2   the paper's ablations of the tokenizer
    mask_ratio=0.5, mask_patch=16                           mask augmentation; mask_ratio=0 is without
    objective=mse_ignore_zero                               or mse, l1, smooth_l1, silog
    learning_rate=3e-4                                      the paper says 1e-3
    faithful=true                                           false restarts dead codes

Published: 20 epochs of 24 231 maps at batch 8; no reconstruction error is published with the weights.
"""

from ml_collections import ConfigDict

from aitok_jax.config import parse_arg
from aitok_jax.tasks.modalities.depth import EIGEN_CROP
from configs import common

TRAINING_PAIRS, EPOCHS, BATCH, SIZE = 24231, 20, 8, 480
NYU = {"color": True, "cutdepth": "published"}


def nyu_data(recipe: str) -> dict:
    """The published folder layout and augmentation, of recipe 'tokenizer' or 'solver'."""
    columns = (41, 601) if recipe == "tokenizer" else ()
    return common.maps_data("depth", "data/nyu", SIZE, recipe, columns=columns, **NYU)


def tokenizer_fields(**overrides) -> dict:
    """The fields of the published depth `VQVAE`."""
    own = {"downsample": 32, "objective": "mse_ignore_zero", "use_norm": False, "max_value": 10.0}
    return common.TOKENIZER | own | {"soft_temperature": 0.8} | overrides


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(
        arg,
        num_codes=128,
        hidden=16,
        downsample=32,
        res_blocks=2,
        mask_ratio=0.5,
        mask_patch=16,
        objective="mse_ignore_zero",
        learning_rate=3e-4,
        faithful=True,
    )
    steps_per_epoch = TRAINING_PAIRS // BATCH
    tokenizer = tokenizer_fields(
        num_codes=arg.num_codes,
        hidden=arg.hidden,
        downsample=arg.downsample,
        num_res_blocks=arg.res_blocks,
        objective=arg.objective,
        restart_threshold=0.0 if arg.faithful else 0.1,
    )
    return common.run(
        name="tokenizer",
        task={
            "name": "depth_tokenizer",
            "image_size": SIZE,
            "mask_ratio": arg.mask_ratio,
            "mask_patch": arg.mask_patch,
            "eval_crop": EIGEN_CROP,
            "max_depth": 10.0,
            "tokenizer": tokenizer,
        },
        data=nyu_data("tokenizer"),
        batch_size=BATCH,
        train_steps=steps_per_epoch * EPOCHS,
        log_every=100,
        eval_every=steps_per_epoch,
        best_metric="tokenizer/rmse",
        optim=common.optimizer(
            name="adam",
            learning_rate=arg.learning_rate,
            schedule={"name": "exponential", "factor": 0.98, "every": 500, "steps_per_epoch": steps_per_epoch},
        ),
    )
