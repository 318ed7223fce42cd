"""Stage 1: the mask tokenizer on COCO's instance masks (arXiv 2301.02229, VQ-VAE).

    python -m aitok_jax.main --config=configs/vqvae_mask.py --workdir=runs/vqvae_mask --config.data.root=DATA/coco

Arguments, for example `configs/vqvae_mask.py:num_codes=64`:
    num_codes=128, hidden=16, downsample=16, res_blocks=2   the paper's ablations of the tokenizer
    objective=mse                                           or l1, smooth_l1
    faithful=true                                           false restarts dead codes

Published: 20 epochs of the training masks at batch 512. Evaluated by mask AP and boundary AP of the validation masks
after tokenizing and detokenizing; no number is published with the weights.
"""

from ml_collections import ConfigDict

from aitok_jax.config import parse_arg
from configs import common

TRAINING_MASKS, EPOCHS, BATCH, SIZE = 849_947, 20, 512, 64


def get_config(arg: str | None = None) -> ConfigDict:
    arg = parse_arg(arg, num_codes=128, hidden=16, downsample=16, res_blocks=2, objective="mse", faithful=True)
    steps_per_epoch = TRAINING_MASKS // BATCH
    tokenizer = common.TOKENIZER | {
        "num_codes": arg.num_codes,
        "hidden": arg.hidden,
        "downsample": arg.downsample,
        "num_res_blocks": arg.res_blocks,
        "objective": arg.objective,
        "restart_threshold": 0.0 if arg.faithful else 0.1,
    }
    return common.run(
        name="mask_tokenizer",
        task={"name": "mask_tokenizer", "image_size": SIZE, "tokenizer": tokenizer},
        data=common.coco_data("coco_masks", SIZE),
        batch_size=BATCH,
        eval_batch_size=512,
        train_steps=steps_per_epoch * EPOCHS,
        eval_every=steps_per_epoch,
        best_metric="mask_tokenizer/mask_ap",
        best_mode="max",
        optim=common.optimizer(
            name="adam",
            learning_rate=3e-4,
            warmup_steps=500,
            warmup_ratio=1e-3,
            schedule={"name": "cosine", "end_factor": 1e-6 / 3e-4, "lag": 1},
        ),
    )
